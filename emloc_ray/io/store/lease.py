"""Who holds a run on an object store: an object replaced by compare-and-swap, renewed while its holder lives.

Each lease has a number above all before it, which stays when it is given back. A run inside a batch is held for as long as the
batch is: one lease is renewed, however many tasks run.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from emloc_ray.errors import ArtifactError, TakenOver
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import Version
from emloc_ray.io.store.places import above

KEY = "lock"
_CLOCK = "lock.clock"  # an object whose time is the store's own
RENEW_S = 10.0
STALE_S = 60.0
_REQUEST_S = 10.0
LEVELS = 2  # a batch's runs are its tasks/NAME


@dataclass(frozen=True)
class Holder:
    """The lease as it is: who wrote it ("": nobody holds it), its number, its version, another with each renewal, and when it
    was renewed, by the store's clock."""

    name: str
    token: str
    number: int
    version: Version
    renewed_at: float

    def is_stale(self, now: float) -> bool:
        """Whether nobody holds it, or its holder has missed several renewals: it is dead, or cut off from the store."""
        return not self.name or now - self.renewed_at > STALE_S


class Lease:
    """One process's hold on a run; :meth:`take` it, :meth:`check` it before what must not be done twice, give it back. All
    raise ArtifactError where the store does not answer, :meth:`take` ConfigError where the store has no conditional writes."""

    def __init__(self, store: ObjectStore, name: str, after: int = 0, under: Lease | None = None) -> None:
        """``after``: a number that its own is to be above, as of what is left of runs removed since: it is the time in s;
        ``under``: of what holds this one too, so many levels above as :data:`LEVELS`."""
        self.token: str = uuid.uuid4().hex if under is None else under.token
        self._under = under
        self.number = max(int(time.time()), after + 1)
        # A request that hangs must not outlast the lease.
        self._store, self._name = ObjectStore(store.uri, timeout_s=_REQUEST_S), name
        self._over = threading.Event()
        self._renewing = threading.Lock()
        self._failed: tuple[float, str] = -math.inf, ""  # when the last try that failed had begun, and why it did
        self._lost: str | None = None  # why it is held no longer
        self._version: Version | None = None
        self._renewed, self._count = -math.inf, 0
        self._thread: threading.Thread | None = None

    def take(self, tell: Callable[[Holder], None] = lambda holder: None) -> Holder | None:
        """Takes the lease, also from a holder that is stale; else returns who holds it. ``tell`` gets a holder that is not
        stale yet, which is then watched until it renews its hold, gives it back, or is stale."""
        current = _find(self._store)
        if current is not None and not current.is_stale(self._now()):
            tell(current)
            current = self._watched(current)
            if current is not None and not current.is_stale(self._now()):
                return current
        if current is not None:
            self.number = max(self.number, current.number + 1)
        begin = _monotonic()
        version = self._store.replace(KEY, self._content(self._name), None if current is None else current.version)
        if version is None:
            return _find(self._store) or Holder("another process", "", 0, {}, 0.0)
        self._version, self._renewed = version, begin
        if self._under is None:
            self._thread = threading.Thread(target=self._keep, daemon=True)
            self._thread.start()
        return None

    def check(self) -> None:
        """Raises TakenOver where it was given back, or another process has taken it, because this one could not renew it in
        time. Where the last renewal is old, it is renewed here and now: nobody else takes it within the next ``STALE_S / 2``. A
        try that failed is one of all threads that waited for it: each takes half a minute where the store does not answer."""
        if self._under is not None:
            self._under.check()
            return
        asked = _monotonic()
        if self._is_due():
            with self._renewing:
                if self._is_due():  # still: a renewal that was under way may have ended well
                    if self._failed[0] > asked:
                        raise ArtifactError(self._failed[1])
                    self._renew()
        if self._lost is not None:
            raise TakenOver(self._lost)

    @property
    def age_s(self) -> float:
        """Seconds since it was last renewed."""
        return _monotonic() - self._renewed if self._under is None else self._under.age_s

    def give_back(self) -> None:
        """Lets others take it at once; threads that are left do not take it back."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with self._renewing:
            if self._lost is None:
                self._lost = "This run was given back: run the same command again."
                with contextlib.suppress(Exception):  # it goes stale by itself
                    self._store.replace(KEY, self._content(""), self._version)

    def _keep(self) -> None:
        while self._lost is None and not self._over.wait(RENEW_S):
            # A store that cannot be reached now: the next renewal tells, or the next check.
            with contextlib.suppress(Exception), self._renewing:
                self._renew()

    def _is_due(self) -> bool:
        return self._lost is None and _monotonic() - self._renewed > STALE_S / 2

    def _renew(self) -> None:
        begin = _monotonic()
        try:
            self._replace()
        except ArtifactError as error:
            self._failed = begin, str(error)
            raise

    def _replace(self) -> None:
        begin = _monotonic()
        version = self._store.replace(KEY, self._content(self._name), self._version)
        if version is None:
            current = _find(self._store)
            if current is not None and current.token == self.token:  # an earlier renewal, whose answer was lost
                version = self._store.replace(KEY, self._content(self._name), current.version)
        if version is None:
            current = _find(self._store)
            if current is not None and current.token == self.token:
                raise ArtifactError(f"{self._store.uri} does not renew {KEY}: run the same command again.")
            name = current.name if current is not None and current.name else "another process"
            self._lost = f"This run was taken over by {name}: leave it to that, or stop that first."
            return
        self._version, self._renewed = version, begin

    def _content(self, name: str) -> bytes:
        self._count += 1
        held = {"holder": name, "token": self.token, "number": self.number, "count": self._count}
        return json.dumps(held if self._under is None else {**held, "under": True}).encode()

    def _now(self) -> float:
        """The store's clock, so that those of the nodes do not matter."""
        self._store.write(_CLOCK, b"")
        clock = self._store.find(_CLOCK)
        return time.time() if clock is None else clock.modified

    def _watched(self, current: Holder) -> Holder | None:
        """What becomes of a holder: renewed, stale, or None where its object is gone; after ``STALE_S`` at most."""
        begin = _monotonic()
        last: Holder | None = current
        while last is not None and (last.version, last.renewed_at) == (current.version, current.renewed_at):
            if _monotonic() - begin > STALE_S or last.is_stale(self._now()):
                return Holder("", last.token, last.number, last.version, last.renewed_at)
            time.sleep(min(1.0, RENEW_S))
            last = _find(self._store)
        return last


def find_holder(store: ObjectStore) -> str | None:
    """The process that holds the run at ``store`` and is alive by this machine's clock, or None; nothing is written. Raises
    ArtifactError where the store does not answer."""
    current = _find(store)
    return None if current is None or current.is_stale(time.time()) else current.name


def _find(store: ObjectStore) -> Holder | None:
    stored = store.read_version(KEY)
    if stored is None:
        return None
    version, content = stored
    listed = store.find(KEY)
    renewed_at = 0.0 if listed is None else listed.modified
    try:
        value = json.loads(content)
        if value.get("under") and value["holder"]:
            batch = _find(ObjectStore(above(store.uri, LEVELS)))
            renewed_at = batch.renewed_at if batch is not None and batch.token == value["token"] else 0.0
        return Holder(str(value["holder"]), str(value["token"]), int(value.get("number", 0)), version, renewed_at)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Holder("another process", "", 0, version, renewed_at)


def _monotonic() -> float:
    """Seconds of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
