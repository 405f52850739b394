"""A cache in a folder that several users write."""

# ruff: noqa: F811

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from test_cache import CONTENTS, KEY, STAGE, added, folder, held, local  # noqa: F401

from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.cache_place import CachePlace


def test_where_another_user_s_lock_cannot_be_taken_it_goes_on_without(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local.alone(KEY):
        added(local, tmp_path / "first")
    opened = os.open

    def refused(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).parent.name == ".locks":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)
    told: list[str] = []
    other = ArtifactCache(local.place)
    with other.alone(KEY, tell=told.append):
        entry = other.find(STAGE, KEY, verify=True)
        assert entry is not None
        other.link(entry, tmp_path / "second")
    assert held(tmp_path / "second") == CONTENTS
    [sentence] = told
    assert sentence.startswith(f"The artifact cache {local.place} gives this user no lock (Permission denied)")


@pytest.mark.parametrize("mode", [0o2775, 0o1777, 0o700])
def test_who_may_write_in_the_place_may_write_in_its_folders(
    tmp_path: Path, mode: int, request: pytest.FixtureRequest
) -> None:
    before = os.umask(0o022)
    request.addfinalizer(lambda: os.umask(before))
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(mode)
    cache = ArtifactCache(str(place))
    with cache.alone(KEY):
        added(cache, tmp_path / "first")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (place / STAGE, place / ".locks")}
    assert modes == {STAGE: mode, ".locks": mode}
    assert stat.S_IMODE((place / ".locks" / KEY).stat().st_mode) == mode & 0o666


def test_no_room_is_made_of_other_users_entries(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whose folders only the names could go."""
    for number in range(2):
        added(local, tmp_path / str(number), ArtifactCache.key(STAGE, number), {"emulator/x": bytes([number]) * 1000})
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert local.prune(1000) == []
        assert len(local.entries()) == 2
    assert len(local.prune(1000)) == 1


def test_own_entries_stay_where_other_users_leave_no_room(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [ArtifactCache.key(STAGE, number) for number in range(2)]
    for number, key in enumerate(keys):
        added(local, tmp_path / str(number), key, {"emulator/x": bytes([number]) * 1000})
    monkeypatch.setattr(CachePlace, "can_free", lambda place, stage, key: key == keys[0])
    assert local.prune(500) == []
    assert [entry.key for entry in local.prune(1000)] == [keys[0]]


def test_a_lock_of_another_user_in_a_folder_with_the_sticky_bit_is_taken(
    local: ArtifactCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux refuses there to open it as what may be created."""
    with local.alone(KEY):
        pass
    opened = os.open

    def protected(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT and Path(path).exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", protected)
    told: list[str] = []
    with ArtifactCache(local.place).alone(KEY, tell=told.append):
        pass
    assert told == []
