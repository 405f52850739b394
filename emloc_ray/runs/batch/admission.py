"""Which waiting stages of many tasks may start on the resources there are.

Ray places work, moves data and tries again, but knows neither priorities nor owners: it is handed no more than fits, in
the order decided here. No ray in this module: the capacity is handed in.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from emloc_ray.errors import Stopped

_ROUNDING = 1e-9  # relative: sums of fractions of GPUs are not exact
_TICK_S = 0.5  # a waiting thread looks this often whether it was stopped


@dataclass(frozen=True)
class Amount:
    """Resources of a worker, a stage or a cluster; memory in bytes."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.cpus + other.cpus, self.gpus + other.gpus, self.memory + other.memory)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.cpus - other.cpus, self.gpus - other.gpus, self.memory - other.memory)

    def __mul__(self, times: float) -> Amount:
        return Amount(self.cpus * times, self.gpus * times, self.memory * times)

    def beside(self, other: Amount) -> tuple[tuple[float, float], ...]:
        """Each dimension with the other's."""
        return (self.cpus, other.cpus), (self.gpus, other.gpus), (self.memory, other.memory)

    def fits_in(self, other: Amount) -> bool:
        """Whether no dimension exceeds the other's by more than rounding."""
        return all(mine <= theirs + _ROUNDING * max(1.0, abs(theirs)) for mine, theirs in self.beside(other))

    def dominant_share(self, capacity: Amount) -> float:
        """``max_d self_d / capacity_d``, at most 1: the fraction of a cluster that nobody else can have meanwhile (dominant
        resource fairness, Ghodsi et al. 2011)."""
        pairs = self.beside(capacity)
        return max((mine / theirs if mine < theirs else 1.0 for mine, theirs in pairs if mine > 0), default=0.0)


@dataclass(frozen=True)
class Need:
    """What a stage asks for: ``workers`` of them, or no fewer than ``least`` where they share a bag of tasks; a stage whose
    workers work in step has ``least == workers``."""

    per_worker: Amount
    workers: int
    least: int

    def __post_init__(self) -> None:
        """Raises ValueError unless ``1 <= least <= workers``."""
        if not 1 <= self.least <= self.workers:
            raise ValueError(f"A stage asks for {self.least} to {self.workers} workers: give 1 <= least <= workers.")

    def workers_in(self, free: Amount) -> int:
        """How many workers ``free`` has room for, up to ``workers``; 0 where that is fewer than ``least``."""
        count = float(self.workers)
        for each, left in self.per_worker.beside(free):
            if each > 0 and each * count > left:
                count = math.floor(left / each + _ROUNDING)
        return int(count) if count >= self.least else 0


@dataclass(frozen=True)
class Standing:
    """What decides a task's place: ``due`` on the queue's clock, ``remaining`` the seconds that all its stages still to
    come are expected to take, the one that asks included."""

    task: str
    priority: int = 0
    owner: str = ""
    due: float | None = None
    remaining: float = 0.0


@dataclass(frozen=True)
class Ticket:
    """A stage of a task that waits since ``since``; numbered in the order of asking."""

    number: int
    standing: Standing
    stage: str
    need: Need
    since: float


@dataclass(frozen=True)
class Grant:
    """What a stage holds since ``since``; ``share`` is its dominant share of the capacity of that moment."""

    ticket: Ticket
    workers: int
    since: float
    share: float

    @property
    def amount(self) -> Amount:
        """Of all its workers."""
        return self.ticket.need.per_worker * self.workers


