"""A run's folder on an object store as a pyarrow file system, which Ray Train puts a group's checkpoints into.

Everything lies below a folder named by the lease's number: the group of a process that another has followed writes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from emloc_ray.io.store.node_cache import origin
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import ObjectFile, Stored

_WHOLE = "whole-"  # whole-3 is there once folder 3 has all that the holder before had


def arrow_files(path: Path) -> tuple[PyFileSystem, str] | None:
    """The file system and the path in it of a folder that mirrors a store; None in a file system. What the holder before had
    there is copied first (:meth:`ObjectStore.copy`), where this one has nothing yet; of a holder that was killed while it
    copied, what the one before that had."""
    here = origin(path)
    if here is None:
        return None
    store, name = here.store, str(here.store.lease or 0)
    whole = {mark.removeprefix(_WHOLE) for mark in store.names(here.path) if mark.startswith(_WHOLE)}
    if name not in whole:
        earlier = max((number for number in whole if int(number) < int(name)), key=int, default=None)
        if earlier is not None:
            _copy(store, f"{here.path}/{earlier}", f"{here.path}/{name}")
        store.write(f"{here.path}/{_WHOLE}{name}", b"")
    return PyFileSystem(StoreFiles(store.uri, store.lease)), f"{here.path}/{name}"


def _copy(store: ObjectStore, source: str, target: str) -> None:
    """Last of all the files that say which checkpoints there are."""
    for stored in sorted(store.below(source), key=lambda stored: (-stored.path.count("/"), stored.path)):
        store.copy(stored, store.key(target + stored.path.removeprefix(source)))


class StoreFiles(FileSystemHandler):  # type: ignore[misc]
    """What pyarrow asks of a file system, by :class:`ObjectStore`; paths are those inside the run. Raises TakenOver where
    something is to be written and another process holds the run by now."""

    def __init__(self, uri: str, lease: int | None) -> None:
        self.store = ObjectStore(uri, lease=lease)

    def __reduce__(self) -> tuple[Callable[..., StoreFiles], tuple[str, int | None]]:
        return StoreFiles, (self.store.uri, self.store.lease)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreFiles) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.__reduce__())

    def get_type_name(self) -> str:
        """Its name in pyarrow's messages."""
        return "emloc_ray"

    def normalize_path(self, path: str) -> str:
        """A path as all methods here take it."""
        return path.strip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """What lies under each path."""
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> FileInfo:
        stored = self.store.find(path)
        if stored is not None:
            return _of_file(stored)
        return FileInfo(path, FileType.Directory if self.store.below(path) else FileType.NotFound)

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """What lies in a folder, its folders too."""
        base = selector.base_dir.strip("/")
        objects = self.store.below(base)
        if not objects and not selector.allow_not_found:
            raise FileNotFoundError(base)
        folders = {
            "/".join(parts[:depth])
            for parts in (stored.path.split("/") for stored in objects)
            for depth in range(base.count("/") + 2, len(parts))
        }
        infos = [*map(_of_file, objects), *(FileInfo(folder, FileType.Directory) for folder in sorted(folders))]
        depth = base.count("/") + 1
        return [info for info in infos if selector.recursive or info.path.count("/") == depth]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Folders are there with what is in them."""

    def delete_dir(self, path: str) -> None:
        """Removes a file, or all that is in a folder."""
        self.store.remove(path)

    delete_file = delete_dir

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """All that is in a folder: nothing else is there of it."""
        self.store.remove(path)

    def delete_root_dir_contents(self) -> None:
        """Never: it would be the run."""
        raise NotImplementedError

    def move(self, src: str, dest: str) -> None:
        """Copied, then removed."""
        self.copy_file(src, dest)
        self.store.remove(src)

    def copy_file(self, src: str, dest: str) -> None:
        """By :meth:`ObjectStore.copy`."""
        self.store.checked_manifest()
        self.store.copy(self._existing(src), self.store.key(dest))

    def open_input_stream(self, path: str) -> Any:
        """To read."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        """To read by ranges."""
        return pa.PythonFile(ObjectFile(self.store, self._existing(path)), mode="r")

    def _existing(self, path: str) -> Stored:
        stored = self.store.find(path)
        if stored is None:
            raise FileNotFoundError(path)
        return stored

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """To write; it appears whole."""
        self.store.checked_manifest()
        return pa.PythonFile(_Writer(obstore.open_writer(self.store.client, self.store.key(path))), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Objects do not grow."""
        raise NotImplementedError


class _Writer:
    """obstore's writer, which takes bytes alone."""

    closed = False

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, data: Any) -> int:
        self._writer.write(bytes(data))
        return len(data)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._writer.close()


def _of_file(stored: Stored) -> FileInfo:
    return FileInfo(stored.path, FileType.File, size=stored.size, mtime_ns=int(stored.modified * 1e9))
