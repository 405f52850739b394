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


def refuse_beside(monkeypatch: pytest.MonkeyPatch, parent: str, *calls: str) -> None:
    """Refuses these calls of what lies in folders of this name, as to a user without rights there."""
    for call in calls:
        real = getattr(Path, call)

        def refused(path: Path, *arguments: Any, real: Any = real, **options: Any) -> Any:
            if path.parent.name == parent:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(Path, call, refused)


def test_where_another_user_s_lock_cannot_be_taken_it_goes_on_without(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local.alone(KEY):
        added(local, tmp_path / "first")
    refuse_beside(monkeypatch, ".locks", "open", "chmod")
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


def test_another_user_s_entry_that_cannot_be_removed_stays(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder with the sticky bit; room is made by what can go."""
    keys = [ArtifactCache.key(STAGE, number) for number in range(2)]
    for number, key in enumerate(keys):
        added(local, tmp_path / str(number), key, {"emulator/x": bytes([number]) * 1000})
        os.utime(folder(local, key) / "entry.json", (number, number))
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name == keys[0]:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    assert [entry.key for entry in local.prune(1000)] == [keys[1]]
    assert [entry.key for entry in local.entries()] == [keys[0]]
