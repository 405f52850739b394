"""Writes that are whole or absent: temporary name, fsync, rename; then, in a run on an object store, given to that."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from emloc_ray.io.store.digests import HashingWriter, note_digest
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import ensure, forget, publish, publish_plain
from emloc_ray.io.store.replacing import remove, replacing

COPY_BYTES = 2**24
"""What copies of large files hold at a time."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path`` that takes its place, fsynced, when the block ends without an error. Raises
    TakenOver where that lies in a run that another process has taken meanwhile; it is as it was then."""
    with replacing(path) as temporary:
        with HashingWriter(io.FileIO(temporary, "wb")) as file:
            yield file
        sha256 = file.hexdigest()
        if sha256 is not None:
            note_digest(temporary, sha256)
        check_lock(path)
        # Where another process of this node brings its copy up to date meanwhile, that must not be what is given away.
        plain = publish_plain(path, temporary)
    if not plain:
        publish(path, whole=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` that replaces it when the block ends without an error."""
    with replacing(path) as temporary:
        temporary.mkdir()
        yield temporary
        check_lock(path)
    forget(path)
    publish(path, whole=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes what a file holds, atomically."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Writes a text, atomically."""
    write_bytes(path, text.encode())


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file, atomically."""
    ensure(source)
    write_bytes(target, source.read_bytes())


def remove_leftovers(path: Path) -> None:
    """Removes what writers of a file or folder, or of files in that, left when they were killed."""
    beside = path.parent.glob(f".{path.name}.*.tmp")
    inside = path.rglob(".*.tmp") if path.is_dir() else ()
    for leftover in [*beside, *inside]:
        remove(leftover)


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON; half a surrogate pair, as a file's name that is not UTF-8 has it, is escaped."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """What a JSON file holds, present and current on this node; None where there is none."""
    ensure(path)
    return json.loads(path.read_text()) if path.is_file() else None
