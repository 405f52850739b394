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

from emloc_ray.errors import ConfigError
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

    def version_file(self, path: str) -> Path:
        """Where this node notes which version of a file it holds."""
        return self.root / _VERSIONS / path


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
    if here is None or any(part.endswith(".tmp") for part in path.parts):  # it has its own name only when it is whole
        return
    if here.is_plain and path.is_file():
        here.store.write(here.path, path.read_bytes())
        return
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(_publish_file, files))


def _publish_file(file: Path) -> None:
    here = origin(file)
    assert here is not None
    _note_version(here, here.path, here.store.add_version(here.path, file))


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
    found = here.store.versions(here.path)
    if "" not in found and path.is_file():
        path.unlink()  # a copy of what is no more
    wanted = {name: info for name, info in found.items() if weights or not name.endswith(".safetensors")}
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(lambda item: _ensure_file(here, path / item[0] if item[0] else path, item[1]), wanted.items()))


def _ensure_file(here: Origin, file: Path, info: Any) -> None:
    key = file.relative_to(here.root).as_posix()
    with _alone(here.root, key):  # one download serves all workers of a node
        if file.is_file() and _version(here, key) == info.base_name:
            os.utime(file)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(here.root, info.size)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
        os.close(handle)
        try:
            here.store.download(info, Path(temporary))
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _note_version(here, key, info.base_name)


@contextlib.contextmanager
def open_artifact(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A file and its size, to read some of it: from this node where it is current here, else by ranges from the store.

    Raises:
        FileNotFoundError: where there is none.
    """
    here = origin(path)
    info = None if here is None else here.store.versions(here.path).get("")
    if here is not None and info is not None and _version(here, here.path) != info.base_name:
        path.unlink(missing_ok=True)
    if here is None or (info is not None and path.is_file()):
        with path.open("rb") as stream:
            yield stream, path.stat().st_size
        return
    if info is None:
        raise FileNotFoundError(f"{here.store.uri} holds no {here.path}")
    with here.store.open(info) as remote:
        yield remote, info.size


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
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {file: file.stat().st_size for file in files if file.is_file()}


def discard(path: Path) -> None:
    """Removes a file or directory, for all nodes."""
    here = origin(path)
    if here is not None:
        here.store.remove(here.path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _version(here: Origin, key: str) -> str | None:
    file = here.version_file(key)
    return file.read_text() if file.is_file() else None


def _note_version(here: Origin, key: str, version: str) -> None:
    note = here.version_file(key)
    note.parent.mkdir(parents=True, exist_ok=True)
    _replace(note, version.encode())


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
