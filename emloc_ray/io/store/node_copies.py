"""A node's copies of what stores hold: which version each is, and room for new ones where the disk is full.

A run's place on the node is a folder whose name begins with :data:`MARK`. Beside each copy lies a note of its version, which
holds as long as the file is the same, and whose time says when the copy was last used.
"""

import contextlib
import functools
import math
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import quote

from emloc_ray.errors import ConfigError
from emloc_ray.io.store.digests import digest_of
from emloc_ray.io.store.replacing import remove, replacing
from emloc_ray.io.store.turns import holder_of, try_lock, wait_for_turn

MARK, LOCAL = "store=", "local="
_VERSIONS, _LOCKS, _SWEPT = ".versions", ".locks", ".swept"
# The copies may fill the node's disk but for this share of it; what was used in the last minutes stays.
_FREE_SHARE = 0.1
_SIZE_VARIABLE = "EMLOC_RAY_CACHE_SIZE"
IN_USE_S = 600.0
# Looking at all copies takes long where they are many. So a process looks again only when it has added its part of the free
# bytes, for a node of up to _PROCESSES processes, or at least _LEAST_SHARE of all bytes, where nothing can be dropped.
_PROCESSES = 64
_LEAST_SHARE = 0.001
_SPARE_SHARE = 0.1  # of all bytes is freed beyond what is missing: what all processes add before they look again
_SWEEP_S = 3600.0  # between two sweeps of a node
_LEFT_S = 86400.0  # what has not changed for so long was left for good
PATIENCE_S = 1800.0  # with one that fetches the same file: it may have been stopped
_MAX_NAME = 255
# What nobody adds to or alters in place, unlike logs.
_NEVER_ALTERED = (".safetensors", ".arrow")
_hashed: dict[tuple[object, ...], tuple[int, int]] = {}  # by what a copy is: its ctime and links when it was hashed
_turns = [threading.Lock() for _ in range(64)]  # of threads that would hash the same file
_allowance: dict[Path, float] = {}  # bytes that this process may add before it looks at all copies again


def note_of(root: Path, path: str) -> Path:
    """Where this node notes which version its copy of a file is."""
    return root / _VERSIONS / path


def open_copy(note: Path, file: Path, version: str) -> IO[bytes] | None:
    """This node's copy of a file, where it is of this version; None otherwise.

    The content is hashed at a process's first use, and again when the copy has changed. Marks the copy as used now.
    """
    try:
        copy = file.open("rb")
    except FileNotFoundError:
        return None
    status = os.fstat(copy.fileno())
    if _noted_version(note, status) != version or not _is_of(copy, status, version):
        copy.close()
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(note)
    return copy


def is_noted(note: Path, file: Path, version: str) -> bool:
    """Whether this node's copy of a file is noted as of this version; its content is not read."""
    try:
        return _noted_version(note, file.stat()) == version
    except FileNotFoundError:
        return False


def is_whole(file: Path, sha256: str) -> bool:
    """Whether a file is there with this content, by :func:`holds`."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return holds(stream, sha256)


def holds(file: IO[bytes], sha256: str, anew: bool = False) -> bool:
    """Whether an open file has this content: hashed once a process, however many runs have links to it, and again when it has
    changed, or is to be read ``anew``."""
    status = os.fstat(file.fileno())
    with _turns[status.st_ino % len(_turns)]:
        if anew:
            _hashed.pop((sha256, status.st_dev, *_identity(status)), None)
        return _is_of(file, status, sha256)


def take_as_whole(file: Path, sha256: str) -> None:
    """Has :func:`holds` take a file that this process has just linked or written as it is now."""
    status = file.stat()
    known = sha256, status.st_dev, *_identity(status)
    _hashed[known] = status.st_ctime_ns, status.st_nlink


def _is_of(copy: IO[bytes], status: os.stat_result, version: str) -> bool:
    known, now = (version, status.st_dev, *_identity(status)), (status.st_ctime_ns, status.st_nlink)
    before = _hashed.get(known)
    # A link, by which another run has it too, or no more, changes the ctime as well.
    if before is None or (before[0] != now[0] and before[1] == now[1]):
        if digest_of(copy) != version:
            _hashed.pop(known, None)
            return False
        copy.seek(0)
    _hashed[known] = now
    return True


def check_owner(cache: Path) -> None:
    """Makes the folder of this node's copies, for this user alone; raises ConfigError where it cannot be made, or another could
    write there."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{cache}, for this node's copies of an object store, cannot be made ({error.strerror}): where the command is"
            " given, let EMLOC_RAY_CACHE name a place that every node has."
        ) from error
    status = cache.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(
            f"{cache}, for this node's copies of an object store, is not this user's alone: remove it, or let"
            " EMLOC_RAY_CACHE name another place where the command is given."
        )
    if status.st_mode & 0o077:
        cache.chmod(0o700)


