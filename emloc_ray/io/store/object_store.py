"""An object store that holds a run: files under immutable keys that name their content and their writer's lease.

A file at PATH is the object ``PATH/LEASE.COUNT.SHA256``: the number of the lease under which it was written, so that what a
process writes after another has taken the run over is never read, and which write under that lease it is. ``PATH/SHA256`` is
what no lease is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError, PreconditionError

from emloc_ray.errors import ArtifactError, ConfigError, DamagedArtifactError, TakenOver
from emloc_ray.io.store.clients import REQUEST_S, open_client
from emloc_ray.io.store.digests import digest

MANIFEST = "manifest.json"
_ATTEMPTS = 3  # of a request whose answer breaks off; obstore tries those that are refused
_FIRST_PAUSE_S = 0.5
_FULL = (errno.ENOSPC, errno.EDQUOT)
_RANGE = 2**25  # bytes of a file that one request reads
_PART = 2**24  # and writes, of which S3 takes 10,000
_VERSION = re.compile(r"(?:(\d+)\.(\d+)\.)?([0-9a-f]{64})")
Version = Mapping[str, Any]  # as obstore takes it: S3 and Azure compare ETags, Google Cloud its generations
Result = TypeVar("Result")


def is_store_uri(place: str) -> bool:
    """Whether a run's place is on an object store, not in a file system."""
    return "://" in place and not place.startswith("file://")


def below(place: str, *parts: str) -> str:
    """A place inside another, with "/" between; the query of an object store's URI stays at its end."""
    path, mark, query = place.partition("?") if is_store_uri(place) else (place, "", "")
    return "/".join((path.rstrip("/"), *parts)) + mark + query


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
        """Of what was written to one path under one lease, the later is the greater; times are whole seconds in some stores."""
        match = _VERSION.fullmatch(self.path.rpartition("/")[2])
        return int(match[2] or 0) if match else 0, self.modified


