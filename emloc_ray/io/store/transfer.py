"""A file of one place put into another as cheaply as the two allow: linked, copied by the store itself, or through this node."""

import errno
import io
import os
import shutil
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

from emloc_ray.errors import ArtifactError, DamagedArtifactError
from emloc_ray.io.store import objects
from emloc_ray.io.store.digests import HashingWriter, note_digest
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import Origin, discard, origin
from emloc_ray.io.store.node_copies import is_whole, take_as_whole
from emloc_ray.io.store.object_store import Listing
from emloc_ray.io.store.replacing import replacing

_CHUNK = 2**22
_STREAMS = threading.BoundedSemaphore(2)  # of this process: each holds pieces of its file in memory


def listing(root: Path, paths: Iterable[str]) -> Listing | None:
    """What the store that ``root`` mirrors holds at and below these ``paths`` in it; None in a file system."""
    here = origin(root)
    return None if here is None else here.store.listing(*(f"{here.path}/{path}".strip("/") for path in paths))


def transfer(
    source: Path,
    target: Path,
    size: int,
    sha256: str,
    source_listing: Listing | None = None,
    target_listing: Listing | None = None,
    verify: bool = False,
) -> None:
    """Makes ``target`` a file of the same content as ``source``, atomically; either may mirror an object store. The
    :func:`listing` of each, where there is one, spares its store a request.

    On one file system it is a read-only hard link, checked by size and, with ``verify``, by :func:`is_whole`: the link itself,
    so that nobody can put another file there meanwhile. Within one bucket the object, whose key names its content, is copied
    there. Otherwise the content goes through this node, between two stores through its memory alone, and is checked by
    ``sha256``. Raises FileNotFoundError where there is no ``source``, DamagedArtifactError where it is not of this size or
    content (``target`` is as it was, or gone), ArtifactError where a store cannot be reached, TakenOver where ``target`` lies in
    a run that another process has taken.
    """
    source_at, target_at = origin(source), origin(target)
    if source_at is None:
        if target_at is None:
            _link_file(source, target, size, sha256, verify)
        elif (
            source.stat().st_size != size
            or target_at.store.add_version(target_at.path, source, target_listing) != sha256
        ):
            discard(target)
            raise _damaged(source)
        return
    info = source_at.store.version_of(source_at.path, sha256, source_listing)
    if info is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    if info.size != size:
        raise _damaged(source)
    if target_at is None:
        with replacing(target) as temporary:
            source_at.store.download(info, temporary)
            note_digest(temporary, sha256)
            check_lock(target)
    elif not _copied_in_bucket(source_at, info, target_at, target_listing):
        with _STREAMS:
            target_at.store.stream_version(target_at.path, source_at.store, info, target_listing)


def _link_file(source: Path, target: Path, size: int, sha256: str, verify: bool) -> None:
    with replacing(target) as temporary:
        try:
            os.link(source if verify else os.path.realpath(source), temporary, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, one without hard links, too many links, or another user's file
            with source.open("rb") as stream, HashingWriter(io.FileIO(temporary, "wb")) as file:
                shutil.copyfileobj(stream, file, _CHUNK)
            if file.hexdigest() != sha256:
                raise _damaged(source) from None
            note_digest(temporary, sha256)
        else:
            status = temporary.lstat()
            if not stat.S_ISREG(status.st_mode) or (verify and not is_whole(temporary, sha256)):
                raise _damaged(source)
            if status.st_uid == os.geteuid():
                temporary.chmod(status.st_mode & 0o555)  # what is altered in place would be altered for all
        if temporary.stat().st_size != size:
            raise _damaged(source)
        check_lock(target)
    take_as_whole(target, sha256)


def _copied_in_bucket(
    source_at: Origin, info: objects.Stored, target_at: Origin, target_listing: Listing | None
) -> bool:
    if target_at.store.client != source_at.store.client or info.size > objects.LARGEST_COPY:
        return False
    try:
        target_at.store.copy_version(target_at.path, source_at.store, info, target_listing)
    except ArtifactError:  # on the way through this node every step is tried again
        return False
    return True


def _damaged(source: Path) -> DamagedArtifactError:
    return DamagedArtifactError(f"{source} is cut short or altered: run the same command again.")
