"""A cache in a folder that several users write."""

# ruff: noqa: F811

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cache import CONTENTS, KEY, STAGE, added, folder, held, local, made, place  # noqa: F401

from emloc_ray.io.runs import cache_place
from emloc_ray.io.runs.cache import ArtifactCache, EntryGone
from emloc_ray.io.runs.cache_place import MARKER, CachePlace
from emloc_ray.io.store.lock_file import LockFile
from emloc_ray.io.store.node_cache import mirror


def test_where_another_user_s_lock_cannot_be_taken_it_goes_on_without(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local.alone(KEY):
        added(local, tmp_path / "first")
    opened = os.open

    def refused(path: Any, *arguments: Any, **options: Any) -> int:
        if path == KEY:
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


def test_what_one_user_closes_to_others_breaks_nothing_of_theirs(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    local._at.root.mkdir()
    local._at.root.chmod(0o2775)
    before = os.umask(0o077)
    request.addfinalizer(lambda: os.umask(before))
    added(local, tmp_path / "first")
    other = ArtifactCache.key(STAGE, "other")
    added(local, tmp_path / "second", other, {"emulator/x": b"open"})
    assert stat.S_IMODE((Path(local.place) / MARKER).stat().st_mode) == 0o664
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder(local).rglob("*"))
    status = Path.stat

    def refused(path: Path, **options: Any) -> os.stat_result:
        if folder(local) in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return status(path, **options)

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(cache_place, "LEFT_S", -1.0)
    assert local.find(STAGE, KEY) is None
    assert [entry.key for entry in local.entries()] == [other]
    assert [entry.key for entry in local.prune(0)] == [other]
    assert folder(local).is_dir()


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder of this user's alone, for which a cache has names."""
    folder = tmp_path / "home"
    for path in (folder / "keys", folder / KEY / "letter", folder / "old" / "letter"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        path.chmod(0o600)
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    folder.chmod(0o700)
    return folder


def looks_of(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.stat().st_mode, path.stat().st_mtime) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("linked", [f".locks/{KEY}", ".locks", STAGE, "other"])
def test_links_that_another_user_put_there_are_not_followed(
    local: ArtifactCache, tmp_path: Path, private: Path, linked: str
) -> None:
    local._at.make()
    local._at.root.chmod(0o2775)
    before = looks_of(private)
    link = Path(local.place, linked)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(private / "keys" if linked.endswith(KEY) else private)
    told: list[str] = []
    with local.alone(KEY, tell=told.append):
        assert local.find(STAGE, KEY, verify=True) is None
        refused = local.add(STAGE, KEY, tmp_path / "run", made(tmp_path / "run"), {}, {})
    local.prune(0)
    assert local.entries() == []
    assert looks_of(private) == before
    assert (private / "keys").read_text() == "mine"
    assert [text.partition(" (")[0] for text in told] == (
        [f"The artifact cache {local.place} gives this user no lock"] if ".locks" in linked else []
    )
    assert (refused is not None) == (linked == STAGE)


@pytest.mark.parametrize("swapped", ["emulator/deep/b.json", "emulator/deep"])
def test_a_file_that_is_swapped_after_the_check_is_not_taken(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    added(local, tmp_path / "first")
    private = tmp_path / "home" / "b.json"
    private.parent.mkdir()
    private.write_text("[]")  # of the same size
    private.chmod(0o600)
    other = ArtifactCache(local.place)
    entry = other.find(STAGE, KEY, verify=True)
    assert entry is not None
    path = folder(local) / "files" / swapped
    path.rename(tmp_path / "away")
    path.symlink_to(private if path.suffix else private.parent)
    with pytest.raises(EntryGone):
        other.link(entry, tmp_path / "second")
    assert (stat.S_IMODE(private.stat().st_mode), private.stat().st_nlink) == (0o600, 1)
    assert not any(file.is_file() for file in (tmp_path / "second").rglob("*"))
    assert other.find(STAGE, KEY, verify=True) is None


@pytest.mark.parametrize("of_another", ["emulator/deep/b.json", "entry.json"])
def test_what_may_be_code_is_taken_from_this_user_alone(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_another: str
) -> None:
    added(local, tmp_path / "first")
    assert local.find(STAGE, KEY, verify=True, own_only=True) is not None
    lstat = Path.lstat

    def as_another_s(path: Path) -> os.stat_result:
        status = list(lstat(path))
        status[4] += path.as_posix().endswith(of_another)
        return os.stat_result(status)

    monkeypatch.setattr(Path, "lstat", as_another_s)
    assert local.find(STAGE, KEY, verify=True, own_only=True) is None
    assert local.find(STAGE, KEY) is not None
    assert ArtifactCache(local.place, is_own=True).find(STAGE, KEY, own_only=True) is not None


@pytest.mark.server
def test_in_a_bucket_of_others_nobody_knows_whose_code_it_is(place: Callable[..., str]) -> None:
    cache, root = (place("bucket", name) for name in ("shared", "run"))
    added(ArtifactCache(cache), mirror(root))
    for is_own in (False, True):
        assert ArtifactCache(cache, is_own=is_own).find(STAGE, KEY) is not None
        assert (ArtifactCache(cache, is_own=is_own).find(STAGE, KEY, own_only=True) is not None) == is_own


def test_an_entry_holds_files_and_no_links(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "first")
    file = folder(local) / "files" / "emulator" / "deep" / "b.json"
    file.rename(tmp_path / "b.json")
    file.symlink_to(tmp_path / "b.json")
    assert local.find(STAGE, KEY) is None
    assert local.entries() == []


def test_a_lock_that_is_also_another_file_s_name_is_not_written(local: ArtifactCache, private: Path) -> None:
    local._at.make()
    lock = Path(local.place, ".locks", KEY)
    lock.parent.mkdir()
    lock.hardlink_to(private / "keys")
    told: list[str] = []
    with local.alone(KEY, tell=told.append):
        pass
    assert ((private / "keys").read_text(), len(told)) == ("mine", 1)


def test_the_lock_of_a_run_is_no_link(tmp_path: Path, private: Path) -> None:
    (tmp_path / ".lock").symlink_to(private / "keys")
    with pytest.raises(OSError, match="symbolic links"):
        LockFile(tmp_path).take()
    assert (private / "keys").read_text() == "mine"


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
        if flags & os.O_CREAT and path == KEY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", protected)
    told: list[str] = []
    with ArtifactCache(local.place).alone(KEY, tell=told.append):
        pass
    assert told == []