class AdmissionQueue:
    """Orders waiting stages and grants what fits; not for several threads, and with a clock that never goes back.

    The order: (1) higher priority; (2) who would miss the deadline unless started now, ``due - now <= remaining``, earliest
    due first; (3) the owner with the least share-seconds used, running stages counted up to now, and among equals the one
    that holds less; (4) longest expected remaining; (5) who asked first.

    What does not fit is passed over by later ones that do. When the first in order has been passed over for ``patience``
    seconds it comes before (3), and nothing behind it starts until it does. What could never fit is granted while nothing
    else is held, with ``least`` workers, and alone: a cluster may grow on demand, an estimate of memory may be too high.
    """

    def __init__(self, clock: Callable[[], float], patience: float = 60.0) -> None:
        self._clock, self._patience = clock, patience
        self._numbers = itertools.count()
        self._waiting: dict[int, Ticket] = {}
        self._held: dict[int, Grant] = {}
        self._in_use = Amount()
        self._passed_over: dict[int, float] = {}  # since when, of tickets that were first in order
        self._settled: dict[str, float] = {}  # share-seconds of what owners have released
        self._seen: dict[str, float] = {}  # when an owner last asked, withdrew or released

    def ask(self, standing: Standing, stage: str, need: Need) -> Ticket:
        """Puts a stage into the queue.

        An owner who is new, or was away for longer than ``patience``, starts at the least used of those present, as in
        stride scheduling: not at zero, or everybody else would wait until it has caught up. A shorter absence, such as a
        task's between two stages, costs an owner nothing of what it is behind.
        """
        now, owner = self._clock(), standing.owner
        present = {g.ticket.standing.owner for g in self._held.values()}
        present |= {ticket.standing.owner for ticket in self._waiting.values()}
        known = owner in self._settled
        if owner not in present and not (known and now - self._seen[owner] <= self._patience):
            used = self.used()
            least = min((used[name] for name in present or used), default=0.0)
            self._settled[owner] = max(self._settled.get(owner, 0.0), least)
        self._seen[owner] = now
        ticket = Ticket(next(self._numbers), standing, stage, need, now)
        self._waiting[ticket.number] = ticket
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Takes a stage out of the queue; nothing where it does not wait."""
        if self._waiting.pop(ticket.number, None):
            self._passed_over.pop(ticket.number, None)
            self._seen[ticket.standing.owner] = self._clock()

    def lift(self, task: str, priority: int) -> None:
        """Gives what a task waits with at least this priority."""
        for number, ticket in self._waiting.items():
            if ticket.standing.task == task and ticket.standing.priority < priority:
                standing = dataclasses.replace(ticket.standing, priority=priority)
                self._waiting[number] = dataclasses.replace(ticket, standing=standing)

    def release(self, grant: Grant) -> None:
        """Gives back what a stage held; nothing where it was given back before."""
        if not self._held.pop(grant.ticket.number, None):
            return
        now, owner = self._clock(), grant.ticket.standing.owner
        self._settled[owner] += grant.share * (now - grant.since)
        self._seen[owner] = now
        self._in_use = self._in_use - grant.amount if self._held else Amount()

    def admit(self, capacity: Amount) -> list[Grant]:
        """What may start now, first in order first; a capacity below what is held only delays."""
        if not self._in_use.fits_in(capacity):
            return []
        now = self._clock()
        granted: list[Grant] = []
        free, running = capacity - self._in_use, self._running()
        first: Ticket | None = None  # of those that do not fit
        for ticket in self._in_order(now, running):
            workers = ticket.need.workers_in(free) or (0 if self._held else ticket.need.least)
            if workers:
                grant = self._grant(ticket, workers, now, capacity)
                granted.append(grant)
                running[ticket.standing.owner] = running.get(ticket.standing.owner, 0.0) + grant.share
                if first:
                    self._passed_over.setdefault(first.number, now)
                if not self._in_use.fits_in(capacity):
                    break
                free = capacity - self._in_use
            elif self._has_waited(ticket, now):
                break
            else:
                first = first or ticket
        return granted

    def waiting(self) -> list[Ticket]:
        """All that wait, in today's order."""
        return list(self._in_order(self._clock(), self._running()))

    def held(self) -> list[Grant]:
        """All that is held, in the order of granting."""
        return list(self._held.values())

    def used(self) -> dict[str, float]:
        """Share-seconds by owner: the dominant share of each grant times the seconds it was held, or is held by now."""
        now, used = self._clock(), dict(self._settled)
        for grant in self._held.values():
            used[grant.ticket.standing.owner] += grant.share * (now - grant.since)
        return used

    def _grant(self, ticket: Ticket, workers: int, now: float, capacity: Amount) -> Grant:
        amount = ticket.need.per_worker * workers
        grant = Grant(ticket, workers, now, amount.dominant_share(capacity))
        del self._waiting[ticket.number]
        self._passed_over.pop(ticket.number, None)
        self._held[ticket.number] = grant
        self._in_use += amount
        return grant

    def _running(self) -> dict[str, float]:
        """The shares that owners hold now."""
        running: dict[str, float] = {}
        for grant in self._held.values():
            owner = grant.ticket.standing.owner
            running[owner] = running.get(owner, 0.0) + grant.share
        return running

    def _has_waited(self, ticket: Ticket, now: float) -> bool:
        return now - self._passed_over.get(ticket.number, now) > self._patience

    def _in_order(self, now: float, running: dict[str, float]) -> Iterator[Ticket]:
        """Lazily: who adds to ``running`` what is granted on the way has it counted in the order of the rest."""
        used = self.used()

        def place(ticket: Ticket) -> tuple[int, int, float]:
            standing = ticket.standing
            if standing.due is not None and standing.due - now <= standing.remaining:
                return -standing.priority, 0, standing.due
            if self._has_waited(ticket, now):
                return -standing.priority, 1, self._passed_over[ticket.number]
            return -standing.priority, 2, 0.0

        placed = sorted(((place(ticket), ticket) for ticket in self._waiting.values()), key=lambda pair: pair[0])
        for _, equals in itertools.groupby(placed, key=lambda pair: pair[0]):
            yield from _by_owner((ticket for _, ticket in equals), used, running)


