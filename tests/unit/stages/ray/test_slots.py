"""Slots that fail, without a Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from emloc_ray.stages.ray import slots, tasks
from emloc_ray.stages.ray.losses import Losses


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
