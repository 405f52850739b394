"""Writes that are whole or absent: temporary name, fsync, rename; then, in a run on an object store, given to that."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from emloc_ray.io.digests import HashingWriter, note_digest
from emloc_ray.io.node_cache import discard, ensure, publish, publish_plain


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path`` that takes its place, fsynced, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with HashingWriter(io.FileIO(handle, "wb")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        sha256 = file.hexdigest()
        if sha256 is not None:
            note_digest(Path(temporary), sha256)
        # Where another process of this node brings its copy up to date meanwhile, that must not be what is given away.
        plain = publish_plain(path, Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _fsync_directory(path.parent)
    if not plain:
        publish(path, whole=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` that replaces it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync_file(file)
        os.chmod(temporary, 0o755)
        discard(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync_directory(path.parent)
    publish(path, whole=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file, atomically."""
    ensure(source)
    with atomic_file(target) as file:
        file.write(source.read_bytes())


def remove_leftovers(path: Path) -> None:
    """Removes what writers of a file or folder, or of files in that, left when they were killed."""
    beside = path.parent.glob(f".{path.name}.*.tmp")
    inside = path.rglob(".*.tmp") if path.is_dir() else ()
    for leftover in [*beside, *inside]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_directory(path: Path) -> None:
    _fsync_file(path)