def link_copy(root: Path, path: str, version: str) -> bool:
    """Makes the copy of the version that this node has at the same path under an earlier lease of the run the run's own, or,
    of weights and shards, in another run; whether it has one."""
    for other in root.parent.glob(f"{MARK}*"):
        shares = _uri(other) == _uri(root) or path.endswith(_NEVER_ALTERED)
        copy = open_copy(note_of(other, path), other / path, version) if shares and other != root else None
        if copy is None:
            continue
        with copy, contextlib.suppress(OSError), replacing(root / path, durable=False) as temporary:
            os.link(other / path, temporary)
            status = temporary.stat()
            if status.st_ino == os.fstat(copy.fileno()).st_ino:
                write_note(note_of(root, path), version, status)
                return True
    return False


def _uri(root: Path) -> str:
    """Where the run is, without its lease, quoted."""
    return root.name.partition("%23")[0]


def write_note(note: Path, version: str, status: os.stat_result) -> None:
    """Notes the version of the file of this status."""
    write_small(note, " ".join([version, *_identity(status)]).encode())


def _noted_version(note: Path, status: os.stat_result) -> str | None:
    """The version of the file of this status; None where nobody noted it, or another file has taken its place since."""
    try:
        noted = note.read_text().split()
    except FileNotFoundError:
        return None
    return noted[0] if noted[1:] == _identity(status) else None


def _identity(status: os.stat_result) -> list[str]:
    return [str(part) for part in (status.st_size, status.st_mtime_ns, status.st_ino)]


def write_small(path: Path, content: bytes) -> None:
    """Writes a file that appears whole; a crash of the machine may lose it."""
    with replacing(path, durable=False) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def alone(root: Path, key: str, waits: bool = True, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """One worker of a node at a time, but for who has waited for ``patience_s``: two that do the same do no harm. Raises
    BlockingIOError where it is another's turn and this one does not wait."""
    lock = _lock_of(root, key)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        if waits:
            wait_for_turn(lambda: holder_of(file), lambda: try_lock(file), f"is at {key} in {root}", patience_s)
        elif not try_lock(file):
            raise BlockingIOError(f"{lock} is another's")
        yield


def _lock_of(root: Path, key: str) -> Path:
    return root / _LOCKS / quote(key, safe="")[-_MAX_NAME:]


def make_room(root: Path, needed: int, kept_since: float = math.inf, written: int = 0) -> None:
    """Drops the copies that were used longest ago until the disk has room for ``needed`` bytes more and a share of it stays free,
    and all copies together take no more than ``EMLOC_RAY_CACHE_SIZE`` (such as 150GiB), where that is set. What was used in the
    last minutes stays, and since ``kept_since``, in s since 1970; so does what is no copy of what a store holds, but for what
    killed processes left. ``written``: bytes that were added since the last call."""
    cache = root.parent
    if _is_unswept(cache):
        with alone(cache, "room"):
            _sweep(cache)
    left = _allowance.get(cache, 0.0) - needed - written
    if left >= 0:
        _allowance[cache] = left
        return
    most, taken = _disk(root)
    if not os.environ.get(_SIZE_VARIABLE) and taken + needed <= most:
        return
    with alone(cache, "room"):
        limits, gained = _limits(root), 0
        missing = max(taken + needed - most for most, taken in limits)  # another worker may have made some
        if missing > 0:
            missing += int(_SPARE_SHARE * min(most for most, _ in limits))
            for used, owner, path in sorted(_copies(cache)):
                if gained >= missing or used >= min(time.time() - IN_USE_S, kept_since):
                    break
                gained += _drop(owner, path)
        _allowance[cache] = min(
            max((most - taken - needed + gained) / _PROCESSES, _LEAST_SHARE * most) for most, taken in limits
        )


def _limits(root: Path) -> list[tuple[int, int]]:
    """How many bytes there may be and are: on the disk and, where that is bounded, in all copies."""
    most = os.environ.get(_SIZE_VARIABLE)
    return [_disk(root), *([(_bytes(most), _held(root.parent))] if most else [])]


def _disk(root: Path) -> tuple[int, int]:
    disk = shutil.disk_usage(root)
    return disk.total - int(_FREE_SHARE * disk.total), disk.total - disk.free


def _is_unswept(cache: Path) -> bool:
    """Whether no process of this node has swept for an hour."""
    try:
        return (cache / _SWEPT).stat().st_mtime < time.time() - _SWEEP_S
    except FileNotFoundError:
        return True


def _sweep(cache: Path) -> None:
    """Removes what killed processes left: what is unfinished, and what a run had on this node alone, unchanged for a day; and
    the places of runs of which no file is left for as long."""
    if not _is_unswept(cache):  # another process was faster
        return
    (cache / _SWEPT).touch()
    left = [*cache.glob(f"{LOCAL}*"), *cache.glob(f".{LOCAL}*.tmp")]  # and those whose removal was killed
    for place in cache.glob(f"{MARK}*"):
        holds_files = False
        for folder, folders, names in os.walk(place):
            left += [Path(folder, name) for name in (*folders, *names) if name.endswith(".tmp")]
            top = Path(folder).relative_to(place).parts[:1]
            holds_files |= bool(names) and top not in ((_LOCKS,), (_VERSIONS,))
        left += [] if holds_files else [place]
    for path in left:
        below = [Path(folder, name) for folder, folders, names in os.walk(path) for name in (*folders, *names)]
        changed = 0.0
        for each in (path, *below):
            with contextlib.suppress(FileNotFoundError):
                changed = max(changed, each.lstat().st_mtime)
        if changed < time.time() - _LEFT_S:
            remove(path)


def _held(cache: Path) -> int:
    """Bytes of all copies; what several runs have linked counts once."""
    size_of: dict[int, int] = {}
    for _, owner, path in _copies(cache):
        with contextlib.suppress(FileNotFoundError):
            status = (owner / path).stat()
            size_of[status.st_ino] = status.st_size
    return sum(size_of.values())


@functools.cache
def _bytes(size: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError as error:
        raise ConfigError(f"{_SIZE_VARIABLE} is {size!r}: give a number and a unit, such as 150GiB.") from error


def _copies(cache: Path) -> Iterator[tuple[float, Path, str]]:
    """All copies of all runs on this node: when each was used last, its run's place, its path in that."""
    for versions in cache.glob(f"{MARK}*/{_VERSIONS}"):
        for folder, _, names in os.walk(versions):
            for note in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    yield note.stat().st_mtime, versions.parent, note.relative_to(versions).as_posix()


def _drop(root: Path, path: str) -> int:
    """Removes a copy, unless it is being fetched or is no copy any more; returns how many bytes that gave."""
    note, file = note_of(root, path), root / path
    with contextlib.suppress(FileNotFoundError, BlockingIOError), alone(root, path, waits=False):
        status = file.stat()
        if _noted_version(note, status) is not None:
            file.unlink()
            note.unlink()
            _lock_of(root, path).unlink(missing_ok=True)
            return status.st_size if status.st_nlink == 1 else 0
    return 0