def _by_owner(tickets: Iterable[Ticket], used: dict[str, float], running: dict[str, float]) -> Iterator[Ticket]:
    """Each next of the owner with the least used, then the least running; an owner's own longest first, then as asked."""
    queues: dict[str, list[tuple[float, int, Ticket]]] = {}
    for ticket in tickets:
        entry = (-ticket.standing.remaining, ticket.number, ticket)
        queues.setdefault(ticket.standing.owner, []).append(entry)
    for queue in queues.values():
        queue.sort(reverse=True)

    def turn(owner: str) -> tuple[float, float, float, int, str]:
        return used[owner], running.get(owner, 0.0), *queues[owner][-1][:2], owner

    turns = [turn(owner) for owner in queues]
    heapq.heapify(turns)
    while turns:
        owner = heapq.heappop(turns)[-1]
        yield queues[owner].pop()[-1]
        if queues[owner]:
            heapq.heappush(turns, turn(owner))


@dataclass(frozen=True)
class Snapshot:
    """For display: who waits, in order, and what is held; ``capacity`` is None until it was asked for."""

    waiting: tuple[Ticket, ...]
    held: tuple[Grant, ...]
    capacity: Amount | None


class Admission:
    """The queue for threads, one for each task: each waits for its own event, so that a release wakes whom it lets start.

    A thread that holds a grant must not ask for another: what has to run alone would wait for it, and it for that.
    """

    def __init__(
        self,
        capacity: Callable[[], Amount],
        clock: Callable[[], float] = time.monotonic,
        refresh_s: float = 1.0,
        patience: float = 60.0,
    ) -> None:
        """``capacity`` may be slow: a thread that waits calls it, at most every ``refresh_s`` and never two at once."""
        self._ask_capacity, self._clock, self._refresh_s = capacity, clock, refresh_s
        self._queue = AdmissionQueue(clock, patience)
        self._lock = threading.Lock()  # of all below, and of the queue
        self._events: dict[int, threading.Event] = {}
        self._grants: dict[int, Grant] = {}
        self._capacity: Amount | None = None
        self._asked_at = -math.inf
        self._asking = False

    @contextmanager
    def admitted(
        self,
        standing: Standing,
        stage: str,
        need: Need,
        stopped: Callable[[], bool],
        lifted: Callable[[Standing], Standing] = lambda standing: standing,
    ) -> Iterator[int]:
        """Waits until the stage may start, gives its number of workers, and releases them at the end of the block.

        ``lifted`` gives the standing to wait with; asked under the lock, so that a :meth:`lift` comes either before or after.

        Raises:
            Stopped: ``stopped()`` turned true before the stage could start.
        """
        with self._lock:
            ticket = self._queue.ask(lifted(standing), stage, need)
            event = self._events[ticket.number] = threading.Event()
        try:
            yield self._wait(ticket, event, stopped).workers
        finally:
            with self._lock:
                del self._events[ticket.number]
                grant = self._grants.pop(ticket.number, None)
                if grant:
                    self._queue.release(grant)
                else:
                    self._queue.withdraw(ticket)
                self._admit()

    def lift(self, task: str, priority: int) -> None:
        """Gives what a task waits with at least this priority."""
        with self._lock:
            self._queue.lift(task, priority)
            self._admit()

    def wake(self) -> None:
        """Has every waiting thread look at once whether it was stopped."""
        with self._lock:
            for event in self._events.values():
                event.set()

    def waiting(self) -> Snapshot:
        """Who waits since when, in order, and what is held."""
        with self._lock:
            return Snapshot(tuple(self._queue.waiting()), tuple(self._queue.held()), self._capacity)

    def _wait(self, ticket: Ticket, event: threading.Event, stopped: Callable[[], bool]) -> Grant:
        if not self._refresh():
            with self._lock:
                self._admit()
        while True:
            if stopped():
                raise Stopped(f"Task {ticket.standing.task} was stopped before its stage {ticket.stage} could start.")
            with self._lock:
                grant = self._grants.get(ticket.number)
            if grant:
                return grant
            event.wait(_TICK_S)
            event.clear()  # before the grant is looked for, so that none is missed
            self._refresh()

    def _refresh(self) -> bool:
        """Asks for the capacity where it is old, without the lock, and admits by it; whether somebody does so."""
        with self._lock:
            if self._asking:
                return True
            if self._clock() - self._asked_at < self._refresh_s:
                return False
            self._asking = True
        capacity = None
        try:
            capacity = self._ask_capacity()
        finally:
            with self._lock:
                self._asking, self._asked_at = False, self._clock()
                self._capacity = capacity or self._capacity
                self._admit()
        return True

    def _admit(self) -> None:
        """With the lock held."""
        if self._capacity is None:
            return
        for grant in self._queue.admit(self._capacity):
            self._grants[grant.ticket.number] = grant
            self._events[grant.ticket.number].set()
