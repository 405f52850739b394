"""Slots: actors that each work off a fixed list of units in order, replaced where they are lost."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from emloc_ray.stages.cluster import Progress, silent
from emloc_ray.stages.failures import Losses
from emloc_ray.stages.spans import Span, tell_span, timed

_LOOK_S = 1.0


class SlotActor:
    """An actor around a slot, which is made in its first call: what goes wrong in a constructor, Ray tells as text only.

    Ray's dashboard and state API show it by its ``label``: a name proper would have to be free for its replacement.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, label: str = "slot") -> None:
        self._make = functools.partial(make, *arguments)
        self._label = label

    def __repr__(self) -> str:
        return self._label

    @timed
    def position(self) -> int:
        """The last unit that is safe, or -1."""
        self.slot = self._make()
        found: int = self.slot.position()
        return found

    @timed
    def accumulate(self, unit: int) -> int:
        """Works off one unit; returns it."""
        done: int = self.slot.accumulate(unit)
        return done

    @timed
    def commit(self) -> None:
        """Called once after the last unit."""
        self.slot.commit()


def run_slots(
    start: Callable[[int], Any],
    work: Sequence[Sequence[int]],
    unit_name: str,
    losses: Losses,
    progress: Progress = silent,
    done: Callable[[int, int], None] = lambda slot, unit: None,
) -> None:
    """Works off ``work[slot]``, a list of ascending units, in a :class:`SlotActor` that ``start(slot)`` makes.

    ``done(slot, unit)`` hears of every unit finished, on a resumed slot of the last one alone. A lost actor is made anew
    and asked for its position. ``unit_name`` is what people call a unit.

    Raises:
        StageError: where a slot is lost at one unit more often than ``losses`` allows.
    """
    actors: dict[int, Any] = {}
    waiting: dict[Any, int] = {}
    resting = dict.fromkeys(range(len(work)), 0.0)  # when a slot may begin, by the monotonic clock
    asked: dict[int, str] = {}
    begun: dict[int, tuple[str, float]] = {}  # what each slot is at, and since when
    last = dict.fromkeys(range(len(work)), -1)
    total = sum(len(units) for units in work)

    try:
        while waiting or resting:
            for slot in [slot for slot, begin in resting.items() if begin <= time.monotonic()]:
                del resting[slot]
                actors[slot] = start(slot)
                waiting[actors[slot].position.remote()] = slot
                begun[slot] = ("its start", time.time())
            progress(_done(work, last), total)  # where it is heard that the run is to stop, too
            for reference in _some(list(waiting), min(resting.values(), default=math.inf)):
                slot = waiting.pop(reference)
                try:
                    found = ray.get(reference)
                except ray.exceptions.RayError as error:
                    delay = losses.count(f"slot {slot}{asked.pop(slot, '')}", error)
                    ray.kill(actors.pop(slot))  # one that only does not answer would hold what its successor needs
                    resting[slot] = time.monotonic() + delay
                    continue
                unit, peak = found.result, found.peak_bytes
                tell_span(Span(losses.stage, f"slot {slot}", *begun[slot], time.time(), peak_bytes=peak))
                if unit is None:  # committed to the end
                    ray.kill(actors.pop(slot))
                    continue
                last[slot] = unit
                if unit >= 0:
                    done(slot, unit)
                following = next((u for u in work[slot] if u > unit), None)
                asked[slot] = " at its end" if following is None else f" at {unit_name} {following}"
                begun[slot] = ("its end" if following is None else f"{unit_name} {following}", time.time())
                actor = actors[slot]
                waiting[actor.commit.remote() if following is None else actor.accumulate.remote(following)] = slot
    finally:
        for actor in actors.values():  # none, unless something failed: nobody waits for them any more
            ray.kill(actor)


def _done(work: Sequence[Sequence[int]], last: Mapping[int, int]) -> int:
    return sum(1 for slot, units in enumerate(work) for unit in units if unit <= last[slot])


def _some(references: list[Any], until: float) -> list[Any]:
    """The first of these that is ready, or none by the time ``until``, or after a second."""
    rest = min(_LOOK_S, max(0.0, until - time.monotonic()))
    if references:
        ready: list[Any] = ray.wait(references, num_returns=1, timeout=rest)[0]
        return ready
    time.sleep(rest)
    return []
