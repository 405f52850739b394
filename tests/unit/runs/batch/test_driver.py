"""Who runs a batch, as another process of the same batch finds it: tasks handed over, taken, changed; no Ray."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import pytest
from test_runner import CONFIG, Waits, batch_run, task

from emloc_ray.runs.batch.config import BatchConfig
from emloc_ray.runs.batch.driver import Prepared, begin_board, hand_over, prepare_batch
from emloc_ray.runs.batch.runner import BatchRun
from emloc_ray.runs.batch.state import BatchState, TaskState, ask, read_state, requests, write_state
from emloc_ray.runs.batch.tasks import Batch, Task
from emloc_ray.config.schema import ModelConfig, RayConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory


def prepared(place: Path, *tasks: Task) -> Prepared:
    batch = Batch(BatchConfig(run_dir=str(place), grid={"seed": [1]}), tasks, RayConfig())
    return Prepared(batch, RunDirectory(place), cast(Any, None), cast(Any, Waits()))


def held(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "batch")
    run.create({})
    run.lock()
    return run


def changed(name: str) -> Task:
    return task(name, config=CONFIG.model_copy(update={"seed": 7}))


def test_nobody_runs_it(tmp_path: Path) -> None:
    assert hand_over(prepared(tmp_path / "batch", task("a"))) is None


def test_a_running_batch_takes_what_is_new_and_is_asked_for_no_change_of_what_runs(tmp_path: Path) -> None:
    started, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert let_go.wait(20)

    batch: BatchRun = batch_run(tmp_path, Waits({"a": hold}), max_concurrent=1)
    batch.directory.lock()
    for name in "abc":
        batch.add(task(name))
    batch.cancel("c")
    thread = threading.Thread(target=batch.run)
    thread.start()
    assert started.wait(20)
    while (state := read_state(batch.directory)) is None or state.tasks[0].status != "running":
        batch.board.change("b")  # so that it is written
        time.sleep(0.05)
    handed = hand_over(prepared(tmp_path / "batch", task("a"), changed("b"), changed("c"), task("d")))
    again = hand_over(prepared(tmp_path / "batch", task("a"), task("b")))
    let_go.set()
    thread.join(20)
    batch.directory.unlock()
    assert handed is not None
    assert (handed.new, handed.changed) == (("c", "d"), ("b",))
    assert again is not None
    assert (again.new, again.changed) == ((), ())
    assert {task.name: task.status for task in batch.board.state().tasks} == dict.fromkeys("abcd", "done")
    assert batch.tasks["c"].config.seed == 7


def test_what_who_runs_it_did_not_take_before_it_ended_is_run_by_oneself(tmp_path: Path) -> None:
    run = held(tmp_path)
    timer = threading.Timer(0.3, lambda: write_state(run, BatchState(time.time())))  # the state comes after the lock
    end = threading.Timer(1.5, run.unlock)
    timer.start()
    end.start()
    assert hand_over(prepared(tmp_path / "batch", task("a"))) is None
    assert run.holder() is None
    assert [request.add[0]["name"] for request in requests(run).values()] == ["a"]


def test_a_batch_that_was_killed_keeps_what_was_cancelled_and_what_was_found(tmp_path: Path) -> None:
    run = held(tmp_path)
    states = (
        TaskState("running", "running", to_cancel=True),
        TaskState("done", "done", train_loss=1.0, to_cancel=True),
        TaskState("lost", "running", units=(1, 2)),
        TaskState("failed", "failed", reason="a worker was lost."),
    )
    write_state(run, BatchState(5.0, states))
    tasks = [task(name) for name in ("running", "done", "lost", "failed", "new")]
    board = begin_board(prepared(tmp_path / "batch", *tasks))
    assert [board[task.name].is_cancelled for task in tasks] == [True, False, False, False, False]
    assert [board[task.name].status for task in tasks] == ["waiting", "done", "waiting", "waiting", "waiting"]
    assert board["done"].train_loss == 1.0
    assert read_state(run) == board.state()


def test_a_deadline_that_has_passed_is_told_before_anything_starts(tmp_path: Path) -> None:
    passed = datetime.now(timezone.utc) - timedelta(hours=1)
    config = CONFIG.model_copy(update={"model": ModelConfig(source="./none")})  # no name on the hub
    a, b = task("a", config=config, deadline=passed), task("b", config=config, deadline=passed + timedelta(days=1))
    late = prepared(tmp_path / "batch", a, b)
    with pytest.raises(ConfigError) as caught:
        prepare_batch(late.batch)
    told = [line for line in str(caught.value).split("\n") if "has passed" in line]
    assert told == [f"task a: its deadline {passed.isoformat()} has passed: give a later one, or take it out."]


def test_a_task_asked_for_while_the_summary_is_written_is_heard(tmp_path: Path) -> None:
    batch = batch_run(tmp_path, Waits())
    batch.add(task("a"))
    batch.run()
    assert not batch.hear()
    ask(batch.directory, {"add": [task("b").as_dict()]})
    assert batch.hear()
    assert [task.status for task in batch.run().tasks] == ["done", "done"]
