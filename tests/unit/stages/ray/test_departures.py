"""Nodes that a cloud takes back: work leaves them in time, and what is lost with them does not count."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from transformers import TrainerControl, TrainerState

from emloc_ray.errors import StageError
from emloc_ray.stages.finetune.group_callbacks import FailureLog
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import LoneSession
from emloc_ray.stages.finetune.trainer import StepKeeper
from emloc_ray.stages.ray import departures, pace, slots, tasks
from emloc_ray.stages.ray.departures import Departures
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.spans import Span, Timed

NODE = "ab" * 28
SPAN = Span("", "process 1 on here", "", 0.0, 1.0)


def taken_back() -> RayActorError:
    return RayActorError(preempted=True)


def test_what_is_lost_with_a_node_that_was_taken_back_does_not_count() -> None:
    told: list[str] = []
    leaving = {NODE}
    losses = Losses("merge", told.append, bound=0, departures=Departures(lambda: leaving, every_s=0))
    losses.look()
    leaving.clear()  # it has gone
    for error in (taken_back(), NodeDiedError(f"Node IP: 10.0.0.3, node ID: {NODE}. This can happen if …")):
        assert losses.record_lost_worker("shard a", error) == 0
    assert told == ["merge: shard a lost its worker because its node was taken back; restarted elsewhere."] * 2
    assert (losses.preempted, dict(losses.counts)) == (2, {})
    with pytest.raises(StageError, match="because its node died"):
        losses.record_lost_worker(
            "shard a", NodeDiedError(f"Node IP: 10.0.0.4, node ID: {'cd' * 28}. This can happen if the node was")
        )


def test_a_head_that_does_not_answer_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("no head")

    monkeypatch.setattr(departures, "state", SimpleNamespace(get_draining_nodes=fail))
    assert departures.draining() == set()
    monkeypatch.setattr(departures, "state", SimpleNamespace(get_draining_nodes=lambda: {NODE: 0}))
    assert departures.draining() == {NODE}


class Slot:
    """Counts units, and notes what is committed."""

    def __init__(self, safe: list[int]) -> None:
        self.safe, self.done = safe, safe[-1]

    def position(self) -> int:
        return self.safe[-1]

    def accumulate(self, unit: int) -> int:
        self.done = unit
        return unit

    def commit(self) -> None:
        self.safe.append(self.done)


def test_a_slot_commits_and_leaves_a_node_that_is_about_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = iter([False, False, True])
    monkeypatch.setattr(Departures, "here", lambda self: next(leaving, False))
    started: list[list[int]] = []
    told: list[str] = []
    safe = [-1]

    def start(slot: int) -> Any:
        started.append([*safe])
        return iter([*slots.work_off(range(4), Slot, safe)])

    monkeypatch.setattr(tasks.ray, "wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
    monkeypatch.setattr(tasks.ray, "get", lambda value: value)
    done: list[int] = []
    slots.run_slots(
        start, [range(4)], "shard", Losses("calibrate", told.append), done=lambda slot, unit: done.append(unit)
    )
    assert started == [[-1], [-1, 1]]
    assert done == [0, 1, 1, 2, 3]
    assert safe == [-1, 1, 3]
    assert told == ["calibrate: slot 0 leaves a node that is about to go, and continues from shard 2."]


def test_a_unit_that_takes_for_ever_is_ended_and_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tasks.time, "monotonic", lambda: now[0])
    units = [Timed(unit, SPAN) for unit in (-1, *range(8))]
    end = Timed(None, SPAN)
    tries = [iter(units[:7]), iter([*units[6:], end])]
    cancelled: list[Any] = []
    told: list[str] = []

    stops = [5000.0]  # of this process itself, after which what it waited for is there

    def wait(tasks: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        if len(took) == 6 and stops:
            now[0] += stops.pop()
            return [], tasks
        hangs = tasks[0] is first and len(took) == 7
        now[0] += 1500 if hangs else 2
        return ([], tasks) if hangs else (tasks, [])

    def get(unit: Timed) -> Timed:
        took.append(unit)
        return unit

    took: list[Timed] = []
    first = tries[0]
    monkeypatch.setattr(tasks.ray, "wait", wait)
    monkeypatch.setattr(tasks.ray, "get", get)
    monkeypatch.setattr(tasks.ray, "cancel", lambda task, **how: cancelled.append((task, how)))
    losses = Losses("calibrate", told.append)
    slots.run_slots(lambda slot: tries.pop(0), [range(8)], "shard", losses)
    assert cancelled == [(first, {"force": True})]
    [sentence] = told
    assert sentence.startswith("calibrate: slot 0 at shard 6 lost its worker because it gave nothing for ")
    assert sentence.endswith(", where 2.0 s is usual; restarted (1 of 3).")


def test_a_task_that_takes_for_ever_is_ended_and_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(tasks.time, "monotonic", lambda: now[0])
    done = Timed(1, SPAN)
    started: list[Any] = []

    def submit(given: list[list[Timed | None]]) -> Any:
        started.append(iter(given.pop(0)))
        return started[-1]

    def wait(flying: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        ready = [task for task in flying if operator.length_hint(task)]
        now[0] += 2 if ready else 1500
        return ready[:1], flying

    cancelled: list[Any] = []
    told: list[str] = []
    monkeypatch.setattr(tasks.ray, "wait", wait)
    monkeypatch.setattr(tasks.ray, "get", lambda given: given)
    monkeypatch.setattr(tasks.ray, "cancel", lambda task, **how: cancelled.append((task, how)))
    quick: list[list[list[Timed | None]]] = [[[None, done]] for _ in range(5)]
    hangs: list[list[Timed | None]] = [[None], [None, done]]
    named = [(f"shard {number}", functools.partial(submit, given)) for number, given in enumerate([*quick, hangs])]
    assert tasks.bounded(named, 1, Losses("merge", told.append)) == [1] * 6
    assert cancelled == [(started[5], {"force": True})]
    [sentence] = told
    assert sentence.startswith("merge: shard 5 lost its worker because it gave nothing for ")
    assert sentence.endswith(", where 2.0 s is usual; restarted (1 of 3).")


def test_a_task_that_waits_for_a_worker_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace.ray, "wait", lambda given, **_: ([], given))
    monkeypatch.setattr(pace.ray, "cancel", lambda *_, **__: None)
    known = pace.Pace()
    for task in range(5):
        known.gave(task)
        known.gave(task)
        known.over(task)
    now[0] = 1e6
    assert known.end_overdue() == []
    known.gave("at work")
    now[0] += 1900
    assert [task for task, _ in known.end_overdue()] == ["at work"]


def test_a_task_without_others_is_held_against_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    now, hour = [0.0], 3600.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace.ray, "wait", lambda given, **_: ([], given))
    monkeypatch.setattr(pace.ray, "cancel", lambda *_, **__: None)
    short, long, unplanned = (pace.Pace(planned_s) for planned_s in (60.0, hour, 0.0))
    for known in (short, long, unplanned):
        known.gave("the training")
    now[0] = 5.9 * hour
    assert short.end_overdue() == []
    now[0] = 9.9 * hour
    [ended] = short.end_overdue()
    told: list[str] = []
    Losses("finetune", told.append).give_up_waiting("the training", ended.why)
    assert told == [
        "finetune: the training lost its worker because it gave nothing for 9.9 h, where 60 s was planned for all of the"
        " stage; restarted (1 of 3)."
    ]
    assert long.end_overdue() == []
    now[0] = 10.1 * hour
    assert [task for task, *_ in long.end_overdue()] == ["the training"]
    assert unplanned.end_overdue() == []


def test_what_has_come_on_since_its_last_loss_is_counted_anew() -> None:
    reached = [0]
    losses = Losses("finetune", bound=2, reached=lambda: reached[0])
    losses.delays = (0.0,)
    for step in (0, 0, 5, 5, 9, 9):
        reached[0] = step
        losses.record_lost_worker("the training", WorkerCrashedError())
    with pytest.raises(StageError, match="lost its worker 3 times"):
        losses.record_lost_worker("the training", WorkerCrashedError())


def job(tmp_path: Path) -> FinetuneJob:
    fields: dict[str, Any] = dict.fromkeys(("emulator_dir", "tokens_dir", "out_dir"), tmp_path)
    return FinetuneJob(**fields, storage_dir=tmp_path / "training", name="a", adapter={}, portable_targets=[],
                       base_model="", max_steps=9, batch_size=1, max_failures=1)  # fmt: skip


def test_a_training_saves_once_where_its_node_is_about_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = [False]
    session = LoneSession(tmp_path / "training")
    monkeypatch.setattr(session, "is_leaving", lambda: leaving[0])
    (tmp_path / "training").mkdir()
    keeper = StepKeeper(job(tmp_path), session, poll_s=0, ask_s=0)

    def saves() -> bool:
        control = TrainerControl()
        keeper.sync_norm_and_stop(None, torch.device("cpu"), step=1)
        keeper.on_step_end(None, TrainerState(global_step=1), control)
        assert not control.should_training_stop
        return control.should_save

    assert not saves()
    leaving[0] = True
    assert [saves(), saves()] == [True, False]


def test_a_group_whose_node_was_taken_back_has_not_failed(tmp_path: Path) -> None:
    log = FailureLog(job(tmp_path))
    for _ in range(2):
        log.after_exception(None, {0: RuntimeError("closed"), 1: WorkerHealthCheckFailedError("rank 1", taken_back())})
    log.after_exception(None, {0: RuntimeError("closed")})
    assert log.job.failure_path.read_text().splitlines() == [
        *[
            "finetune: rank 1 lost its worker because its node was taken back; restarted elsewhere from the last checkpoint."
        ]
        * 2,
        "finetune: rank 0 failed (closed); restarted from the last checkpoint (1 of 1).",
    ]
