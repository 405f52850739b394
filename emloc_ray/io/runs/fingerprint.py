"""Short content hashes: of values, of files, of checkpoints."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from emloc_ray.io.store.digests import digest, noted_digest
from emloc_ray.io.store.node_cache import is_stored
from emloc_ray.io.store.replacing import replacing
from emloc_ray.io.store.shared import Shared

_LARGE = 2**26
_READERS = 4
_HEADER, _BLOCK, _BLOCKS = 2**20, 2**16, 32
Looks = tuple[tuple[str, tuple[int, ...]], ...]


def fingerprint(value: Any) -> str:
    """A hash of a JSON-able value that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_large_files(files: Iterable[Path]) -> str:
    """A hash of names and contents of files that may be large, whatever their times: the whole is read once, and again where
    its time or inode changed, its header and blocks all over it each time. Of a file that the hub's cache names by its
    content, that name stands for the whole: the header and the blocks tell what was written over it since."""
    with ThreadPoolExecutor(_READERS) as pool:
        return fingerprint(list(pool.map(_part, filter(Path.is_file, files))))


def _part(file: Path) -> list[Any]:
    sha256 = _digest_of(file)
    if file.stat().st_size < _LARGE:
        return [file.name, hashlib.sha256(file.name.encode() + bytes.fromhex(sha256)).hexdigest()[:16]]
    return [file.name, [_sampled(file), sha256]]


def look_of(file: Path) -> str:
    """What tells a file from what it was: its time, and a hash of its size, header, end, and blocks at equal distances. These are
    read each time of a large file, of a small one where its times or inode changed."""
    status = file.stat()
    blocks = _sampled(file) if status.st_size >= _LARGE else _SAMPLED.get((file, *_look(file)), lambda: _sampled(file))
    return f"{status.st_mtime_ns} {blocks}"


def looks_in(directory: Path, only: str | None = None) -> Looks:
    """The files in a directory, and chat templates below it, or ``only`` one, with inodes, sizes and times: the key of what a
    process keeps of them. Empty where the directory mirrors a store: its path names a lease, under which they stay."""
    if is_stored(directory):
        return ()
    every = (file for pattern in ("*", "additional_chat_templates/*") for file in directory.glob(pattern))
    files = every if only is None else (directory / only,)
    return tuple(sorted((file.name, _look(file)) for file in files if file.is_file()))


def _sampled(file: Path) -> str:
    """A hash of a file's size, header, end, and blocks at equal distances."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        total = hashlib.sha256(str(size).encode() + stream.read(_HEADER))
        for number in range(1, _BLOCKS + 1) if size > _HEADER else ():
            stream.seek(min(number * size // _BLOCKS, size - _BLOCK))
            total.update(stream.read(_BLOCK))
    return total.hexdigest()


def content_of(files: Iterable[Path]) -> str:
    """A hash of names and whole contents, of large files too, whatever their times and folders. Each file is read once,
    where its digest is not noted with it or by this user; of a large one, header and blocks each time."""
    return fingerprint([_content(file) for file in files if file.is_file()])


def _content(file: Path) -> list[str]:
    sampled = [_sampled(file)] if file.stat().st_size >= _LARGE else []
    return [file.name, _digest_of(file), *sampled]


_WHOLE, _SAMPLED = Shared[str](65536), Shared[str](65536)  # hundreds of tasks may ask for the same


def _digest_of(file: Path) -> str:
    look = _look(file)
    return _WHOLE.get((file, *look), lambda: _known_digest(file, *look))


def _look(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _known_digest(file: Path, *look: int) -> str:
    named = hub_digest(file) if file.stat().st_size >= _LARGE else None  # a small one is read faster than trusted
    return named or noted_digest(file) or _digest_once(file, " ".join(map(str, look)))


def _digest_once(file: Path, look: str) -> str:
    """A file's SHA-256, which is kept for this user as long as the file looks the same, if it is large: it may be another's."""
    if file.stat().st_size < _LARGE:
        return digest(file)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    note = caches / "emloc_ray" / "digests" / hashlib.sha256(str(file.resolve()).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        known, sha256 = note.read_text().split(":")
        if known == look:
            return sha256
    sha256 = digest(file)
    with contextlib.suppress(OSError):  # a home that cannot be written: it is read again by the next process
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(note, durable=False) as temporary:
            temporary.write_text(f"{look}:{sha256}")
    return sha256


def hub_digest(file: Path) -> str | None:
    """The SHA-256 by which the hub's cache names a large file (huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    name = file.resolve().name if file.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else None
