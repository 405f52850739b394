"""Short content hashes: of values, of files, of checkpoints."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emloc_ray.io.store.digests import digest, noted_digest


def fingerprint(value: Any) -> str:
    """A hash of a JSON-able value that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_files(files: Iterable[Path]) -> str:
    """A hash of names and contents, in the order given."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + bytes.fromhex(digest(file)))
    return total.hexdigest()[:16]


def fingerprint_large_files(files: Iterable[Path]) -> str:
    """A hash of files that may be large: contents of the small ones; names, sizes and times of the others.

    Reading 140 GB of weights only to find that nothing changed would cost minutes at every start. What the hub's cache
    names by its content goes by that name: another machine's download of it is the same.
    """
    parts: list[Any] = []
    for file in files:
        if file.is_file() and not file.name.startswith("."):
            status = file.stat()
            small = status.st_size < 2**26
            large = _hub_digest(file) or [status.st_size, status.st_mtime_ns]
            parts.append([file.name, _small_digest(file, *_look(file)) if small else large])
    return fingerprint(parts)


def content_of(files: Iterable[Path]) -> str:
    """A hash of names and whole contents, of large files too: what one machine's time says of them, another's need not.

    Each file is read once by a process, or never where its digest is noted with it.
    """
    return fingerprint([[file.name, _known_digest(file, *_look(file))] for file in files if file.is_file()])


@functools.lru_cache(maxsize=65536)  # hundreds of tasks may ask for the same
def _small_digest(file: Path, *look: int) -> str:
    return fingerprint_files([file])


def _look(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@functools.lru_cache(maxsize=65536)
def _known_digest(file: Path, *look: int) -> str:
    return _hub_digest(file) or noted_digest(file) or digest(file)


def _hub_digest(file: Path) -> str | None:
    """The SHA-256 by which the hub's cache names a large file (huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    name = file.resolve().name if file.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else None
