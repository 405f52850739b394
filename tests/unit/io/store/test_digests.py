"""Digests: as written, as read, and never believed of a file that has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from emloc_ray.io.store import atomic, node_cache
from emloc_ray.io.store.atomic import atomic_file
from emloc_ray.io.store.digests import digest, note_digest, noted_digest
from emloc_ray.io.store.node_cache import hashes


def test_what_is_written_is_hashed_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic_file(path) as file:
        file.write(b"one")
        file.write(memoryview(b"two"))
    assert digest(path) == hashlib.sha256(b"onetwo").hexdigest()
    assert noted_digest(path) in (digest(path), None)  # None where the file system keeps no attributes


def test_a_seek_ends_the_hash_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with atomic_file(path) as file:
        file.write(b"abc")
        file.seek(0)
        file.write(b"x")
    assert path.read_bytes() == b"xbc"
    assert noted_digest(path) is None
    assert hashes(tmp_path) == {path: hashlib.sha256(b"xbc").hexdigest()}


def test_a_note_does_not_outlive_its_content(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    note_digest(path, digest(path))
    if noted_digest(path) is None:
        pytest.skip("this file system keeps no attributes")
    status = path.stat()
    path.write_bytes(b"xyz")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert noted_digest(path) is None
    assert hashes(path) == {path: hashlib.sha256(b"xyz").hexdigest()}


def test_another_user_s_note_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    note_digest(path, "0" * 64)
    if noted_digest(path) is None:
        pytest.skip("this file system keeps no attributes")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert noted_digest(path) is None
    assert hashes(path) == {path: hashlib.sha256(b"abc").hexdigest()}


def test_without_attributes_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "setxattr", refuse, raising=False)
    atomic.write_json(tmp_path / "f", [])
    assert noted_digest(tmp_path / "f") is None
    assert hashes(tmp_path) == {tmp_path / "f": hashlib.sha256(b"[]\n").hexdigest()}


def test_without_attributes_what_many_runs_link_is_read_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("not supported")

    read: list[Path] = []
    monkeypatch.setattr(os, "setxattr", refuse, raising=False)
    monkeypatch.setattr(node_cache, "digest", lambda path: (read.append(path), digest(path))[1])
    path, link = tmp_path / "f", tmp_path / "link"
    path.write_bytes(b"abc")
    hashes(path)
    hashes(path)
    assert read == [path, path]  # it was written just now, and may be altered within the same tick of its clock
    now = path.stat().st_mtime_ns
    os.utime(path, ns=(now, now - 10**10))
    link.hardlink_to(path)
    assert hashes(path)[path] == hashes(link)[link] == hashlib.sha256(b"abc").hexdigest()
    assert read == [path, path, path]
    link.write_bytes(b"xyz")
    os.utime(path, ns=(now, now - 9 * 10**9))
    assert hashes(path) == {path: hashlib.sha256(b"xyz").hexdigest()}
