"""A run on an object store as every node sees it: local paths that say which store they mirror.

A path below ``store=QUOTED-URI`` is this node's copy of what the store holds under the rest of the path, so that stages
exchange plain paths wherever the run is. In a run on a file system all functions here do nothing, or what their names
say to the file itself. Files at the run's top, which are small and change, lie under their own name in the store; all others
under keys that name their content (:class:`ObjectStore`).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.digests import digest, noted_digest
from emloc_ray.io.object_store import ObjectStore

_MARK = "store="
_VERSIONS = ".versions"
_CONNECTIONS = 8
# The cache may fill the node's disk but for this share of it; what was used in the last minutes stays.
_FREE_SHARE = 0.1
_IN_USE_S = 600.0
_MAX_NAME = 255


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
        """Where this node notes which version its copy is, when that was last used, and what tells it from other files."""
        return self.root / _VERSIONS / self.path


@functools.lru_cache(maxsize=16)
def _store(uri: str) -> ObjectStore:
    return ObjectStore(uri)


def mirror(uri: str) -> Path:
    """The place of a run at ``uri`` on every node: below ``EMLOC_RAY_CACHE``, or the directory for temporary files.

    Raises:
        ConfigError: where pyarrow cannot open it, or it is too long for the name of a directory.
    """
    folder = _MARK + quote(_store(uri).uri, safe="")
    if len(folder) > _MAX_NAME:
        raise ConfigError(f"run_dir {uri} is longer than a directory's name may be: shorten it.")
    base = os.environ.get("EMLOC_RAY_CACHE") or str(Path(tempfile.gettempdir()) / "emloc_ray")
    return Path(base).absolute() / folder


def origin(path: Path) -> Origin | None:
    """What ``path`` mirrors; None for a path of a file system."""
    for number, part in enumerate(path.parts):
        if part.startswith(_MARK):
            root = Path(*path.parts[: number + 1])
            return Origin(_store(unquote(part.removeprefix(_MARK))), root, "/".join(path.parts[number + 1 :]))
    return None


def publish(path: Path) -> None:
    """Gives a file, or all files below a directory, to the store that it mirrors."""
    here = origin(path)
    if here is None or _is_unfinished(path):  # it has its own name only when it is whole
        return
    if here.is_plain and path.is_file():
        here.store.write(here.path, path.read_bytes())
        return
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(_publish_file, _files(path) if path.is_dir() else [path]))


def _publish_file(file: Path) -> None:
    here, status = origin(file), file.stat()
    assert here is not None
    _write_note(here, here.store.add_version(here.path, file), status)


def ensure(path: Path, *, weights: bool = True) -> None:
    """Makes a file, or all files below a directory, present and current on this node; but for safetensors without ``weights``.

    Raises:
        ArtifactError: where the store cannot be read, or a file's content is not what its key names.
    """
    here = origin(path)
    if here is None:
        return
    if here.is_plain and (content := here.store.read(here.path)) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
        return
    found = {path / name if name else path: info for name, info in here.store.versions(here.path).items()}
    for file in _files(path):
        if file not in found and not _is_unfinished(file):
            file.unlink(missing_ok=True)  # a copy of what is no more
    wanted = {file: info for file, info in found.items() if weights or file.suffix != ".safetensors"}
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(_ensure_file, wanted.keys(), wanted.values()))


def _ensure_file(file: Path, info: Any) -> None:
    here = origin(file)
    assert here is not None
    with _alone(here.root, here.path):  # one download serves all workers of a node
        copy = _open_copy(here, file, info.base_name)
        if copy is not None:
            copy.close()
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(here.root, info.size)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        os.close(handle)
        try:
            here.store.download(info, Path(temporary))
            status = os.stat(temporary)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _write_note(here, info.base_name, status)


@contextlib.contextmanager
def open_artifact(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A file and its size, to read some of it: from this node where it is current here, else by ranges from the store.

    Raises:
        FileNotFoundError: where there is none.
    """
    with open_newest(path) as (stream, size, _):
        yield stream, size


@contextlib.contextmanager
def open_newest(path: Path) -> Iterator[tuple[IO[bytes], int, str | None]]:
    """As :func:`open_artifact`, with the version that it is: None in a file system."""
    here = origin(path)
    if here is None:
        with path.open("rb") as stream:
            yield stream, path.stat().st_size, None
        return
    info = here.store.versions(here.path).get("")
    if info is None:
        raise FileNotFoundError(f"{here.store.uri} holds no {here.path}")
    with _open_copy(here, path, info.base_name) or here.store.open(info) as stream:
        yield stream, info.size, info.base_name


