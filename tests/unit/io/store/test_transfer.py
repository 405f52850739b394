"""Files linked within a file system keep what is known of them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from emloc_ray.io.store.atomic import atomic_file
from emloc_ray.io.store.digests import digest, noted_digest
from emloc_ray.io.store.transfer import look_of, transfer


def copy_blocks(target: int, _: int, source: int) -> None:
    """What a file system with reflinks does, at the price of a copy."""
    os.sendfile(target, source, 0, os.fstat(source).st_size)


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_reflink_is_not_read_again_for_its_digest(
    is_checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with atomic_file(source) as file:
        file.write(b"weights")
    if noted_digest(source) is None:
        pytest.skip("this file system keeps no attributes")
    monkeypatch.setattr(fcntl, "ioctl", lambda file, number, fd: copy_blocks(file.fileno(), number, fd))
    transfer(source, target, 7, digest(source), look=look_of(source.stat()) if is_checked else None)
    assert target.read_bytes() == b"weights"
    assert target.stat().st_ino != source.stat().st_ino
    assert noted_digest(target) == digest(source)


def test_a_reflink_of_what_nobody_has_hashed_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"altered")
    monkeypatch.setattr(fcntl, "ioctl", lambda file, number, fd: copy_blocks(file.fileno(), number, fd))
    transfer(source, target, 7, "0" * 64)
    assert noted_digest(target) is None
