"""Atomic writes: an exception leaves what was there, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from emloc_ray.io.store.atomic import atomic_directory, atomic_file, remove_leftovers, write_json
from emloc_ray.io.store.lock_file import LockFile
from emloc_ray.io.store.replacing import remove, replacing


class Interrupted(BaseException):
    """As Ctrl-C or SystemExit: not an Exception."""


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_file_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" whole")
    assert path.read_bytes() == b"half whole"
    assert names(path.parent) == {"a.bin"}


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_umask_says_who_may_read_and_write(tmp_path: Path, request: pytest.FixtureRequest, umask: int) -> None:
    before = os.umask(umask)
    request.addfinalizer(lambda: os.umask(before))
    with atomic_directory(tmp_path / "folder") as folder:
        write_json(folder / "a.json", 1)
    LockFile(tmp_path).take()
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"folder": 0o777 & ~umask, "a.json": 0o666 & ~umask, ".lock": 0o666 & ~umask}


def _saved_by_torch(path: Path) -> None:
    torch.save(torch.zeros(9), "/dev/full")


def _saved_by_safetensors(path: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _written(path: Path) -> None:
    Path("/dev/full").write_bytes(b"x" * 9)


@pytest.mark.parametrize("write", [_saved_by_torch, _saved_by_safetensors, _written])
def test_a_full_disk_is_told_with_the_file_that_finds_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """Whatever raises: torch does not name the cause."""
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=4096))
    with (
        pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a.bin'}'"),
        replacing(tmp_path / "a.bin"),
    ):
        write(tmp_path)


def test_what_else_goes_wrong_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), replacing(tmp_path / "a.bin"):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("error", [ValueError, Interrupted])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failed_file_leaves_what_was_there(tmp_path: Path, error: type[BaseException], before: bytes | None) -> None:
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ({"a.bin"} if before else set())
    assert not before or path.read_bytes() == before


def test_the_bytes_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert events == ["fsync", "replace", "fsync"]


def test_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "old").write_text("old")
    with atomic_directory(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new").write_text("new")
        assert names(path) == {"old"}
    assert names(path) == {"sub"}
    assert (path / "sub" / "new").read_text() == "new"
    assert names(tmp_path) == {"d"}


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_directory_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "d"
    path.mkdir()
    (path / "old").write_text("old")

    def fail() -> None:
        with atomic_directory(path) as temporary:
            (temporary / "new").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == {"d"}
    assert names(path) == {"old"}


def test_json_is_read_back_and_a_bad_value_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"λ": [1, 2.5, None]})
    assert json.loads(path.read_text()) == {"λ": [1, 2.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"set": {1}})
    assert json.loads(path.read_text()) == {"λ": [1, 2.5, None]}
    assert names(tmp_path) == {"a.json"}


def test_half_a_surrogate_pair_comes_back_from_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"path": "caf\udce9"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "caf\udce9"}


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    (folder / "spectra").mkdir(parents=True)
    for name in (
        "merged/.a.safetensors.x1.tmp",
        "merged/spectra/.b.y2.tmp",
        "merged/a.safetensors",
        "other",
        ".other.z.tmp",
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / ".merged.z3.tmp").mkdir()
    remove_leftovers(folder)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"merged", "merged/spectra", "merged/a.safetensors", "other", ".other.z.tmp"}


def test_a_folder_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "inside").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (path / "inside").rmdir() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    remove_leftovers(tmp_path / "a")
    assert names(tmp_path) == set()


def test_a_link_to_a_folder_is_removed_and_not_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "a" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    remove(tmp_path / "link")
    assert names(tmp_path) == {"a"}
    assert names(tmp_path / "a") == {"inside"}


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path / "a") as file:
        file.write(b"x")
    assert names(tmp_path) == {"a"}
    assert names(tmp_path / "a") == {"inside"}
