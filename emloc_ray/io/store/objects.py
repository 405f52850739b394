"""The objects below one URI, by obstore: listed, read whole or by ranges, put on condition; requests are tried again."""

import io
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError

from emloc_ray.errors import FULL, ArtifactError, ConfigError
from emloc_ray.text import one_line

ATTEMPTS = 5  # of a request whose answer breaks off, and, by obstore, of one that is refused
FIRST_PAUSE_S = 0.5
REQUEST_S = 120.0  # of one part of a large file
READ_BYTES = 2**25  # of a file that one request reads
PART_BYTES = 2**24  # and writes
_PARTS_AT_ONCE = 4  # of one file; eight files are put side by side
_PARTS = 9000  # of a file at most: S3 takes 10,000
# What S3 copies in one request: https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html
LARGEST_COPY = 5 * 2**30
_VERSION = re.compile(r"(?:(\d+)\.(\d+)\.)?([0-9a-f]{64})")
Version = Mapping[str, Any]  # as obstore takes it: S3 and Azure compare ETags, Google Cloud its generations
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """An object: ``path`` from the run on, when it was put by the store's clock in s since 1970, and its ETag."""

    path: str
    size: int
    modified: float
    e_tag: str | None

    @property
    def sha256(self) -> str:
        """The content that its key names; "" where it names none."""
        match = _VERSION.fullmatch(self.path.rpartition("/")[2])
        return match[3] if match else ""

    @property
    def lease(self) -> int | None:
        """The number of the lease under which it was written; None where none was asked for."""
        match = _VERSION.fullmatch(self.path.rpartition("/")[2])
        return int(match[1]) if match and match[1] else None

    @property
    def order(self) -> tuple[int, float]:
        """Orders what was written to one path under one lease, the latest last; times are whole seconds in some stores."""
        match = _VERSION.fullmatch(self.path.rpartition("/")[2])
        return int(match[2] or 0) if match else 0, self.modified


