"""Slots: actors that each work off a fixed list of units in order, replaced where they are lost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ray

from emloc_ray.errors import StageError
from emloc_ray.stages.cluster import MAX_RESTARTS, Progress


class SlotActor:
    """An actor around a slot, which is made in its first call: what goes wrong in a constructor, Ray tells as text only.

    Ray's dashboard and state API show it by its ``label``: a name proper would have to be free for its replacement.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, label: str = "slot") -> None:
        self._make = functools.partial(make, *arguments)
        self._label = label

    def __repr__(self) -> str:
        return self._label

    def position(self) -> int:
        """The last unit that is safe, or -1."""
        self.slot = self._make()
        found: int = self.slot.position()
        return found

    def accumulate(self, unit: int) -> int:
        """Works off one unit; returns it."""
        done: int = self.slot.accumulate(unit)
        return done

    def commit(self) -> None:
        """Called once after the last unit."""
        self.slot.commit()


def run_slots(
    start: Callable[[int], Any],
    work: Sequence[Sequence[int]],
    progress: Progress,
    done: Callable[[int, int], None] = lambda slot, unit: None,
) -> None:
    """Works off ``work[slot]``, a list of ascending units, in a :class:`SlotActor` that ``start(slot)`` makes.

    ``done(slot, unit)`` hears of every unit finished, on a resumed slot of the
    last one alone. A lost actor is made anew and asked for its position.

    Raises:
        StageError: where a slot is lost more often than ``MAX_RESTARTS``.
    """
    actors: dict[int, Any] = {}
    waiting: dict[Any, int] = {}
    restarts = dict.fromkeys(range(len(work)), 0)
    last = dict.fromkeys(range(len(work)), -1)
    total = sum(len(units) for units in work)

    def begin(slot: int) -> None:
        actors[slot] = start(slot)
        waiting[actors[slot].position.remote()] = slot

    for slot in range(len(work)):
        begin(slot)
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        slot = waiting.pop(ready[0])
        try:
            unit = ray.get(ready[0])
        except ray.exceptions.RayActorError as error:
            restarts[slot] += 1
            if restarts[slot] > MAX_RESTARTS or isinstance(error, ray.exceptions.ActorUnschedulableError):
                raise StageError(f"calibrate: slot {slot} was lost {restarts[slot]} times: {_brief(error)}") from error
            begin(slot)
            continue
        if unit is None:  # committed to the end
            ray.kill(actors.pop(slot))
            continue
        last[slot] = unit
        if unit >= 0:
            done(slot, unit)
        progress(sum(1 for s, units in enumerate(work) for u in units if u <= last[s]), total)
        following = next((u for u in work[slot] if u > unit), None)
        actor = actors[slot]
        waiting[actor.commit.remote() if following is None else actor.accumulate.remote(following)] = slot


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] + ": give the workers more memory or lower calibration.batch_size."
