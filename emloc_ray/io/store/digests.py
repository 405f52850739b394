"""The SHA-256 of files: read from them, or noted beside them by whoever wrote them."""

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import IO, Any

_CHUNK = 2**22
_ATTRIBUTE = "user.sha256"


def digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return digest_of(stream)


def digest_of(stream: IO[bytes]) -> str:
    """The SHA-256 of what a stream holds from here on, in hexadecimal."""
    total = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        total.update(chunk)
    return total.hexdigest()


class HashingWriter(io.BufferedWriter):
    """A binary file that hashes what is written to it, as long as that is written from front to back."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._total: Any = hashlib.sha256()

    def write(self, data: Any) -> int:
        """As any binary file."""
        if self._total is not None:
            self._total.update(data)
        return super().write(data)

    def seek(self, target: int, whence: int = 0) -> int:
        """As any binary file; what is written from now on is not hashed."""
        self._total = None
        return super().seek(target, whence)

    def hexdigest(self) -> str | None:
        """The SHA-256 of the content so far; None where it was not written from front to back."""
        return None if self._total is None else str(self._total.hexdigest())


def note_digest(path: Path, sha256: str) -> None:
    """Keeps a file's digest with it, valid for its present size and time, where the file system has attributes for that."""
    status = path.stat()
    with contextlib.suppress(OSError, AttributeError):
        os.setxattr(path, _ATTRIBUTE, f"{sha256}:{status.st_size}:{status.st_mtime_ns}".encode())


def noted_digest(path: Path) -> str | None:
    """What :func:`note_digest` kept; None where there is nothing, the file has changed since, or is another user's, who may
    have noted what he likes."""
    try:
        sha256, size, modified = os.getxattr(path, _ATTRIBUTE).decode().split(":")
    except (OSError, AttributeError, ValueError):
        return None
    status = path.stat()
    same = (int(size), int(modified)) == (status.st_size, status.st_mtime_ns)
    return sha256 if same and status.st_uid == os.geteuid() else None