def open_version(path: Path, version: str | None) -> IO[bytes]:
    """A file as :func:`open_newest` found it, from this node, fetched where another version is here or none.

    Raises:
        FileNotFoundError: where there is none in a file system.
        ArtifactError: where the store holds another version by now, or none.
    """
    here = origin(path)
    if here is None or version is None:
        return path.open("rb")
    copy = _open_copy(here, path, version)
    if copy is None:
        ensure(path)
        copy = _open_copy(here, path, version)
    if copy is None:
        raise ArtifactError(f"{path} was removed or written anew while it was read: run the same command again.")
    return copy


def exists(path: Path) -> bool:
    """Whether a file is there for all nodes."""
    here = origin(path)
    if here is None:
        return path.is_file()
    return here.store.read(here.path) is not None if here.is_plain else "" in here.store.versions(here.path)


def remote(path: Path) -> tuple[Any, str] | None:
    """The pyarrow file system of the store that ``path`` mirrors, and the path's key in it; None in a file system."""
    here = origin(path)
    return None if here is None else (here.store.filesystem, here.store.key(here.path))


def local_only(path: Path) -> Path:
    """A place like ``path`` that the store never sees, for what is worth less than its way there and back."""
    parts = [part.replace(_MARK, "local=", 1) if part.startswith(_MARK) else part for part in path.parts]
    return Path(*parts)


def hashes(path: Path) -> dict[Path, str]:
    """The files below a directory, or a file itself, as all nodes see them, with the SHA-256 of their content.

    A file that :func:`emloc_ray.io.atomic.atomic_file` wrote is not read for it again.
    """
    here = origin(path)
    if here is not None:
        found = here.store.versions(here.path)
        return {path / name if name else path: info.base_name for name, info in sorted(found.items())}
    return {file: noted_digest(file) or digest(file) for file in sizes(path)}


def sizes(path: Path) -> dict[Path, int]:
    """The files below a directory, or a file itself, as all nodes see them, with their sizes."""
    here = origin(path)
    if here is not None:
        return {
            path / name if name else path: info.size for name, info in sorted(here.store.versions(here.path).items())
        }
    return {file: file.stat().st_size for file in _files(path)}


def discard(path: Path) -> None:
    """Removes a file or directory, for all nodes."""
    here = origin(path)
    if here is not None:
        here.store.remove(here.path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _files(path: Path) -> list[Path]:
    below = path.rglob("*") if path.is_dir() else [path]
    return sorted(file for file in below if file.is_file())


def _is_unfinished(path: Path) -> bool:
    return any(part.endswith(".tmp") for part in path.parts)


def _open_copy(here: Origin, path: Path, version: str) -> IO[bytes] | None:
    """This node's copy of a file, where it is of this version; it counts as used now."""
    try:
        copy = path.open("rb")
    except FileNotFoundError:
        return None
    if _noted_version(here.note, os.fstat(copy.fileno())) != version:
        copy.close()
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(here.note)
    return copy


def _write_note(here: Origin, version: str, status: os.stat_result) -> None:
    here.note.parent.mkdir(parents=True, exist_ok=True)
    _replace(here.note, " ".join([version, *_identity(status)]).encode())


def _noted_version(note: Path, status: os.stat_result) -> str | None:
    """The version of the file of this status; None where nobody noted it, or another file has taken its place since."""
    try:
        noted = note.read_text().split()
    except FileNotFoundError:
        return None
    return noted[0] if noted[1:] == _identity(status) else None


def _identity(status: os.stat_result) -> list[str]:
    return [str(part) for part in (status.st_size, status.st_mtime_ns, status.st_ino)]


def _replace(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


@contextlib.contextmanager
def _alone(root: Path, key: str) -> Iterator[None]:
    lock = root / ".locks" / quote(key, safe="")[-_MAX_NAME:]
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(root: Path, needed: int) -> None:
    """Drops the copies that were used longest ago until the disk has room for a file and a share of it stays free."""
    disk = shutil.disk_usage(root)
    missing = needed + int(_FREE_SHARE * disk.total) - disk.free
    if missing <= 0:
        return
    held = [(file.stat().st_mtime, file) for file in root.parent.rglob("*") if file.is_file() and file.suffix != ".tmp"]
    for used, file in sorted(held):
        if missing <= 0 or used > time.time() - _IN_USE_S:
            return
        if _VERSIONS not in file.parts:
            missing -= file.stat().st_size
            file.unlink(missing_ok=True)