class ObjectStore:
    """What lies under one URI, as the holder of the lease of this number sees it; None: as one who only reads.

    Every call is tried a few times, with growing pauses: stores answer 503 when they are busy, and connections break.

    Raises:
        ConfigError: naming the config's ``key``, where the URI holds credentials or names no store.
    """

    def __init__(self, uri: str, key: str = "run_dir", lease: int | None = None, timeout_s: float = REQUEST_S) -> None:
        self.uri, self.lease = uri.rstrip("/"), lease
        self.client, self.base = open_client(self.uri, key, timeout_s)
        self.bucket, self.prefix = urlsplit(self.uri).netloc, self.base
        self._manifest: tuple[Version, dict[str, Any]] | None = None

    def key(self, path: str) -> str:
        """The full key of a path inside the run."""
        return f"{self.base}/{path}".strip("/")

    # Versions.

    def versions(self, path: str, manifest: Mapping[str, Any] | None = None) -> dict[str, Stored]:
        """The objects of a file, or of all files below a directory, by the file's path from ``path`` on ("": itself).

        Of a file that a finished stage wrote it is what the manifest names. Of another it is the newest that was written
        under this lease, or else what its holder adopted from the one before. ``manifest``: as it was then.

        Raises:
            TakenOver: where another holder's manifest is there by now.
        """
        found: dict[str, list[Stored]] = {}
        for stored in self.below(path):
            if stored.sha256:
                found.setdefault(stored.path.rpartition("/")[0], []).append(stored)
        if not found:
            return {}
        manifest = self.checked_manifest() if manifest is None else manifest
        named, adopted = named_files(manifest), manifest.get("adopted", {})
        seen = {}
        for file, objects in found.items():
            newest = self._seen(objects, named.get(file), adopted.get(file))
            if newest is not None:
                seen[file.removeprefix(path).strip("/")] = newest
        return seen

    def _seen(self, objects: list[Stored], named: str | None, adopted: str | None) -> Stored | None:
        of_sha = {stored.sha256: stored for stored in objects if self._may_read(stored)}
        if named is not None:
            return of_sha.get(named)
        own = [stored for stored in objects if stored.lease == self.lease]
        return max(own, key=lambda stored: stored.order) if own else of_sha.get(adopted or "")

    def _may_read(self, stored: Stored) -> bool:
        return self.lease is None or (stored.lease or 0) <= self.lease

    def checked_manifest(self) -> dict[str, Any]:
        """The run's manifest as it is now, {} where there is none; asked for again only where it has changed.

        Raises:
            TakenOver: where the holder of a later lease wrote it.
        """
        found = self.read_version(MANIFEST, known=None if self._manifest is None else self._manifest[0])
        if found is None:
            self._manifest = None
            return {}
        if self._manifest is None or found[0] != self._manifest[0]:
            self._manifest = found[0], _parsed(found[1])
        manifest = self._manifest[1]
        if self.lease is not None and manifest.get("lease", 0) > self.lease:
            raise TakenOver("This run was taken over by another process: leave it to that, or stop that first.")
        return manifest

    def add_version(self, path: str, file: Path) -> str:
        """Puts a file's content as the version of ``path``; returns its SHA-256.

        Of what was written there before under the same lease, the last stays beside it until the stage is committed: who
        takes the run over at this moment may have adopted that. Of earlier leases everything stays.

        Raises:
            TakenOver: where another process holds the run by now; nothing is written.
        """
        if self.lease is not None:
            self.checked_manifest()
        sha, size = digest(file), file.stat().st_size
        with self._new_version(path, sha, size) as key:
            if key is not None:
                self._trying(lambda: self._upload(file, key, size), "write", path)
        return sha

    def _upload(self, file: Path, key: str, size: int) -> None:
        self.client.put(key, file, chunk_size=max(_PART, size // 9000))

    @contextlib.contextmanager
    def _new_version(self, path: str, sha256: str, size: int) -> Iterator[str | None]:
        """Gives the full key for a version to put, None where the newest is the same; then removes those that it replaces."""
        held = [stored for stored in self.below(path) if _parent(stored) == path and stored.lease == self.lease]
        own = sorted((stored for stored in held if stored.sha256), key=lambda stored: stored.order)
        if own and (own[-1].sha256, own[-1].size) == (sha256, size):
            yield None
            return
        count = own[-1].order[0] + 1 if own else 1
        yield self.key(f"{path}/{sha256}" if self.lease is None else f"{path}/{self.lease}.{count}.{sha256}")
        replaced = own if self.lease is None else own[:-1]
        self._delete([stored for stored in replaced if self.lease is not None or stored.sha256 != sha256])

    def version_of(self, path: str, sha256: str) -> Stored | None:
        """The object of a file that has this content, whether or not it is the newest; None where there is none."""
        held = [stored for stored in self.below(path) if _parent(stored) == path and self._may_read(stored)]
        return next((stored for stored in held if stored.sha256 == sha256), None)

    def copy_version(self, path: str, key: str, stored: Stored) -> None:
        """Makes ``stored``, which lies under the full ``key`` in the same bucket, a version of ``path``, by the store itself."""
        with self._new_version(path, stored.sha256, stored.size) as target:
            if target is not None:
                self._trying(lambda: self.client.copy(key, target), "write", path)

    def drop_others(self, path: str) -> None:
        """Removes the objects below ``path`` that this lease's holder does not see, but for those of later leases."""
        seen = {stored.path for stored in self.versions(path).values()}
        self._delete([stored for stored in self.below(path) if stored.path not in seen and self._may_read(stored)])

    def download(self, stored: Stored, target: Path) -> None:
        """Copies an object to ``target``; raises DamagedArtifactError where its content is not what its key names, OSError
        where the disk is full, FileNotFoundError where it is gone."""
        total = hashlib.sha256()
        with _of_disk(target), target.open("wb", buffering=0) as file:
            for offset in range(0, stored.size, _RANGE):
                content = self.read_range(stored.path, offset, min(_RANGE, stored.size - offset))
                total.update(content)
                file.write(content)
        if total.hexdigest() != stored.sha256:
            path = _parent(stored)
            raise DamagedArtifactError(
                f"{path} in {self.uri} is cut short or altered: run the same command again.", path
            )

    def open(self, stored: Stored) -> ObjectFile:
        """An object as a file that is read by ranges."""
        return ObjectFile(self, stored)

    # Objects under their own names.

    def below(self, path: str = "") -> list[Stored]:
        """All objects below a path, whatever their names."""
        prefix = self.key(path)
        try:
            listed = self._trying(lambda: self.client.list(prefix or None).collect(), "list", path)
        except FileNotFoundError:  # no such bucket
            return []
        return [self._stored(meta) for meta in listed]

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
        return [found.rstrip("/").rpartition("/")[2] for found in paths]

    def files(self, path: str, recursive: bool = True) -> list[str]:
        """The paths of the files in a directory and, where ``recursive``, in all below it: whatever their names."""
        found = [stored.path for stored in self.below(path)]
        depth = path.count("/") + 1 if path else 0
        return [file for file in found if recursive or file.count("/") == depth]

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
        found = self.read_version(path)
        return None if found is None else found[1]

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

    def write(self, path: str, content: bytes) -> None:
        """Puts a small object under a key of its own name: whole or not at all."""
        self._trying(lambda: self.client.put(self.key(path), content), "write", path)

    def replace(self, path: str, content: bytes, known: Version | None) -> Version | None:
        """Puts a small object in the place of the version ``known`` (None: of nothing); None where another is there by now.

        What was put, though the answer was lost, is found by its content.
        """
        key = self.key(path)
        mode: Any = "create" if known is None else dict(known)

        def put() -> Version | None:
            try:
                return _version(self.client.put(key, content, mode=mode))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                found = self.read_version(path)
                return found[0] if found is not None and found[1] == content else None

        try:
            return self._trying(put, "write", path)
        except (NotSupportedError, NotImplementedError) as error:
            raise self._without_conditions() from error

    def check_conditions(self, path: str) -> None:
        """Puts and removes an object at ``path``; raises ConfigError where the store does not hold to the conditions of
        :meth:`replace`, ArtifactError where it cannot be written."""
        first, other = uuid.uuid4().bytes, uuid.uuid4().bytes
        known = self.replace(path, first, None)
        try:
            again = known is None or self.replace(path, other, None) is not None
            if again or self.replace(path, other, known) is None or self.replace(path, first, known) is not None:
                raise self._without_conditions()
        finally:
            self.remove(path)

    def _without_conditions(self) -> ConfigError:
        return ConfigError(
            f"{self.uri} is on a store without conditional writes, which keep two processes from one run: name a place on"
            " another."
        )

    def remove(self, path: str) -> None:
        """Removes a file or a directory with all that is in it, but for what was written under later leases.

        Raises:
            TakenOver: where another process holds the run by now; nothing is removed.
        """
        if self.lease is not None:
            self.checked_manifest()
        own = self.find(path)
        found = [stored for stored in self.below(path) if self._may_read(stored)]
        self._delete([*found, *([] if own is None else [own])])

    def _delete(self, objects: list[Stored]) -> None:
        for begin in range(
            0, len(objects), 1000
        ):  # https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
            keys = [self.key(stored.path) for stored in objects[begin : begin + 1000]]
            with contextlib.suppress(FileNotFoundError):
                self._trying(lambda keys=keys: self.client.delete(keys), "remove", objects[begin].path)  # type: ignore[misc]

    def _trying(self, call: Callable[[], Result], what: str, path: str) -> Result:
        """Raises ArtifactError where the last try fails too; what is not there, or a full disk, is told at once."""
        for attempt in range(_ATTEMPTS):
            try:
                return call()
            except (FileNotFoundError, NotSupportedError, NotImplementedError):
                raise
            except (OSError, BaseError) as error:
                if (
                    isinstance(error, OSError) and error.errno in _FULL
                ):  # this node's disk: the store does not answer so
                    raise
                if "501 Not Implemented" in str(error):
                    raise self._without_conditions() from error
                if "404 Not Found" in str(error):
                    raise FileNotFoundError(path) from error
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(_FIRST_PAUSE_S * 2**attempt)
                    continue
                detail = " ".join(str(error).partition("Debug source")[0].split())[:200]
                raise ArtifactError(
                    f"{self.uri} does not {what} {path or 'anything'} ({detail}): see that the store can be reached and its"
                    " credentials are valid, then run the same command again."
                ) from error
        raise AssertionError


def named_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of the files of finished stages, by path."""
    entries = manifest.get("stages", {}).values()
    return {path: content["sha256"] for entry in entries for path, content in entry.get("outputs", {}).items()}


class ObjectFile(io.RawIOBase):
    """An object that is read by ranges, each of them tried as often as all that an :class:`ObjectStore` does."""

    def __init__(self, store: ObjectStore, stored: Stored) -> None:
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


def _version(meta: Mapping[str, Any]) -> Version:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _parsed(content: bytes) -> dict[str, Any]:
    """A manifest, or {} for what is none: who opens the run says so."""
    try:
        manifest = json.loads(content)
        named_files(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(manifest)


def _parent(stored: Stored) -> str:
    return stored.path.rpartition("/")[0]


@contextlib.contextmanager
def _of_disk(target: Path) -> Iterator[None]:
    """Names the file whose disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise
