"""Slots: tasks that each work off a fixed list of units in order, restarted where they are lost.

A task and no actor: its process, in which torch and transformers are imported, serves the next stage too.
"""

from __future__ import annotations

import bisect
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emloc_ray.stages.ray.departures import Departures
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.pace import Pace
from emloc_ray.stages.ray.spans import Span, Timed, tell_span, timed
from emloc_ray.stages.ray.tasks import Progress, Resources, remote_task, silent

_LOOK_S = 1.0
LEFT = -2  # no unit's number


def start_slot(
    resources: Resources,
    name: str,
    units: Sequence[int],
    make: Callable[..., Any],
    *arguments: Any,
    node: str | None = None,
) -> Any:
    """A task, by its name in Ray's dashboard, that works off ascending ``units`` in the slot that ``make(*arguments)`` makes:
    the generator of what :func:`work_off` yields. It goes on to a unit once what it gave before was taken.

    ``node``: where it begins, by Ray's id; on any other where that node is gone.
    """
    options: dict[str, Any] = {
        **resources.task_options(),
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": 1,
    }
    where = {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}
    return remote_task(work_off, **options).options(name=name, **where).remote(list(units), make, *arguments)


def work_off(units: Sequence[int], make: Callable[..., Any], *arguments: Any) -> Iterator[Timed]:
    """The slot's last unit that is safe, or -1; then each unit after it once it is worked off; None once all is committed.

    :data:`LEFT` at last where its node is about to leave: what is worked off is committed.
    """
    made: list[Any] = []
    departures = Departures()

    def begin() -> int:
        made.append(make(*arguments))
        position: int = made[0].position()
        return position

    try:
        begun: Timed = timed(begin)()
        yield begun
        for unit in units:
            if unit > begun.result:
                if departures.here():
                    yield dataclasses.replace(timed(made[0].commit, goes_on=True)(), result=LEFT)
                    return
                yield timed(made[0].accumulate, goes_on=True)(unit)
        yield timed(made[0].commit, goes_on=True)()
    finally:
        made.clear()  # a model and its hooks hold one another
        gc.collect()


def run_slots(
    start: Callable[[int], Any],
    work: Sequence[Sequence[int]],
    unit_name: str,
    losses: Losses,
    progress: Progress = silent,
    done: Callable[[int, int], None] = lambda slot, unit: None,
    safe: Sequence[int] | None = None,
) -> None:
    """Has ``work[slot]``, a list of ascending units, worked off by the task that ``start(slot)`` begins: :func:`start_slot`.

    ``done(slot, unit)`` is called with every finished unit, after a resume with the last one alone. A lost task is restarted
    and says how far it had come. ``unit_name`` is what people call a unit. ``safe[slot]``, where that is known: the last
    unit of an earlier try; a slot that is at its end is not begun.

    Raises:
        StageError: where a slot is lost at one unit more often than ``losses`` allows.
    """
    slots = _Slots(start, work, unit_name, losses, done, safe or [-1] * len(work))
    try:
        while slots.running or slots.resting:
            slots.begin()
            losses.look()
            progress(slots.done_units, slots.total)  # raises where the run is to stop
            slots.end_overdue()
            for task in _first_ready(list(slots.running), min(slots.resting.values(), default=math.inf)):
                slots.take(task)
    finally:
        for task in slots.running:  # none, unless something failed: nobody waits for them any more
            ray.cancel(task, force=True)


class _Slots:
    """What :func:`run_slots` knows of its slots.

    Attributes:
        running: the slot of each task.
        resting: when each other slot that is not at its end may begin, by the monotonic clock.
        done_units, total: how many units of all slots are done, and there are.
    """

    def __init__(
        self,
        start: Callable[[int], Any],
        work: Sequence[Sequence[int]],
        unit_name: str,
        losses: Losses,
        done: Callable[[int, int], None],
        safe: Sequence[int],
    ) -> None:
        self.start, self.work, self.unit_name, self.losses, self.done = start, work, unit_name, losses, done
        self._counts = [bisect.bisect_right(units, unit) for units, unit in zip(work, safe, strict=True)]
        self.running: dict[Any, int] = {}
        self.resting = {slot: 0.0 for slot, count in enumerate(self._counts) if count < len(work[slot])}
        self.done_units, self.total = sum(self._counts), sum(len(units) for units in work)
        self._at: dict[int, str] = {}  # what each slot is at
        self._pace = Pace()

    def begin(self) -> None:
        """Starts the slots whose time has come."""
        for slot in [slot for slot, begin in self.resting.items() if begin <= time.monotonic()]:
            del self.resting[slot]
            self.running[self.start(slot)] = slot
            self._at[slot] = "its start"

    def end_overdue(self) -> None:
        """Ends the tasks that gave nothing for much longer than units take; they begin again."""
        for task, waited_s, usual_s in self._pace.end_overdue():
            slot = self.running.pop(task)
            delay = self.losses.give_up_waiting(f"slot {slot} at {self._at[slot]}", waited_s, usual_s)
            self.resting[slot] = time.monotonic() + delay

    def take(self, task: Any) -> None:
        """Takes what a task gives: a unit that is done, its end, or that it was lost."""
        slot = self.running[task]
        where = self._at[slot]
        try:
            given: Timed = ray.get(next(task))
        except ray.exceptions.RayError as error:
            self._over(task)  # its worker may be at another's work, which a cancel would kill
            piece = f"slot {slot}" if where == "its start" else f"slot {slot} at {where}"
            delay = self.losses.count(piece, error)
            self.resting[slot] = time.monotonic() + delay
            return
        losses, unit = self.losses, given.result
        worker = f"slot {slot} on {given.worker.partition(' on ')[2]}"
        tell_span(Span(losses.stage, worker, where, given.begun_at, given.finished_at, **given.peaks))
        self._pace.gave(task)
        if unit is None:  # committed to the end
            self._over(task)
        elif unit == LEFT:
            self._over(task)
            self.resting[slot] = 0.0
            losses.tell(f"{losses.stage}: slot {slot} leaves a node that is about to go, and continues from {where}.")
        else:
            self._reach(slot, unit)

    def _over(self, task: Any) -> None:
        del self.running[task]
        self._pace.over(task)

    def _reach(self, slot: int, unit: int) -> None:
        units = self.work[slot]
        count = bisect.bisect_right(units, unit)
        self.done_units += count - self._counts[slot]
        self._counts[slot] = count
        if unit >= 0:
            self.done(slot, unit)
        self._at[slot] = f"{self.unit_name} {units[count]}" if count < len(units) else "its end"


def _first_ready(tasks: list[Any], until: float) -> list[Any]:
    """The first of these that has something to take, or none by the time ``until``, or after a second."""
    rest = min(_LOOK_S, max(0.0, until - time.monotonic()))
    if tasks:
        ready: list[Any] = ray.wait(tasks, num_returns=1, timeout=rest)[0]
        return ready
    time.sleep(rest)
    return []
