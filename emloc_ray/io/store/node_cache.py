"""A run on an object store as every node sees it: local paths that say which store they mirror.

A path below ``store=QUOTED-URI`` is this node's copy of what the store holds under the rest of the path, so that stages
exchange plain paths wherever the run is; ``store=QUOTED-URI%23NUMBER`` says under which lease, so that workers know whose they
are (:class:`ObjectStore`). In a run on a file system all functions here do nothing, or what their names
say to the file itself. Files at the run's top, which are small and change, lie under their own name in the store; all others
under keys that name their content (:class:`ObjectStore`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.store.digests import digest, noted_digest
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_copies import (
    LOCAL,
    MARK,
    alone,
    check_owner,
    is_noted,
    link_copy,
    make_room,
    note_of,
    open_copy,
    take_as_whole,
    write_note,
    write_small,
)
from emloc_ray.io.store.replacing import remove, replacing
from emloc_ray.io.store.shared import Shared

if TYPE_CHECKING:
    from emloc_ray.io.store.object_store import ObjectStore
    from emloc_ray.io.store.objects import Stored

_CONNECTIONS = 8
_MAX_NAME = 255
_LEASE_LETTERS = 13  # a # quoted and a number of ten digits
_SETTLED_S = 2.0  # a file that is altered sooner may keep its time
_DIGESTS = Shared[str](65536)


@dataclass(frozen=True)
class Origin:
    """What a path mirrors: ``path`` inside the run at ``store``; ``root`` is the run's own place on this node."""

    store: ObjectStore
    root: Path
    path: str

    @property
    def is_plain(self) -> bool:
        """Whether it lies under its own name."""
        return "/" not in self.path

    @property
    def note(self) -> Path:
        """Where this node notes which version its copy is."""
        return note_of(self.root, self.path)


@functools.lru_cache(maxsize=512)  # one for each task of a batch, and what they share
def _store(place: str) -> ObjectStore:
    from emloc_ray.io.store.object_store import ObjectStore  # obstore: no run on a file system needs it

    uri, _, lease = place.partition("#")
    return ObjectStore(uri, lease=int(lease) if lease else None)


def mirror(uri: str, lease: int | None = None) -> Path:
    """The place of a run at ``uri`` on every node, for the holder of the lease of this number: below ``EMLOC_RAY_CACHE``, or
    the directory for temporary files. Raises ConfigError where obstore cannot open it, or it is too long for the name of a
    directory."""
    if "#" in uri:
        raise ConfigError(f"run_dir {uri} holds a #, which is no part of a name: write it as %23.")
    folder = MARK + quote(_store(uri).uri + ("" if lease is None else f"#{lease}"), safe="")
    if len(folder) + (_LEASE_LETTERS if lease is None else 0) > _MAX_NAME:  # what is too long fails before it is held
        raise ConfigError(f"run_dir {uri} is longer than a directory's name may be: shorten it.")
    base = os.environ.get("EMLOC_RAY_CACHE") or tempfile.gettempdir()
    return Path(base).absolute() / f"emloc_ray-{os.geteuid()}" / folder


def origin(path: Path) -> Origin | None:
    """What ``path`` mirrors; None for a path of a file system."""
    for number, part in enumerate(path.parts):
        if _is_mirror(part):
            root = Path(*path.parts[: number + 1])
            _check_owner(root.parent)
            return Origin(_store(unquote(part.removeprefix(MARK))), root, "/".join(path.parts[number + 1 :]))
    return None


def _is_mirror(part: str) -> bool:
    return part.startswith(MARK) and "://" in unquote(part)


_check_owner = functools.lru_cache(maxsize=16)(check_owner)  # once a process


def publish(path: Path, *, whole: bool = False) -> None:
    """Uploads a file, or all files below a directory, to the store that it mirrors.

    With ``whole``, where nobody will append to it, this node keeps it like a fetched file: until it needs the space.
    """
    here = origin(path)
    # What is unfinished has its own name only when it is whole.
    if here is None or _is_unfinished(here.path) or publish_plain(path, path):
        return
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(lambda file: _publish_file(file, whole), _files(path) if path.is_dir() else [path]))


def publish_plain(path: Path, written: Path) -> bool:
    """Gives what was ``written`` for ``path`` to the store, where that is a file under its own name there; whether it is."""
    here = origin(path)
    if here is None or not here.is_plain or not written.is_file():
        return False
    if not _is_unfinished(here.path):
        here.store.write_held(here.path, written.read_bytes())
    return True


