"""Artifacts of stages that many runs share, under keys that hash all that they are made from.

PLACE/STAGE/KEY holds ``files/``, by their paths inside a run, and ``entry.json`` (:mod:`emloc_ray.io.runs.cache_place`). Entries
never change. In a file system their files are read-only hard links to those of the runs: an entry that is removed takes
nothing from a run.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from emloc_ray.errors import ArtifactError, DamagedArtifactError, DataError, EmlocError, NumericsError, Stopped
from emloc_ray.io.runs.cache_place import FORMAT, CachePlace, turn_of
from emloc_ray.io.store.digests import digest_of
from emloc_ray.io.store.node_cache import ListedFiles, discard, open_newest, origin, sizes
from emloc_ray.io.store.node_copies import holds
from emloc_ray.io.store.places import leads_out
from emloc_ray.io.store.threads import by_threads
from emloc_ray.io.store.transfer import listing, transfer
from emloc_ray.io.store.turns import wait_for_turn

_FILES = "files"
PATIENCE_S = 6 * 3600.0  # with another one that makes the same and gets nowhere: it may have been stopped
_LOOK_S = 0.5  # between two looks of a waiting thread, of hundreds, at whether it is to stop
_CONNECTIONS = 8
_MAX_LINKS = 8  # at once: each has so many connections to a store
_FREED = 0.1  # of max_bytes, where an entry exceeds it: the next ones need no weighing
_SWEEP_S = 3600.0  # between two looks of a process at all that is there for what killed ones left
Files = Mapping[str, Mapping[str, Any]]


class EntryGone(ArtifactError):
    """An entry cannot be had, whatever the reason: make the artifact as if it had not been found."""


@dataclass(frozen=True)
class Entry:
    """What a run (``origin``) made in a stage: ``files``, by path inside a run, with ``size`` and ``sha256``; times in s
    since 1970."""

    stage: str
    key: str
    files: Files
    result: Mapping[str, Any]
    inputs: Any
    created_at: float
    used_at: float
    origin: str

    @property
    def bytes(self) -> int:
        """The size of its files."""
        return sum(content["size"] for content in self.files.values())


class ArtifactCache:
    """The entries at a directory or the URI of an object store; where they exceed ``max_bytes``, those go that were used
    longest ago, until a tenth of it is free. ``is_own``: whether it lies among the runs that use it, whose files are trusted
    as much. Raises ConfigError where the place holds files of something else, or cannot be opened."""

    def __init__(self, place: str, max_bytes: int | None = None, is_own: bool = False) -> None:
        self.max_bytes, self.is_own = max_bytes, is_own
        self._at = CachePlace(place)
        self.place = self._at.name
        self._swept_at = self._weighed_at = -math.inf  # by the monotonic clock
        self._links = threading.Semaphore(_MAX_LINKS)
        self._failures: dict[str, tuple[type[EmlocError], str]] = {}  # by key
        self._held = math.inf  # bytes at most, but for what other processes have added since it was weighed

    @property
    def held_bytes(self) -> float | None:
        """The bytes of all entries, as far as this process knows; None where it has never weighed them."""
        return None if math.isinf(self._held) else self._held

    def weigh(self) -> None:
        """Finds out :attr:`held_bytes`, where the place can be read."""
        with contextlib.suppress(OSError, EmlocError):
            self._prune(None, None)

    def is_made(self) -> bool:
        """Whether anything was ever put there."""
        return self._at.is_made()

    def stages(self) -> set[str]:
        """The stages of which it holds an entry."""
        return {stage for (stage, _), used in self._at.scan().items() if used is not None}

    def check(self) -> None:
        """Raises ConfigError where nothing can be put there."""
        self._at.check()

    @staticmethod
    def key(stage: str, inputs: Any) -> str:
        """SHA-256 of the stage, its ``inputs`` (plain JSON values; the order of keys does not count) and the format's version.
        Raises TypeError where ``inputs`` hold something else, of which no text can be trusted to tell it from others."""
        return hashlib.sha256(json.dumps([FORMAT, stage, inputs], sort_keys=True).encode()).hexdigest()

    @contextlib.contextmanager
    def alone(
        self,
        key: str,
        stopped: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = lambda text: None,
        patience_s: float = PATIENCE_S,
    ) -> Iterator[None]:
        """Lets one thread at a time make the artifact of a key: of all processes where the place is in a file system, of this
        one where it is on an object store or another user's lock is refused (two that make the same do no harm).

        A run of this process is waited for as long as it takes: what hangs in it ends by itself. Of another process nobody sees
        how it gets on: ``tell`` hears when it takes more than a minute, and of such a refusal; after ``patience_s`` it is made
        here too. Raises Stopped where ``stopped`` turns true while another makes it, ConfigError where the place cannot be
        written.
        """

        def look() -> None:
            if stopped():
                raise Stopped(f"Stopped while another run makes the artifact {key[:12]} of {self.place}.")

        with contextlib.ExitStack() as stack:
            turn = turn_of(self.place, key)
            while not turn.acquire(timeout=_LOOK_S):
                look()
            stack.callback(turn.release)
            lock = self._at.lock(key, stack, tell)
            if lock is not None:
                holder, acquire = lock
                what = f"makes the artifact {key[:12]} of {self.place}"
                wait_for_turn(holder, acquire, what, patience_s, tell, look)
            yield

    @contextlib.contextmanager
    def making(self, key: str, run: str) -> Iterator[None]:
        """For the work of a ``run`` on the artifact of a key, in its turn. A NumericsError or DataError follows from the key
        alone: once one was raised in such a block, all others of this process raise it at once, with that run's name."""
        if key in self._failures:
            kind, reason = self._failures[key]
            raise kind(reason)
        try:
            yield
        except (NumericsError, DataError) as error:
            self._failures[key] = type(error), f"As in run {run}: {error}"
            raise

    @contextlib.contextmanager
    def linking(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Lets eight threads of this process :meth:`link` at a time. Raises Stopped where ``stopped`` turns true before."""
        while not self._links.acquire(timeout=_LOOK_S):
            if stopped():
                raise Stopped(f"Stopped while other runs take artifacts of {self.place}.")
        try:
            yield
        finally:
            self._links.release()

    def find(
        self,
        stage: str,
        key: str,
        verify: bool = False,
        outputs: Sequence[str] | None = None,
        doubted: bool = False,
        own_only: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Entry | None:
        """The entry, where every file of it is there with its size; another is removed. A place that cannot be read holds
        nothing.

        ``verify``: checks that its files are of their content (:func:`holds`). What this process added is of its content, but
        where it is ``doubted``: then all is read. On an object store content is checked when it is fetched.
        ``outputs``: the folders of a run that its files may be for: another entry would write over what other stages made, or
        the run's own files, and is removed too. ``own_only``: passes over what another user may have made, whose code would run
        with this user's rights. An object store does not say who made an entry.

        Raises Stopped where ``stopped`` turns true while content is checked."""
        try:
            used = self._at.used_at(stage, key)
            entry = None if used is None else self._read(stage, key, used)
            if entry is None:
                return None
            if own_only and not (self.is_own or self._is_of_user(entry)):
                return None
            is_whole = _is_within(entry, outputs) and self._has_sizes(entry)
            if not is_whole or ((verify or doubted) and not self._has_content(entry, doubted, stopped)):
                self._at.remove(stage, key)
                return None
            return entry
        except (OSError, ArtifactError):
            return None

    def link(self, entry: Entry, root: Path, stopped: Callable[[], bool] = lambda: False) -> list[Path]:
        """Puts an entry's files at their places in the run at ``root`` (:attr:`RunDirectory.root`); returns these.

        Each appears whole, and takes the place of what is there; :func:`emloc_ray.io.store.transfer.transfer` says how. Raises
        EntryGone where that cannot be done, for any reason, such as other content; then none of its files is in the run. Raises
        Stopped where ``stopped`` turns true before all are.
        """
        folder = self._at.folder(entry.stage, entry.key) / _FILES
        try:
            self._at.touch(entry.stage, entry.key)
            _transfer_all(folder, root, entry.files, verify=True, stopped=stopped)
        except (OSError, ArtifactError) as error:
            with contextlib.suppress(OSError, ArtifactError):
                for path in entry.files:
                    discard(root / path)
                if isinstance(error, (DamagedArtifactError, FileNotFoundError)):
                    self._at.remove(entry.stage, entry.key)
            raise EntryGone(f"{self.place} does not give {entry.stage} of {entry.origin}: {error}") from error
        return [root / path for path in entry.files]

    def add(self, stage: str, key: str, root: Path, files: Files, result: Mapping[str, Any], inputs: Any) -> str | None:
        """Takes in what the run at ``root`` has committed (``files`` as its manifest names them), unless it is there already;
        then makes room in ``max_bytes``, but never of this entry; what other processes add counts within the hour.

        Returns None, or why it could not be done (a full disk, a store out of reach): that is no failure of the run.
        """
        run, now = _run_name(root), time.time()
        entry = Entry(stage, key, files, result, inputs, created_at=now, used_at=now, origin=run)
        try:
            self._at.make()
            if self.find(stage, key) is None:
                self._write(entry, root)
                self._held += entry.bytes
            self._prune(self.max_bytes, key)
        except (OSError, EmlocError) as error:
            return f"{self.place} does not keep {stage} of {run}: {error}"
        return None

    def _write(self, entry: Entry, root: Path) -> None:
        content = json.dumps({name: getattr(entry, name) for name in _WRITTEN}, indent=2)
        with self._at.filling(entry.stage, entry.key, content.encode()) as folder:
            _transfer_all(root, folder / _FILES, entry.files)

    def entries(self) -> list[Entry]:
        """All entries, last used first."""
        used = {names: at for names, at in self._at.scan().items() if at is not None}
        entries = by_threads(_CONNECTIONS, lambda names: self._read(names[0], names[1], used[names]), used)
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: -entry.used_at)

    def prune(self, max_bytes: int) -> list[Entry]:
        """Removes the entries that were used longest ago until the rest takes no more than ``max_bytes``; returns them. A file
        that several entries share by hard links counts once. What killed writers left goes too, after an hour."""
        self._swept_at = self._weighed_at = -math.inf
        return self._prune(max_bytes, None)

    def _prune(self, max_bytes: int | None, kept: str | None) -> list[Entry]:
        if time.monotonic() - self._swept_at > _SWEEP_S:
            self._at.sweep()
            self._swept_at = time.monotonic()
        # To weigh it is to read every entry, and to look at every file.
        known, most = time.monotonic() - self._weighed_at <= _SWEEP_S, math.inf if max_bytes is None else max_bytes
        if known and self._held <= most:
            return []
        held = [(entry, self._blocks(entry)) for entry in self.entries()]
        users = Counter(block for _, blocks in held for block in blocks)
        total = sum({block: size for _, blocks in held for block, size in blocks.items()}.values())
        goal = most if kept is None or total <= most else (1 - _FREED) * most
        free = [(entry, blocks) for entry, blocks in held if self._at.can_free(entry.stage, entry.key)]
        if sum(entry.bytes for entry, _ in held) - sum(entry.bytes for entry, _ in free) > most:
            free = []  # what other users hold leaves no room, whatever goes
        removed = []
        for entry, blocks in reversed(free):
            if total <= goal:
                break
            if entry.key == kept:
                continue
            self._at.remove(entry.stage, entry.key)
            removed.append(entry)
            users.subtract(list(blocks))
            total -= sum(size for block, size in blocks.items() if users[block] == 0)
        self._held, self._weighed_at = total, time.monotonic()
        return removed

    def _blocks(self, entry: Entry) -> dict[Any, int]:
        """The sizes of an entry's files by what they are on the disk or in the store."""
        if self._at.store is not None:
            return {(entry.key, path): content["size"] for path, content in entry.files.items()}
        return {(file.st_dev, file.st_ino): file.st_size for file in self._held_files(entry).values()}

    def _read(self, stage: str, key: str, used_at: float) -> Entry | None:
        """None where there is none; one that cannot be understood is removed."""
        content = self._at.read(stage, key)
        if content is None:
            return None
        entry = _parsed(content, used_at)
        if entry is None or (entry.stage, entry.key) != (stage, key):
            self._at.remove(stage, key)
            return None
        return entry

    def _has_sizes(self, entry: Entry) -> bool:
        folder = self._at.folder(entry.stage, entry.key) / _FILES
        if self._at.store is not None:
            held = sizes(folder)
        else:
            held = {folder / path: file.st_size for path, file in self._held_files(entry).items()}
        return all(held.get(folder / path) == content["size"] for path, content in entry.files.items())

    @property
    def knows_owners(self) -> bool:
        """Whether it can give entries of this user alone; an object store does not say who made one."""
        return self.is_own or self._at.store is None

    def _is_of_user(self, entry: Entry) -> bool:
        owners = {file.st_uid for file in self._held_files(entry).values()}
        return self._at.store is None and owners | {self._at.owner(entry.stage, entry.key)} == {os.geteuid()}

    def _has_content(self, entry: Entry, doubted: bool, stopped: Callable[[], bool]) -> bool:
        """Whether each file is of its noted content; on a store that is asked only where it is ``doubted``."""
        if self._at.store is not None and not doubted:
            return True
        folder = self._at.folder(entry.stage, entry.key) / _FILES
        listed = ListedFiles(folder)

        def has_content(path: str) -> bool:
            sha256 = entry.files[path]["sha256"]
            with open_newest(folder / path, listed) as (stream, *_):
                return holds(stream, sha256, doubted) if self._at.store is None else digest_of(stream) == sha256

        return all(by_threads(_CONNECTIONS, has_content, entry.files, stopped))

    def _held_files(self, entry: Entry) -> dict[str, os.stat_result]:
        """An entry's files, without what is no file itself, such as a link. None in a store."""
        folder = self._at.folder(entry.stage, entry.key) / _FILES
        held: dict[str, os.stat_result] = {}
        for path in entry.files if self._at.store is None else ():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's may be closed
                status = (folder / path).lstat()
                if stat.S_ISREG(status.st_mode):
                    held[path] = status
        return held


_WRITTEN = ("stage", "key", "files", "result", "inputs", "created_at", "origin")


def _transfer_all(
    source: Path, target: Path, files: Files, verify: bool = False, stopped: Callable[[], bool] = lambda: False
) -> None:
    folders = {path.partition("/")[0] for path in files}
    listings = listing(source, folders), listing(target, folders)

    def one(path: str) -> None:
        content = files[path]
        transfer(source / path, target / path, content["size"], content["sha256"], *listings, verify)

    list(by_threads(_CONNECTIONS, one, files, stopped))


def _parsed(content: bytes, used_at: float) -> Entry | None:
    try:
        value = json.loads(content)
        for path, file in value["files"].items():
            if leads_out(path) or not isinstance(file["size"], int) or not file["sha256"]:
                return None
        if not isinstance(value["result"], dict):
            return None
        return Entry(**{name: value[name] for name in _WRITTEN}, used_at=used_at)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_within(entry: Entry, folders: Sequence[str] | None) -> bool:
    return folders is None or all(
        any(PurePosixPath(path).is_relative_to(one) for one in folders) for path in entry.files
    )


def _run_name(root: Path) -> str:
    here = origin(root)
    return root.name if here is None else here.store.prefix.rpartition("/")[2] or here.store.bucket
