"""A file or a folder put in the place of another at once."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_ALMOST_NOTHING = 2**20  # bytes that a full disk may still have free


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A name beside ``path`` for a file or folder that takes its place when the block ends without an error. It is on disk
    before it has its name, and so is the name; not ``durable``, a crash of the machine may lose it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(path)
    try:
        with naming_full_disk(path):
            yield temporary
            if durable:
                _fsync(temporary)
        if temporary.is_dir():
            remove(path)
        temporary.replace(path)
    finally:
        remove(temporary)  # also after the replacement: of two names of one file it leaves both
    if durable:
        _fsync_one(path.parent)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raises OSError, which names ``path``, where its disk is full while the block writes there: the operating system does not
    name it, torch raises RuntimeError and safetensors SafetensorError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except (RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(path.parent).free > _ALMOST_NOTHING:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _fsync(path: Path) -> None:
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            _fsync_one(file)


def _fsync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def remove(path: Path) -> None:
    """Removes a file or directory of this node, a link itself: at once, so that a kill leaves no directory with some files."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".tmp":
            with contextlib.suppress(OSError):  # where something is mounted, or another process was faster
                path = path.replace(_unfinished(path))
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
