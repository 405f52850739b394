"""Slots that fail, without a Ray."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from emloc_ray.errors import StageError
from emloc_ray.stages.ray import slots, tasks
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.spans import Span, Timed


def test_a_slot_that_failed_is_not_cancelled_for_its_worker_may_be_at_other_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Iterator[str]] = []
    cancelled: list[Any] = []

    def start(slot: int) -> Iterator[str]:
        started.append(iter([f"a unit of slot {slot}"]))
        return started[-1]

    def fail(reference: str) -> None:
        raise RayTaskError("accumulate", "a traceback", ValueError(reference))

    monkeypatch.setattr(tasks.ray, "wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
    monkeypatch.setattr(tasks.ray, "get", fail)
    monkeypatch.setattr(tasks.ray, "cancel", lambda task, **_: cancelled.append(task))
    with pytest.raises(RayTaskError):
        slots.run_slots(start, [[0], [1]], "shard", Losses("calibrate"))
    assert cancelled == started[1:]


LOST = WorkerCrashedError()
SPAN = Span("", "process 1 on here", "", 0.0, 1.0)
NO_UNIT = -1


def work_off(tries: list[list[Any]], monkeypatch: pytest.MonkeyPatch, bound: int) -> int:
    """Has a slot of eight shards go through these tries, each what it gives, and returns how many there were."""
    given = iter(tries)

    def get(unit: Any) -> Timed:
        if unit is LOST:
            raise LOST
        return Timed(unit, SPAN)

    monkeypatch.setattr(tasks.ray, "wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
    monkeypatch.setattr(tasks.ray, "get", get)
    monkeypatch.setattr(Losses, "delays", (0.0,))
    slots.run_slots(lambda slot: iter(next(given)), [range(8)], "shard", Losses("calibrate", bound=bound))
    return len(tries) - len([*given])


def test_a_slot_that_finishes_shards_between_losses_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its workers is lost before it begins, or after a shard."""
    tries = [try_ for unit in range(7) for try_ in ([LOST], [unit - 1, unit, LOST])]
    assert work_off([*tries, [LOST], [6, 7, None]], monkeypatch, bound=1) == 16


@pytest.mark.parametrize(
    ("losing", "at"),
    [([LOST], "slot 0"), ([2, 3, 4, LOST], "slot 0 at shard 5")],
    ids=["before it begins", "at a shard, after some that are done again"],
)
def test_a_slot_that_comes_no_further_is_given_up(losing: list[Any], at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = [NO_UNIT, 0, 1, 2, 3, 4, LOST]
    with pytest.raises(StageError, match=f"^calibrate: {at} lost its worker 3 times"):
        work_off([begun, *[losing] * 3], monkeypatch, bound=2)


@pytest.mark.parametrize(("max_lead", "most"), [(2, 2), (None, 8)])
def test_a_fast_slot_waits_for_the_slowest_that_runs(
    max_lead: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three slots the second begins first, then the first is always faster; the third waits for a worker until both end."""
    started: list[Iterator[int | None]] = []
    reached, leads = [0, 0, 0], [0]

    def start(slot: int) -> Iterator[int | None]:
        started.append(iter([NO_UNIT, *range(8), None]))
        return started[-1]

    def wait(going: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        first = min(going, key=started.index)
        if first is started[0] and not begun:
            first = started[1]
        begun.append(first)
        return [first], [task for task in going if task is not first]

    def done(slot: int, unit: int) -> None:
        reached[slot] = unit + 1
        leads.append(reached[0] - reached[1])

    begun: list[Any] = []
    monkeypatch.setattr(tasks.ray, "wait", wait)
    monkeypatch.setattr(tasks.ray, "get", lambda unit: Timed(unit, SPAN))
    slots.run_slots(start, [range(8)] * 3, "block", Losses("calibrate"), done=done, max_lead=max_lead)
    assert reached == [8, 8, 8]
    assert max(leads) == most


@pytest.mark.parametrize(("waits", "most"), [(True, 2), (False, 8)])
def test_slots_wait_for_what_uses_up_the_units_that_all_have_done(
    waits: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum begins where both slots have done a unit, and ends at the ninth look at it: even the slowest slot waits for that."""
    reached, summed, leads = [0, 0], [0], [0]
    sums = tasks.Flight(1, Losses("calibrate"))
    looks: dict[Any, int] = {}

    class Sum(tasks.FlightTask):
        def take(self, given: Timed, losses: Losses) -> tasks.Next:
            summed[0] += 1
            return "over"

    def start_sum() -> Iterator[int]:
        task = iter([0])
        looks[task] = 0
        return task

    def done(slot: int, unit: int) -> None:
        before = min(reached)
        reached[slot] = unit + 1
        leads.append(max(reached) - summed[0])
        for block in range(before, min(reached)):
            sums.add(Sum(f"the sum of block {block}", start_sum))

    def wait(going: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        if going[0] in looks:
            looks[going[0]] += 1
            return (going, []) if looks[going[0]] >= 9 else ([], going)
        first = min(going, key=given.count)  # in turn
        given.append(first)
        return [first], [task for task in going if task is not first]

    given: list[Any] = []
    monkeypatch.setattr(tasks.ray, "wait", wait)
    monkeypatch.setattr(tasks.ray, "get", lambda unit: Timed(unit, SPAN))
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: None)
    start = [iter([NO_UNIT, *range(8), None]) for _ in range(2)].__getitem__
    beside = sums if waits else None
    slots.run_slots(start, [range(8)] * 2, "block", Losses("calibrate"), done=done, max_lead=2, beside=beside)
    assert reached == [8, 8]
    assert max(leads) == most


def test_a_slot_says_that_it_has_begun_before_it_opens_its_model() -> None:
    opened: list[str] = []

    def make() -> Any:
        opened.append("the model")
        return SimpleNamespace(position=lambda: NO_UNIT, accumulate=lambda unit: unit, commit=lambda: None)

    given = slots.work_off([0], make)
    assert (next(given), opened) == (None, [])
    assert [each and each.result for each in given] == [NO_UNIT, 0, None]