def _publish_file(file: Path, whole: bool) -> None:
    here, status = origin(file), file.stat()
    assert here is not None
    version = here.store.add_version(here.path, file, None, noted_digest(file))
    if whole:
        write_note(here.note, version, status)
        make_room(here.root, 0, kept_since=status.st_mtime, written=status.st_size)


def ensure(path: Path, *, weights: bool = True) -> None:
    """Makes a file, or all files below a directory, present and current on this node; but for safetensors without ``weights``.
    Raises ArtifactError where the store cannot be read, or a file's content is not what its key names."""
    here = origin(path)
    if here is None:
        return
    if here.is_plain and (content := here.store.read(here.path)) is not None:
        write_small(path, content)
        return
    current = _stored(here, path)
    for file in _files(path):
        if file not in current and not _is_unfinished(file.relative_to(here.root).as_posix()):
            file.unlink(missing_ok=True)  # a copy of what is no more
    wanted = {file: info for file, info in current.items() if weights or file.suffix != ".safetensors"}
    begun = time.time()  # what this call has fetched stays, however long it takes
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(lambda file: _ensure_file(file, wanted[file], begun), wanted))


class ListedFiles:
    """The files below a folder that is finished: a store is asked once which there are."""

    def __init__(self, folder: Path) -> None:
        here = origin(folder)
        self._stored = None if here is None else _stored(here, folder)

    def __contains__(self, file: Path) -> bool:
        return file.is_file() if self._stored is None else file in self._stored

    def version(self, file: Path) -> Stored | None:
        """What the store holds of one of them; None where it holds none, or there is no store."""
        return None if self._stored is None else self._stored.get(file)

    def ensure(self, file: Path) -> None:
        """Makes one of them present on this node; raises what :func:`ensure` raises, FileNotFoundError where it is gone since."""
        if self._stored is None:
            return
        info = self.version(file)
        if info is None:
            file.unlink(missing_ok=True)  # a copy of what is no more
        else:
            _ensure_file(file, info, time.time())


def _ensure_file(file: Path, info: Stored, begun: float) -> None:
    here = origin(file)
    assert here is not None
    # A node's workers hash a copy side by side: no lock is held. The second look hashes what another worker has fetched
    # meanwhile. A copy that is damaged is fetched again.
    for is_second in (False, True):
        copy = open_copy(here.note, file, info.sha256)
        if copy is not None:
            copy.close()
            return
        with alone(here.root, here.path):  # one download serves all workers of a node
            if is_second or not is_noted(here.note, file, info.sha256):
                _fetch(here, file, info, begun)


def _fetch(here: Origin, file: Path, info: Stored, begun: float) -> None:
    # One download serves all runs too, by 256 locks for whatever they fetch.
    with alone(here.root.parent, info.sha256[:2]):
        if not link_copy(here.root, here.path, info.sha256):
            make_room(here.root, info.size, begun)
            with replacing(file, durable=False) as temporary:
                here.store.download(info, temporary)
                status = temporary.stat()
            write_note(here.note, info.sha256, status)
            take_as_whole(file, info.sha256)


@contextlib.contextmanager
def open_newest(path: Path, listed: ListedFiles | None = None) -> Iterator[tuple[IO[bytes], int, str | None]]:
    """A file, its size and version (None in a file system), to read some of it: from this node where it is current here, else
    by ranges from the store. ``listed``: the files of its folder, which spare the store a request. Raises FileNotFoundError
    where there is none."""
    here = origin(path)
    if here is None:
        with _open_here(path) as file:
            yield file, os.fstat(file.fileno()).st_size, None
        return
    info = here.store.versions(here.path).get("") if listed is None else listed.version(path)
    if info is None:
        raise FileNotFoundError(f"{here.store.uri} holds no {here.path}")
    with open_copy(here.note, path, info.sha256) or here.store.open(info) as stream:
        yield stream, info.size, info.sha256  # type: ignore[misc]


