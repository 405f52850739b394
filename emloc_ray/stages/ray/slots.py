"""Slots: tasks that each work off a fixed list of units in order, restarted where they are lost.

A task and no actor: its process, in which torch and transformers are imported, serves the next stage too.
"""

from __future__ import annotations

import bisect
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emloc_ray.stages.ray.departures import Departures
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.spans import Timed, tell_span, timed
from emloc_ray.stages.ray.tasks import LOOK_S, Flight, FlightTask, Next, Progress, Resources, remote_task, silent

LEFT = -2  # no unit's number


def start_slot(
    resources: Resources,
    name: str,
    units: Sequence[int],
    make: Callable[..., Any],
    *arguments: Any,
    node: str | None = None,
) -> Any:
    """Starts a task that works off ascending ``units`` in the slot that ``make(*arguments)`` makes. Returns the generator of
    what :func:`work_off` yields; a unit begins once the result of the one before was taken.

    ``name``: in Ray's dashboard. ``node``: where it begins, by Ray's id; on any other where that node is gone.
    """
    options: dict[str, Any] = {
        **resources.task_options(),
        "num_returns": "streaming",
        "_generator_backpressure_num_objects": 1,
    }
    return remote_task(work_off, **options).options(name=name, **begun_on(node)).remote(list(units), make, *arguments)


def begun_on(node: str | None) -> dict[str, Any]:
    """The options of a Ray task that begins on a node, by Ray's id, and on any other where that node is gone; none for None."""
    return {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


def work_off(units: Sequence[int], make: Callable[..., Any], *arguments: Any) -> Iterator[Timed | None]:
    """Yields None once it has begun, for until then it may wait for a worker; the slot's last safe unit, or -1; each later unit
    when it is done; then None when all is committed. Ends with :data:`LEFT` where its node is about to leave; what is done is
    committed by then."""
    made: list[Any] = []
    departures = Departures()

    def begin() -> int:
        made.append(make(*arguments))
        return made[0].position()

    yield None
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
    planned_s: float = 0.0,
    max_lead: int | None = None,
    beside: Flight | None = None,
) -> None:
    """Runs a task for each slot: ``start(slot)`` begins it (:func:`start_slot`), and it does ``work[slot]``, ascending units,
    which people call ``unit_name``.

    ``done(slot, unit)`` is called with every finished unit, after a resume with the last one alone. A lost task is restarted
    and reports its progress. ``safe[slot]``: the last unit of an earlier try, where known; a slot at its end is not begun.
    ``planned_s``: as for :class:`Pace`. A slot that is ``max_lead`` units ahead of the slowest that runs does one more, then
    waits; None: it never does. ``beside``: tasks that use up units which all slots have done. Slots are ahead by as many units
    less as it has tasks left; where those are ``max_lead``, even the slowest waits. Raises StageError where a slot is lost more
    often than ``losses`` allows, either at one unit, or before it begins while no unit is done.
    """
    slots = [
        _Slot(number, units, last, start, unit_name, done)
        for number, (units, last) in enumerate(zip(work, safe or [-1] * len(work), strict=True))
    ]
    total = sum(map(len, work))
    beside = beside or Flight(1, losses)

    def tell_progress() -> None:  # raises where the run is to stop
        progress(sum(slot.count for slot in slots), total)

    with Flight(len(slots), losses, planned_s, force=True) as flight:
        for slot in slots:
            if slot.count < len(slot.units):
                flight.add(slot)
        tell_progress()
        while flight.pump(0.0 if flight.held else LOOK_S):
            tell_progress()
            beside.pump(LOOK_S if flight.held else 0.0)
            if max_lead is not None:
                most = max_lead - beside.left + min((slot.count for slot in slots if slot.runs), default=total)
                for slot in slots:
                    slot.most = most


class _Slot(FlightTask):
    """A slot, of whose ascending ``units`` the first ``count`` are done."""

    def __init__(
        self,
        number: int,
        units: Sequence[int],
        safe: int,
        start: Callable[[int], Any],
        unit_name: str,
        done: Callable[[int, int], None],
    ) -> None:
        super().__init__(f"slot {number}", self._start, opens=True)
        self.number, self.units, self.start, self.unit_name, self.done = number, units, start, unit_name, done
        self.count = self.reached = bisect.bisect_right(units, safe)
        self.runs = False  # until it has told where it goes on; it may wait for a worker
        self.most: float = math.inf  # units that it may have done before others go on
        self._at = "its start"

    def _start(self) -> Any:
        self.name, self.runs, self._at = f"slot {self.number}", False, "its start"
        return self.start(self.number)

    def waits(self) -> bool:
        """Whether it is so far ahead of others that what it has done is not taken yet."""
        return self.runs and self.count >= self.most

    def take(self, given: Timed, losses: Losses) -> Next:
        """A unit that is done, the slot's end, or that it leaves its node."""
        worker, unit = f"slot {self.number} on {given.span.worker.partition(' on ')[2]}", given.result
        tell_span(dataclasses.replace(given.span, stage=losses.stage, worker=worker, unit=self._at))
        if unit is None:  # committed to the end
            self.runs = False
            return "over"
        if unit == LEFT:
            losses.tell(
                f"{losses.stage}: slot {self.number} leaves a node that is about to go, and continues from {self._at}."
            )
            return "again"
        self.runs, self.count = True, bisect.bisect_right(self.units, unit)
        self.reached = max(self.reached or 0, self.count)  # a unit that is done again is none
        if unit >= 0:
            self.done(self.number, unit)
        self._at = f"{self.unit_name} {self.units[self.count]}" if self.count < len(self.units) else "its end"
        self.name = f"slot {self.number} at {self._at}"
        return "more"
