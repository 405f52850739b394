"""Slots: tasks that each work off a fixed list of units in order, restarted where they are lost.

A task and no actor: its process, in which torch and transformers are imported, serves the next stage too.
"""

from __future__ import annotations

import bisect
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emloc_ray.stages.ray.departures import Departures
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.spans import Span, Timed, tell_span, timed
from emloc_ray.stages.ray.tasks import Progress, Resources, remote_task, silent

_LOOK_S = 1.0
LEFT = -2  # no unit's number
# A slot is begun again where a unit takes so many times the median of a few, and not before so many seconds, in which
# its sums, which it writes now and then within a unit, reach a slow disk.
_TIMES_USUAL, _FEW_UNITS, _PATIENCE_S = 20, 5, 1800.0


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
        found: int = made[0].position()
        return found

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
    running: dict[Any, int] = {}  # the slot of each task
    counts = [bisect.bisect_right(units, unit) for units, unit in zip(work, safe or [-1] * len(work), strict=True)]
    # When a slot may begin, by the monotonic clock.
    resting = {slot: 0.0 for slot, count in enumerate(counts) if count < len(work[slot])}
    at: dict[int, str] = {}  # what each slot is at
    since: dict[int, float] = {}  # and since when, where it is known to work
    took: list[float] = []  # the seconds of each unit that was worked off
    done_units, total = sum(counts), sum(len(units) for units in work)

    try:
        while running or resting:
            for slot in [slot for slot, begin in resting.items() if begin <= time.monotonic()]:
                del resting[slot]
                running[start(slot)] = slot
                at[slot] = "its start"
                since.pop(slot, None)
            losses.look()
            progress(done_units, total)  # raises where the run is to stop
            for task, slot in _overdue(running, since, took):
                del running[task]
                ray.cancel(task, force=True)
                waited = time.monotonic() - since[slot]
                delay = losses.give_up_waiting(f"slot {slot} at {at[slot]}", waited, statistics.median(took))
                resting[slot] = time.monotonic() + delay
            for task in _first_ready(list(running), min(resting.values(), default=math.inf)):
                slot = running[task]
                where = at[slot]
                try:
                    timed_unit = ray.get(next(task))
                except ray.exceptions.RayError as error:
                    del running[task]  # it has ended: its worker may be at another's work, which a cancel would kill
                    piece = f"slot {slot}" if where == "its start" else f"slot {slot} at {where}"
                    delay = losses.count(piece, error)
                    resting[slot] = time.monotonic() + delay
                    continue
                times = timed_unit.begun_at, timed_unit.finished_at
                worker = f"slot {slot} on {timed_unit.worker.partition(' on ')[2]}"
                tell_span(Span(losses.stage, worker, where, *times, **timed_unit.peaks))
                unit = timed_unit.result
                if slot in since:
                    took.append(time.monotonic() - since[slot])
                since[slot] = time.monotonic()
                if unit is None:  # committed to the end
                    del running[task]
                    continue
                if unit == LEFT:
                    del running[task]
                    resting[slot] = 0.0
                    losses.tell(
                        f"{losses.stage}: slot {slot} leaves a node that is about to go, and goes on from {where}."
                    )
                    continue
                count = bisect.bisect_right(work[slot], unit)
                done_units += count - counts[slot]
                counts[slot] = count
                if unit >= 0:
                    done(slot, unit)
                at[slot] = f"{unit_name} {work[slot][count]}" if count < len(work[slot]) else "its end"
    finally:
        for task in running:  # none, unless something failed: nobody waits for them any more
            ray.cancel(task, force=True)


def _overdue(running: Mapping[Any, int], since: Mapping[int, float], took: Sequence[float]) -> list[tuple[Any, int]]:
    """The tasks that work at a unit for much longer than units take: a driver of a GPU, or a file system, may hang for ever.

    Not what waits to be taken: this process itself may have been stopped for that long.
    """
    if len(took) < _FEW_UNITS:
        return []
    bound = max(_PATIENCE_S, _TIMES_USUAL * statistics.median(took))
    now = time.monotonic()
    late = [(task, slot) for task, slot in running.items() if now - since.get(slot, now) > bound]
    return [(task, slot) for task, slot in late if not ray.wait([task], timeout=_LOOK_S)[0]]


def _first_ready(tasks: list[Any], until: float) -> list[Any]:
    """The first of these that has something to take, or none by the time ``until``, or after a second."""
    rest = min(_LOOK_S, max(0.0, until - time.monotonic()))
    if tasks:
        ready: list[Any] = ray.wait(tasks, num_returns=1, timeout=rest)[0]
        return ready
    time.sleep(rest)
    return []
