"""An object store that holds a run: files under immutable keys that name their content and their writer's lease.

A file at PATH is the object ``PATH/LEASE.COUNT.SHA256``: the number of the lease under which it was written, so that what a
process writes after another has taken the run over is never read, and which write under that lease it is. ``PATH/SHA256`` is
what no lease is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.errors import DamagedArtifactError, TakenOver
from emloc_ray.io.store.digests import digest
from emloc_ray.io.store.objects import REQUEST_S, ObjectFile, Objects, Stored, Version
from emloc_ray.io.store.replacing import naming_full_disk
from emloc_ray.io.store.threads import one_ahead

MANIFEST = "manifest.json"
Listing = Mapping[str, Sequence[Stored]]
"""The versions of files, by path, as they were when they were listed."""


class ObjectStore(Objects):
    """What lies under one URI, as the holder of the lease of this number sees it; None: as one who only reads.

    Raises:
        ConfigError: naming the config's ``key``, where the URI holds credentials or names no store.
    """

    def __init__(self, uri: str, key: str = "run_dir", lease: int | None = None, timeout_s: float = REQUEST_S) -> None:
        super().__init__(uri, key, timeout_s)
        self.lease = lease
        self._manifest: tuple[Version, dict[str, Any]] | None = None
        self._named: tuple[Mapping[str, Any], dict[str, str]] = {}, {}  # a manifest, and what named_files says of it
        self._written: dict[str, Version] = {}  # by path, what :meth:`write_held` put last

    def versions(self, path: str, manifest: Mapping[str, Any] | None = None) -> dict[str, Stored]:
        """The objects of a file, or of all files below a directory, by the file's path from ``path`` on ("": itself).

        A file of a finished stage has the version that the manifest names. Another has the newest that was written under
        this lease, or else the one that its holder adopted from the lease before. ``manifest``: as it was then.

        Raises:
            TakenOver: where another holder's manifest is there by now.
        """
        listing = self.listing(path)
        if not listing:
            return {}
        manifest = self.checked_manifest() if manifest is None else manifest
        named, adopted = self._named_files(manifest), manifest.get("adopted", {})
        seen = {}
        for file, objects in listing.items():
            newest = self._seen(objects, named.get(file), adopted.get(file))
            if newest is not None:
                seen[file.removeprefix(path).strip("/")] = newest
        return seen

    def listing(self, *paths: str) -> Listing:
        """All versions of the files at or below these paths, whoever wrote them."""
        by_file: dict[str, list[Stored]] = {}
        for path in paths:
            for stored in self.below(path):
                if stored.sha256:
                    by_file.setdefault(_parent(stored), []).append(stored)
        return by_file

    def _named_files(self, manifest: Mapping[str, Any]) -> dict[str, str]:
        """:func:`named_files`, gone through once for the manifest that was asked of last."""
        known, named = self._named
        if known is not manifest:
            named = named_files(manifest)
            self._named = manifest, named
        return named

    def _seen(self, objects: Sequence[Stored], named: str | None, adopted: str | None) -> Stored | None:
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
        known = self._manifest  # as this thread saw it: another may ask meanwhile
        stored = self.read_version(MANIFEST, known=None if known is None else known[0])
        if stored is None:
            self._manifest = None
            return {}
        if known is None or stored[0] != known[0]:
            self._manifest = known = stored[0], _parsed(stored[1])
        manifest = known[1]
        if self.lease is not None and manifest.get("lease", 0) > self.lease:
            raise TakenOver("This run was taken over by another process: leave it to that, or stop that first.")
        return manifest

    def write_held(self, path: str, content: bytes) -> None:
        """Puts a small object under its own name; as a lease's holder by compare-and-swap with what was there when the lease
        was last known to be its own, so that nothing of a later holder's is overwritten.

        Raises:
            TakenOver: where another process holds the run by now; what it wrote stays.
        """
        if self.lease is None:
            self.write(path, content)
            return
        while True:  # in this process another thread may write it too
            known = self._written.pop(path, None) or self.version(path)
            self.checked_manifest()
            version = self.replace(path, content, known)
            if version is not None:
                self._written[path] = version
                return

    def add_version(self, path: str, file: Path, listing: Listing | None = None, sha256: str | None = None) -> str:
        """Puts a file's content as the version of ``path``; returns its SHA-256. ``listing``: with this path, if there is one;
        ``sha256``: where it is known.

        The last version of the same lease stays beside it until the stage is committed: a process that takes the run over
        at this moment may have adopted that one. Versions of earlier leases stay.

        Raises:
            TakenOver: where another process holds the run by now; nothing is written.
        """
        if self.lease is not None:
            self.checked_manifest()
        sha, size = sha256 or digest(file), file.stat().st_size
        with self._new_version(path, sha, size, listing) as key:
            if key is not None:
                self._trying(lambda: self.upload(file, key, size), "write", path)
        return sha

    @contextlib.contextmanager
    def _new_version(self, path: str, sha256: str, size: int, listing: Listing | None) -> Iterator[str | None]:
        """Gives the full key for a version to put, None where the newest is the same; then removes those that it replaces."""
        held = (self.listing(path) if listing is None else listing).get(path, ())
        own = sorted((stored for stored in held if stored.lease == self.lease), key=lambda stored: stored.order)
        if own and (own[-1].sha256, own[-1].size) == (sha256, size):
            yield None
            return
        count = own[-1].order[0] + 1 if own else 1
        yield self.key(f"{path}/{sha256}" if self.lease is None else f"{path}/{self.lease}.{count}.{sha256}")
        replaced = own if self.lease is None else own[:-1]
        self.delete([stored for stored in replaced if self.lease is not None or stored.sha256 != sha256])

    def version_of(self, path: str, sha256: str, listing: Listing | None = None) -> Stored | None:
        """The object of a file that has this content, whether or not it is the newest; None where there is none."""
        held = (self.listing(path) if listing is None else listing).get(path, ())
        return next((stored for stored in held if stored.sha256 == sha256 and self._may_read(stored)), None)

    def copy_version(self, path: str, source: Objects, stored: Stored, listing: Listing | None = None) -> None:
        """Makes ``stored``, which lies in ``source``, a place in the same bucket, a version of ``path``: :meth:`Objects.copy`
        says how."""
        with self._new_version(path, stored.sha256, stored.size, listing) as target:
            if target is not None:
                source.copy(stored, target)

    def stream_version(self, path: str, source: ObjectStore, stored: Stored, listing: Listing | None = None) -> None:
        """Makes ``stored``, which lies in ``source``, any place, a version of ``path``: its content goes through this process's
        memory, and is checked before the version is there. Raises what :meth:`contents` raises.

        Raises:
            TakenOver: where another process holds the run by now; nothing is written.
        """
        if self.lease is not None:
            self.checked_manifest()

        def put(key: str) -> None:
            with contextlib.closing(one_ahead(source.contents(stored))) as contents:
                self.upload(contents, key, stored.size)

        with self._new_version(path, stored.sha256, stored.size, listing) as key:
            if key is not None:
                self._trying(lambda: put(key), "write", path)

    def drop_others(self, path: str) -> None:
        """Removes the objects below ``path`` that this lease's holder does not see, but for those of later leases."""
        seen = {stored.path for stored in self.versions(path).values()}
        self.delete([stored for stored in self.below(path) if stored.path not in seen and self._may_read(stored)])

    def download(self, stored: Stored, target: Path) -> None:
        """Copies an object to ``target``; raises what :meth:`contents` raises, and OSError where the disk is full."""
        with naming_full_disk(target), target.open("wb", buffering=0) as file:
            for content in self.contents(stored):
                file.write(content)

    def contents(self, stored: Stored) -> Iterator[bytes]:
        """An object's content from front to back; raises FileNotFoundError where it is gone, DamagedArtifactError at its end
        where it is not what its key names."""
        total = hashlib.sha256()
        for content in self.ranges(stored):
            total.update(content)
            yield content
        if total.hexdigest() != stored.sha256:
            path = _parent(stored)
            raise DamagedArtifactError(
                f"{path} in {self.uri} is cut short or altered: run the same command again.", path
            )

    def open(self, stored: Stored) -> ObjectFile:
        """An object as a file that is read by ranges."""
        return ObjectFile(self, stored)

    def check_conditions(self, path: str) -> None:
        """Puts and removes an object at ``path``; raises ConfigError where the store does not hold to the conditions of
        :meth:`replace`, ArtifactError where it cannot be written."""
        first, other = uuid.uuid4().bytes, uuid.uuid4().bytes
        known = self.replace(path, first, None)
        try:
            again = known is None or self.replace(path, other, None) is not None
            if again or self.replace(path, other, known) is None or self.replace(path, first, known) is not None:
                raise self.without_conditions()
        finally:
            self.remove(path)

    def remove(self, path: str) -> None:
        """Removes a file or a directory with all that is in it, but for what was written under later leases.

        Raises:
            TakenOver: where another process holds the run by now; nothing is removed.
        """
        if self.lease is not None:
            self.checked_manifest()
        own = self.find(path)
        readable = [stored for stored in self.below(path) if self._may_read(stored)]
        self.delete([*readable, *([] if own is None else [own])])


def named_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of the files of finished stages, by path."""
    entries = manifest.get("stages", {}).values()
    return {path: content["sha256"] for entry in entries for path, content in entry.get("outputs", {}).items()}


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