def _open_here(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        _look_anew(path)
        return path.open("rb")


def open_version(path: Path, version: str | None) -> IO[bytes]:
    """A file as :func:`open_newest` found it, from this node, fetched where another version is here or none. Raises
    FileNotFoundError where there is none in a file system, ArtifactError where the store holds another version by now, or none.
    """
    here = origin(path)
    if here is None or version is None:
        return path.open("rb")
    copy = open_copy(here.note, path, version)
    if copy is None:
        ensure(path)
        copy = open_copy(here.note, path, version)
    if copy is None:
        raise ArtifactError(replaced(path))
    return copy


def replaced(path: Path) -> str:
    """What is said of a file whose version that was read is no longer there."""
    return f"{path} was removed or written anew while it was read: run the same command again."


def exists(path: Path) -> bool:
    """Whether a file is there for all nodes."""
    here = origin(path)
    if here is None:
        if not path.is_file():
            _look_anew(path)
        return path.is_file()
    return here.store.read(here.path) is not None if here.is_plain else "" in here.store.versions(here.path)


def existing(files: Sequence[Path]) -> set[Path]:
    """Those of some files, in the folder of the first or below, that are there for all nodes, by one listing."""
    return set(files) & sizes(files[0].parent).keys() if files else set()


def _look_anew(path: Path) -> None:
    """Has NFS ask its server for a file that it takes for absent, which it does for up to a minute after it once was: it asks
    when a folder is opened (``lookupcache`` in nfs(5))."""
    for folder in reversed(path.parents[:3]):
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def is_stored(path: Path) -> bool:
    """Whether a path mirrors a store."""
    return origin(path) is not None


def local_only(path: Path) -> Path:
    """A place like ``path`` that the store never sees, for what is worth less than its way there and back."""
    parts = [part.replace(MARK, LOCAL, 1).partition("%23")[0] if _is_mirror(part) else part for part in path.parts]
    return Path(*parts)


def hashes(path: Path, known: Mapping[Path, str] | None = None) -> dict[Path, str]:
    """The files below a directory, or a file itself, as all nodes see them, with the SHA-256 of their content, but for what
    is not finished, as what a worker writes that was given up. A file that :func:`emloc_ray.io.store.atomic.atomic_file` wrote
    is not read for it again, nor is one that is ``known``."""
    here = origin(path)
    if here is not None:
        return {file: info.sha256 for file, info in _stored(here, path).items()}
    known = known or {}
    files = (file for file in sizes(path) if not _is_unfinished(file.relative_to(path).as_posix()))
    return {file: known.get(file) or _known_digest(file) for file in files}


def _known_digest(path: Path) -> str:
    """The SHA-256 of a file's content, as noted with it. Where nothing is, as on NFS before 4.2, the file is read, once a process
    for all runs that link it."""
    if (noted := noted_digest(path)) is not None:
        return noted
    status = path.stat()
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns  # a link changes the ctime
    settled = time.time() - status.st_mtime > _SETTLED_S and status.st_uid == os.geteuid()
    return _DIGESTS.get(key, lambda: digest(path), keeps=lambda sha256: settled)


def sizes(path: Path) -> dict[Path, int]:
    """The files below a directory, or a file itself, as all nodes see them, with their sizes."""
    here = origin(path)
    if here is not None:
        return {file: info.size for file, info in _stored(here, path).items()}
    file_sizes = {}
    for file in _files(path):
        with contextlib.suppress(FileNotFoundError):  # what another process renames or removes at this moment
            file_sizes[file] = file.stat().st_size
    return file_sizes


def forget(path: Path) -> None:
    """Removes a file or directory from the store that it mirrors; this node's copy stays."""
    here = origin(path)
    if here is not None:
        here.store.remove(here.path)


def discard(path: Path) -> None:
    """Removes a file or directory, for all nodes. Raises TakenOver where that lies in a run that another process has taken."""
    check_lock(path)
    forget(path)
    remove(path)


def _stored(here: Origin, path: Path) -> dict[Path, Any]:
    """The files below a path, or itself, that the store holds."""
    return {path / name if name else path: info for name, info in sorted(here.store.versions(here.path).items())}


def _files(path: Path) -> list[Path]:
    """As they are found: what another process removes meanwhile is left out."""
    below = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    return sorted(file for file in below if file.is_file())


def _is_unfinished(path: str) -> bool:
    """Whether it is on its way to its own name, or was removed: NFS keeps what a process still holds open as ``.nfs…``."""
    return any(part.endswith(".tmp") or part.startswith(".nfs") for part in path.split("/"))