class Objects:
    """What lies under one URI.

    Every call is tried a few times, with growing pauses: stores answer 503 when they are busy, and connections break. Raises
    ConfigError, naming the config's ``key``, where the URI holds credentials or names no store.
    """

    def __init__(self, uri: str, key: str = "run_dir", timeout_s: float = REQUEST_S) -> None:
        from emloc_ray.io.store.clients import open_client  # obstore's stores: whoever only names them needs none

        self.uri = uri.rstrip("/")
        self.client, self.base = open_client(self.uri, key, timeout_s, ATTEMPTS, FIRST_PAUSE_S)
        self.bucket, self.prefix = urlsplit(self.uri).netloc, self.base

    def key(self, path: str) -> str:
        """The full key of a path inside the run."""
        return f"{self.base}/{path}".strip("/")

    def below(self, path: str = "") -> list[Stored]:
        """All objects below a path, whatever their names, but for the empty ones that consoles and Spark mark a folder with."""
        prefix = self.key(path)
        try:
            listed = self._trying(lambda: self.client.list(prefix or None).collect(), "list", path)
        except FileNotFoundError:  # no such bucket
            return []
        folders = _folders(meta["path"] for meta in listed)
        files = [meta for meta in listed if meta["size"] or meta["path"] not in folders]
        return [self._stored(meta) for meta in files if meta["path"] != prefix]

    def _stored(self, meta: Mapping[str, Any]) -> Stored:
        path = meta["path"].removeprefix(self.base).lstrip("/")
        return Stored(path, meta["size"], meta["last_modified"].timestamp(), meta["e_tag"])

    def names(self, path: str = "") -> list[str]:
        """What lies directly under a path."""
        prefix = self.key(path)
        try:
            listed = self._trying(lambda: self.client.list_with_delimiter(prefix or None), "list", path)
        except FileNotFoundError:
            return []
        paths = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
        return [key.rstrip("/").rpartition("/")[2] for key in paths if key != prefix]

    def files(self, path: str) -> list[str]:
        """The paths of the files in a directory and in all below it, whatever their names."""
        return [stored.path for stored in self.below(path)]

    def find(self, path: str) -> Stored | None:
        """The object under a path's own name, or None."""
        key = self.key(path)
        if not key:
            return None
        try:
            return self._stored(self._trying(lambda: self.client.head(key), "read", path))
        except FileNotFoundError:
            return None

    def read(self, path: str) -> bytes | None:
        """A small object's content; None where there is none."""
        version = self.read_version(path)
        return None if version is None else version[1]

    def version(self, path: str) -> Version | None:
        """A small object's version; None where there is none."""
        try:
            return self._trying(lambda: _version(self.client.head(self.key(path))), "read", path)
        except FileNotFoundError:
            return None

    def read_version(self, path: str, known: Version | None = None) -> tuple[Version, bytes] | None:
        """A small object's version and content, which is b"" where the version is the one ``known``; None where there is none."""
        key = self.key(path)

        def get() -> tuple[Version, bytes]:
            if known is not None and _version(self.client.head(key)) == known:
                return known, b""
            answer = self.client.get(key)
            return _version(answer.meta), bytes(answer.bytes())

        try:
            return self._trying(get, "read", path)
        except FileNotFoundError:
            return None

    def read_range(self, path: str, offset: int, count: int) -> bytes:
        """The ``count`` bytes from ``offset`` on of an object, which has so many."""

        def get() -> bytes:
            content = bytes(self.client.get_range(self.key(path), start=offset, length=count))
            if len(content) != count:
                raise OSError(f"{len(content)} of {count} bytes arrived")
            return content

        return self._trying(get, "read", path) if count > 0 else b""

    def ranges(self, stored: Stored) -> Iterator[bytes]:
        """An object's content from front to back, a request each."""
        for offset in range(0, stored.size, READ_BYTES):
            yield self.read_range(stored.path, offset, min(READ_BYTES, stored.size - offset))

    def write(self, path: str, content: bytes) -> None:
        """Puts a small object under a key of its own name: whole or not at all."""
        self._trying(lambda: self.client.put(self.key(path), content), "write", path)

    def upload(self, content: Path | Iterator[bytes], key: str, size: int) -> None:
        """Puts the content of a file, or what an iterator gives, under a full key, in parts where it is large; it is tried once.
        An iterator makes no request in the thread that asks it: obstore makes none inside another. Where it raises, nothing is
        put."""
        part = _part(size)
        self.client.put(key, content, use_multipart=size > part, chunk_size=part, max_concurrency=_PARTS_AT_ONCE)

    def copy(self, stored: Stored, key: str) -> None:
        """Puts an object of at most ``LARGEST_COPY`` bytes under another full key of its bucket too; raises FileNotFoundError
        where it is gone."""
        self._trying(lambda: self.client.copy(self.key(stored.path), key), "copy", stored.path)

    def replace(self, path: str, content: bytes, known: Version | None) -> Version | None:
        """Puts a small object in the place of the version ``known`` (None: of nothing); None where another is there by now.
        What was put, though the answer was lost, is found by its content."""
        key = self.key(path)
        mode: Any = "create" if known is None else dict(known)

        def put() -> Version | None:
            try:
                return _version(self.client.put(key, content, mode=mode))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                version = self.read_version(path)
                return version[0] if version is not None and version[1] == content else None

        try:
            return self._trying(put, "write", path)
        except (NotSupportedError, NotImplementedError) as error:
            raise self.without_conditions() from error

    def without_conditions(self) -> ConfigError:
        """What is said of a store that has no compare-and-swap."""
        return ConfigError(
            f"{self.uri} is on a store without conditional writes, which keep two processes from one run: name a place on"
            " another."
        )

    def delete(self, objects: list[Stored]) -> None:
        """Removes them, a thousand a request: https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html."""
        for begin in range(0, len(objects), 1000):
            part = objects[begin : begin + 1000]
            keys = [self.key(stored.path) for stored in part]
            try:
                self._trying(lambda keys=keys: self.client.delete(keys), "remove", part[0].path)  # type: ignore[misc]
            except FileNotFoundError:
                # On Google Cloud and Azure the client stops at the first that is missing.
                left = {stored.path for stored in self.below(posixpath.commonpath([s.path for s in part]))}
                rest = [stored for stored in part if stored.path in left]
                if len(rest) < len(part):
                    self.delete(rest)

    def _trying(self, call: Callable[[], Result], what: str, path: str) -> Result:
        """Raises ArtifactError where the last try fails too; a missing object or a full disk is raised at once."""
        for attempt in range(ATTEMPTS):
            try:
                return _interruptible(call)
            except (FileNotFoundError, NotSupportedError, NotImplementedError):
                raise
            except (OSError, BaseError) as error:
                if isinstance(error, OSError) and error.errno in FULL:  # this node's disk: the store does not answer so
                    raise
                if "501 Not Implemented" in str(error):
                    raise self.without_conditions() from error
                if "Received redirect" in str(error):
                    raise ConfigError(
                        f"{self.uri}: the bucket is in another region: end the URI in its own, ?region=…, or set AWS_REGION"
                        " on the nodes."
                    ) from error
                if "404 Not Found" in str(error):
                    raise FileNotFoundError(path) from error
                if attempt + 1 < ATTEMPTS:
                    time.sleep(FIRST_PAUSE_S * 2**attempt)
                    continue
                detail = one_line(str(error).partition("Debug source")[0])
                raise ArtifactError(
                    f"{self.uri} does not {what} {path or 'anything'} ({detail}): see that the store can be reached and its"
                    " credentials are valid, then run the same command again."
                ) from error
        raise AssertionError


class ObjectFile(io.RawIOBase):
    """An object that is read by ranges, each of them tried as often as all that an :class:`Objects` does."""

    def __init__(self, store: Objects, stored: Stored) -> None:
        super().__init__()
        self.store, self.stored = store, stored
        self._position = 0

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
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.stored.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer by one request, as far as the file goes."""
        content = self._next(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        """The rest, by one request."""
        return self._next(self.stored.size)

    def _next(self, most: int) -> bytes:
        count = max(0, min(most, self.stored.size - self._position))
        content = self.store.read_range(self.stored.path, self._position, count)
        self._position += count
        return content


def _interruptible(call: Callable[[], Result]) -> Result:
    """What a request gives. Python handles no signal while the main thread, which alone hears them, is in obstore: there the
    request has a thread of its own, which is left to itself where Ctrl-C or SIGTERM ends the wait."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    answer: Future[Result] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001  raised to who waits
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result()


def _version(meta: Mapping[str, Any]) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _folders(keys: Iterable[str]) -> set[str]:
    """The folders that keys lie in, and those around them."""
    folders = set[str]()
    for key in keys:
        while (key := key.rpartition("/")[0]) and key not in folders:
            folders.add(key)
    return folders


def _part(size: int) -> int:
    """The bytes of each part that a file of this size is put in."""
    return max(PART_BYTES, size // _PARTS)
