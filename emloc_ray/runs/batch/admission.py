"""Decides which waiting stages of many tasks start, by order and by what fits: Ray places work, moves data and retries, but has
no priorities."""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from emloc_ray.errors import Stopped

_ROUNDING = 1e-9  # relative: sums of fractions of GPUs are not exact
_TICK_S = 0.5  # how often a waiting thread checks whether it was stopped


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

    def pairs(self, other: Amount) -> tuple[tuple[float, float], ...]:
        """Each dimension with the other's."""
        return (self.cpus, other.cpus), (self.gpus, other.gpus), (self.memory, other.memory)

    def smaller(self, other: Amount) -> Amount:
        """The smaller of the two in each dimension."""
        return Amount(*(min(pair) for pair in self.pairs(other)))

    def larger(self, other: Amount) -> Amount:
        """The larger of the two in each dimension."""
        return Amount(*(max(pair) for pair in self.pairs(other)))

    def fits_in(self, other: Amount) -> bool:
        """Whether no dimension exceeds the other's by more than rounding."""
        return all(mine <= theirs + _ROUNDING * max(1.0, abs(theirs)) for mine, theirs in self.pairs(other))


@dataclass(frozen=True)
class Need:
    """The workers that a stage asks for: ``workers``, or any number from ``least`` up where they share a bag of tasks. A stage
    whose workers work in step has ``least == workers``; ``1 <= least <= workers``."""

    per_worker: Amount
    workers: int
    least: int

    def workers_in(self, free: Amount) -> int:
        """How many workers fit in ``free``, up to ``workers``; 0 where that is fewer than ``least``."""
        count = float(self.workers)
        for each, left in self.per_worker.pairs(free):
            if each > 0 and each * count > left:
                count = math.floor(left / each + _ROUNDING)
        return int(count) if count >= self.least else 0


@dataclass(frozen=True, eq=False)
class Ticket:
    """A task's request to run a stage; a smaller ``order`` goes first."""

    task: str
    stage: str
    order: int
    need: Need


class AdmissionQueue:
    """Waiting and running stages of all tasks; not for several threads.

    Stages start in order. One that does not fit waits, and later ones start only where they leave it room: the first
    waiting stage needs ``n``, running stages behind it hold ``b``, and another starts behind it only where it fits in the
    free resources and in ``capacity - n - b``. So it starts once the stages ahead of it have ended.

    A stage that exceeds the whole capacity reserves nothing. It starts when nothing else runs, alone and with ``least``
    workers: a cluster may grow on demand, an estimate of memory may be too high.
    """

    def __init__(self) -> None:
        self.waiting: list[Ticket] = []  # in order
        self.running: dict[Ticket, int] = {}  # with their workers

    def ask(self, ticket: Ticket) -> None:
        """Puts a stage into the queue, behind those of the same order."""
        bisect.insort(self.waiting, ticket, key=lambda other: other.order)

    def leave(self, ticket: Ticket) -> None:
        """Takes a stage out, whether it waits or runs."""
        if self.running.pop(ticket, None) is None and ticket in self.waiting:
            self.waiting.remove(ticket)

    def admit(self, capacity: Amount) -> dict[Ticket, int]:
        """Starts all stages that may start now, and returns them with their workers."""
        started: dict[Ticket, int] = {}
        in_use = self._held()
        # What must stay free of later stages: the first one's need, and what runs behind it.
        behind: Amount | None = None
        for ticket in tuple(self.waiting):
            if not in_use.fits_in(capacity):
                break
            free = capacity - in_use
            need = ticket.need
            workers = need.workers_in(free if behind is None else free.smaller(capacity - behind))
            if not workers and not self.running:
                workers = need.least
            if workers:
                started[ticket] = self.running[ticket] = workers
                self.waiting.remove(ticket)
                in_use += need.per_worker * workers
                if behind is not None:
                    behind += need.per_worker * workers
            elif behind is None and need.workers_in(capacity):
                behind = need.per_worker * need.least + self._held(after=ticket.order)
        return started

    def _held(self, after: float = -math.inf) -> Amount:
        """What the running stages hold, those behind an order alone."""
        amounts = (ticket.need.per_worker * n for ticket, n in self.running.items() if ticket.order > after)
        return sum(amounts, Amount())


class Admission:
    """The queue for threads, one a task: each waits until its stage may start. A thread must not ask for a second stage while
    its first one runs: each could wait for the other."""

    def __init__(self) -> None:
        self.queue = AdmissionQueue()
        self._capacity: Amount | None = None  # nothing starts before it is known
        self._changed = threading.Condition()  # guards both above

    def update(self, capacity: Amount) -> None:
        """Sets the capacity of the cluster as it is now."""
        with self._changed:
            self._capacity = capacity
            self._admit()

    @contextmanager
    def admitted(self, ticket: Ticket, stopped: Callable[[], bool]) -> Iterator[int]:
        """Waits until the stage may start, gives its number of workers, and releases them at the end of the block. What hangs in
        those ahead ends by itself. Raises Stopped where ``stopped()`` turned true before the stage could start."""
        try:
            yield self._wait(ticket, stopped)
        finally:
            with self._changed:
                self.queue.leave(ticket)
                self._admit()

    def _wait(self, ticket: Ticket, stopped: Callable[[], bool]) -> int:
        with self._changed:
            self.queue.ask(ticket)
            self._admit()
            while not stopped():
                if ticket in self.queue.running:
                    return self.queue.running[ticket]
                self._changed.wait(_TICK_S)
        raise Stopped(f"Task {ticket.task} was stopped before its stage {ticket.stage} could start.")

    def _admit(self) -> None:
        if self._capacity is not None and self.queue.admit(self._capacity):
            self._changed.notify_all()
