"""An object store that holds a run: files under immutable keys that name their content, a lease, bounded retries."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import pyarrow.fs

from emloc_ray.errors import ArtifactError, ConfigError, DamagedArtifactError
from emloc_ray.io.store.digests import digest

_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.5
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Of a URI's query, as pyarrow reads them: https://arrow.apache.org/docs/python/filesystems.html#connecting-to-s3
_S3_OPTIONS = {"region", "scheme", "endpoint_override", "anonymous", "force_virtual_addressing"}
# What the names of options that carry a secret hold, in pyarrow's URIs of any store.
_SECRET_OPTIONS = ("key", "secret", "token", "password", "sig")
Result = TypeVar("Result")


def is_store_uri(place: str) -> bool:
    """Whether a run's place is on an object store, not in a file system."""
    return "://" in place and not place.startswith("file://")


def below(place: str, *parts: str) -> str:
    """A place inside another, with "/" between; the query of an object store's URI stays at its end."""
    path, mark, query = place.partition("?") if is_store_uri(place) else (place, "", "")
    return "/".join((path.rstrip("/"), *parts)) + mark + query


def open_filesystem(uri: str, key: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system that a URI names and the path in it, without the slashes around it.

    Raises:
        ConfigError: naming the config's ``key``, where the URI holds credentials or pyarrow cannot open it.
    """
    try:
        parts = urlsplit(uri)
        options = dict(parse_qsl(parts.query))
        secret = any(word in option.lower() for option in options for word in _SECRET_OPTIONS)
        if not (parts.username or parts.password or secret):
            return _s3(parts, options) if parts.scheme == "s3" else _any(uri)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"{key} {uri} is no place that pyarrow can open ({detail}): name another.") from error
    raise ConfigError(f"{key} holds credentials: leave them out, and give them to the nodes as their environment.")


def _any(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    filesystem, base = pyarrow.fs.FileSystem.from_uri(uri)
    return filesystem, base.strip("/")


def _s3(parts: SplitResult, options: dict[str, str]) -> tuple[pyarrow.fs.FileSystem, str]:
    unknown = options.keys() - _S3_OPTIONS
    if unknown:
        raise ValueError(f"unknown option {min(unknown)}; there are {', '.join(sorted(_S3_OPTIONS))}")
    flags = {key: value == "true" for key, value in options.items() if key in ("anonymous", "force_virtual_addressing")}
    filesystem = pyarrow.fs.S3FileSystem(
        **{**options, **flags},
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=5),
        connect_timeout=10,
        request_timeout=60,
    )
    return filesystem, f"{parts.netloc}/{parts.path.strip('/')}".strip("/")


class ObjectStore:
    """What lies under one URI that pyarrow.fs opens; a path's versions are the objects ``PATH/SHA256``.

    Every call is tried a few times, with growing pauses: stores answer 503 when they are busy, and connections break.

    Raises:
        ConfigError: naming the config's ``key``, where the URI holds credentials or pyarrow cannot open it.
    """

    def __init__(self, uri: str, key: str = "run_dir") -> None:
        self.uri = uri.rstrip("/")
        self.filesystem, self.base = open_filesystem(self.uri, key)
        parts = urlsplit(self.uri)
        self.options = dict(parse_qsl(parts.query))
        self.scheme = parts.scheme
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")

    def key(self, path: str) -> str:
        """The full key of a path inside the run."""
        return f"{self.base}/{path}" if path else self.base

    def versions(self, path: str) -> dict[str, pyarrow.fs.FileInfo]:
        """The objects of a file, or of all files below a directory, by the file's path from ``path`` on ("": itself).

        A file has one, but for the moment in which it is replaced: then the newer counts.
        """
        found: dict[str, pyarrow.fs.FileInfo] = {}
        start = len(self.key(path))
        for info in self.below(path):
            if len(info.base_name) != 64:
                continue
            name = info.path[start:].rpartition("/")[0].strip("/")
            if name not in found or info.mtime_ns >= found[name].mtime_ns:
                found[name] = info
        return found

    def below(self, path: str = "") -> list[pyarrow.fs.FileInfo]:
        """All objects below a path, whatever their names."""
        selector = pyarrow.fs.FileSelector(self.key(path), recursive=True, allow_not_found=True)
        found = self._trying(lambda: self.filesystem.get_file_info(selector), "list", path)
        return [info for info in found if info.type == pyarrow.fs.FileType.File]

    def names(self) -> list[str]:
        """What lies directly under the URI."""
        selector = pyarrow.fs.FileSelector(self.base, allow_not_found=True)
        return [info.base_name for info in self._trying(lambda: self.filesystem.get_file_info(selector), "list", "")]

    def add_version(self, path: str, file: Path) -> str:
        """Puts a file's content as the version of ``path`` and takes the earlier one away; returns its SHA-256."""
        sha, size = digest(file), file.stat().st_size
        earlier = [info for info in self._objects(path) if info.base_name != sha]
        present = [info for info in self._objects(path) if info.base_name == sha and info.size == size]
        if not present:
            key = self.key(f"{path}/{sha}")
            self._trying(lambda: self._upload(file, key), "write", path)
        for info in earlier:
            with contextlib.suppress(FileNotFoundError):
                self._trying(lambda info=info: self.filesystem.delete_file(info.path), "remove", path)  # type: ignore[misc]
        return sha

    def _objects(self, path: str) -> list[pyarrow.fs.FileInfo]:
        selector = pyarrow.fs.FileSelector(self.key(path), allow_not_found=True)
        found = self._trying(lambda: self.filesystem.get_file_info(selector), "list", path)
        return [info for info in found if info.type == pyarrow.fs.FileType.File]

    def _upload(self, file: Path, key: str) -> None:
        # Where the copy breaks off, the parts of it are dropped: a stream closed by an exception would commit them.
        pyarrow.fs.copy_files(
            str(file), key, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=self.filesystem
        )
        found = self.filesystem.get_file_info(key)
        if found.size != file.stat().st_size:
            raise OSError(f"{found.size} of {file.stat().st_size} bytes arrived")

    def download(self, info: pyarrow.fs.FileInfo, target: Path) -> None:
        """Copies an object to ``target``; raises DamagedArtifactError where its content is not what its key names, OSError
        where the disk is full."""

        def copy() -> None:
            try:
                pyarrow.fs.copy_files(
                    info.path,
                    str(target),
                    source_filesystem=self.filesystem,
                    destination_filesystem=pyarrow.fs.LocalFileSystem(),
                )
            except OSError as error:
                if error.errno in _FULL:
                    raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
                raise

        self._trying(copy, "read", info.path)
        if digest(target) != info.base_name:
            path = info.path.removeprefix(f"{self.base}/").rpartition("/")[0]
            raise DamagedArtifactError(
                f"{path} in {self.uri} is cut short or altered: run the same command again.", path
            )

    def open(self, info: pyarrow.fs.FileInfo) -> Any:
        """An object as a file that is read by ranges."""
        return self._trying(lambda: self.filesystem.open_input_file(info.path), "read", info.path)

    def write(self, path: str, content: bytes) -> None:
        """Puts a small object under a key of its own name: whole or not at all."""

        def put() -> None:
            with self.filesystem.open_output_stream(self.key(path)) as stream:
                stream.write(content)

        self._trying(put, "write", path)

    def read(self, path: str) -> bytes | None:
        """A small object's content; None where there is none."""

        def get() -> bytes:
            with self.filesystem.open_input_stream(self.key(path)) as stream:
                content: bytes = stream.read()
                return content

        try:
            return self._trying(get, "read", path)
        except FileNotFoundError:
            return None

    def status(self, path: str) -> pyarrow.fs.FileInfo:
        """What lies under a path's own name: a file, a directory or nothing."""
        return self._trying(lambda: self.filesystem.get_file_info(self.key(path)), "list", path)

    def files(self, path: str, recursive: bool = True) -> list[str]:
        """The paths of the files in a directory and, where ``recursive``, in all below it: whatever their names."""
        selector = pyarrow.fs.FileSelector(self.key(path), recursive=recursive, allow_not_found=True)
        found = self._trying(lambda: self.filesystem.get_file_info(selector), "list", path)
        start = f"{self.base}/" if self.base else ""
        return [info.path.strip("/").removeprefix(start) for info in found if info.type == pyarrow.fs.FileType.File]

    def open_named(self, path: str) -> Any:
        """The object under a path's own name, to read by :meth:`read_range`."""
        return self._trying(lambda: self.filesystem.open_input_file(self.key(path)), "read", path)

    def read_range(self, file: Any, path: str, offset: int, count: int) -> bytes:
        """The ``count`` bytes from ``offset`` on of what :meth:`open_named` gave, fewer at its end alone."""

        def get() -> bytes:
            content: bytes = file.read_at(count, offset)
            expected = max(0, min(count, file.size() - offset))
            if len(content) != expected:
                raise OSError(f"{len(content)} of {expected} bytes arrived")
            return content

        return self._trying(get, "read", path)

    def remove(self, path: str) -> None:
        """Removes a file or a directory with all that is in it."""
        key = self.key(path)
        for delete in (self.filesystem.delete_dir, self.filesystem.delete_file):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._trying(functools.partial(self._delete, delete, key), "remove", path)

    def _delete(self, delete: Callable[[str], None], key: str) -> None:
        kind = pyarrow.fs.FileType.Directory if delete == self.filesystem.delete_dir else pyarrow.fs.FileType.File
        if self.filesystem.get_file_info(key).type == kind:
            delete(key)

    def _trying(self, call: Callable[[], Result], what: str, path: str) -> Result:
        """Raises ArtifactError where the last try fails too; what is not there, or a full disk, is told at once."""
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in _FULL:  # this node's disk: the store does not answer so
                    raise
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(_FIRST_PAUSE_S * 2**attempt)
                    continue
                detail = " ".join(str(error).split())[:200]
                raise ArtifactError(
                    f"{self.uri} does not {what} {path or 'anything'} ({detail}): see that the store can be reached and its"
                    " credentials are valid, then run the same command again."
                ) from error
        raise AssertionError
