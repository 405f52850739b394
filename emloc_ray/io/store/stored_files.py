"""Files of others on an object store, such as a user's data: found by pattern, read by ranges under their own names.

A URI is read as pyarrow reads it: ``%`` escapes what is not to be taken for a part of it, and options follow a ``?``.
"""

from __future__ import annotations

import fnmatch
import functools
import io
import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow.fs

from emloc_ray.errors import ConfigError
from emloc_ray.io.store.object_store import ObjectStore, is_store_uri

_MAGIC = re.compile(r"[*?[]")
_ESCAPED = re.compile(r"[%?#\x00-\x1f]")


def find_stored(pattern: str, key: str, suffixes: Collection[str]) -> list[str]:
    """The URIs of the file, the files of the glob, or the files below the directory with ``suffixes``, that a URI names.

    A glob is read as ``glob.glob(recursive=True)`` reads it, but for ``?``, which has to be ``%3F``. The order is that of
    sorted :class:`pathlib.Path` s.

    Raises:
        ConfigError: naming the config's ``key``, where the URI holds credentials or pyarrow cannot open it.
        ArtifactError: where the store does not answer.
    """
    store, path = _place(pattern, key)
    try:
        found = _matching_files(store, path, suffixes)
    except ValueError as error:  # no name that a store can have
        raise ConfigError(f"{key} {pattern} is no place that pyarrow can open ({error}): name another.") from error
    return [_uri(store, file) for file in sorted(found, key=lambda file: file.split("/"))]


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a file's path below a directory holds a name that begins with a dot, which globs do not match either: editors
    and notebooks leave copies there."""
    return any(part.startswith(".") for part in parts)


def _matching_files(store: ObjectStore, path: str, suffixes: Collection[str]) -> list[str]:
    kind = store.status(path).type
    if kind == pyarrow.fs.FileType.File:
        return [path]
    if kind == pyarrow.fs.FileType.Directory:
        inside = [file for file in store.files(path) if PurePosixPath(file).suffix in suffixes]
        return [file for file in inside if not is_hidden(PurePosixPath(file).relative_to(path).parts)]
    parts = path.split("/")
    plain = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), None)
    if plain is None:
        return []
    inside = store.files("/".join(parts[:plain]), recursive="**" in parts or plain + 1 < len(parts))
    return [file for file in inside if _fits(file.split("/"), parts)]


def shown(place: str) -> str:
    """A path or a URI as people are to read it: a URI without its options."""
    return place.partition("?")[0] if is_store_uri(place) else place


class StoredFile(io.RawIOBase):
    """A stored file, read by ranges, each of them tried as often as all that an :class:`ObjectStore` does.

    Raises:
        FileNotFoundError: where there is none.
        ArtifactError: where the store does not answer, here or while it is read.
    """

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._store, self._path = _place(uri, "data")
        self._file = self._store.open_named(self._path)
        self._position = 0

    @property
    def version(self) -> str:
        """What tells its content from another's: its size and ETag or, where the store gives none, its size and time."""
        tags = {name.lower(): value for name, value in (self._file.metadata() or {}).items()}
        tag = tags.get("etag") or tags.get(b"etag")
        if tag is None:
            tag = self._store.status(self._path).mtime_ns
        return f"{self._file.size()} {tag.decode() if isinstance(tag, bytes) else tag}"

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place; nothing is read for it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size()}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer by one request, as far as the file goes."""
        content = self._store.read_range(self._file, self._path, self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        """Gives the connection back."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


@functools.lru_cache(maxsize=16)
def _store(uri: str, key: str) -> ObjectStore:
    return ObjectStore(uri, key)


def _place(uri: str, key: str) -> tuple[ObjectStore, str]:
    """The store at the URI's root, of which a process opens one, and the path in it."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ConfigError(f"{key} {uri} is no place that pyarrow can open ({error}): name another.") from error
    root = urlunsplit((parts.scheme, parts.netloc, "", parts.query, ""))
    return _store(root, key), unquote(parts.path).strip("/")


def _uri(store: ObjectStore, path: str) -> str:
    root, mark, options = store.uri.partition("?")
    return f"{root}/{_ESCAPED.sub(lambda found: quote(found[0]), path)}{mark}{options}"


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a glob's parts match a path's: ``**`` any directories, names with a leading dot only such a pattern."""
    if not pattern or not parts:
        return not parts and not pattern
    if pattern[0] == "**" and len(pattern) > 1:
        below = not parts[0].startswith(".") and _fits(parts[1:], pattern)
        return below or _fits(parts, pattern[1:])
    if pattern[0] == "**":
        return not any(part.startswith(".") for part in parts)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
