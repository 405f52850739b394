"""A batch's tasks: each alone with its failure, cancelled, late, added meanwhile, done again; no Ray, stages are waits."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from emloc_ray.runs.batch import runner
from emloc_ray.runs.batch.admission import Admission, Amount
from emloc_ray.runs.batch.board import Board, TaskReporter
from emloc_ray.runs.batch.runner import BatchRun
from emloc_ray.runs.batch.state import BatchState, ask, read_state, write_state
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.turns import Expected, TaskTurns
from emloc_ray.config.reading import parse_config
from emloc_ray.errors import StageError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.stages.ray.tasks import Resources

STAGES = ("calibrate", "finetune")
CONFIG = parse_config({"run_dir": "r", "model": {"source": "m"}, "data": {"train": {"path": "d.jsonl"}}})


def task(name: str, **values: object) -> Task:
    return dataclasses.replace(Task(name, CONFIG), **values)  # type: ignore[arg-type]


class Waits:
    """Work whose stages wait until they are let go, or do what ``acts`` says."""

    def __init__(self, acts: Mapping[str, Callable[[], object]] | None = None, seconds: float = 0.0) -> None:
        self.acts, self.seconds = acts or {}, seconds
        self.begun: list[tuple[str, str]] = []
        self.forgotten: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def expected(self, task: Task) -> Mapping[str, Expected]:
        if task.owner == "unplannable":
            raise ZeroDivisionError("division by zero")
        return {stage: Expected(1.0, 100) for stage in STAGES}

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        for stage in STAGES:
            with turns.take(stage, Resources()):
                progress = reporter.start(stage)
                with self._lock:
                    self.begun.append((task.name, stage))
                    self._now += 1
                    self.most_at_once = max(self.most_at_once, self._now)
                try:
                    if task.name in self.acts:
                        self.acts[task.name]()
                    time.sleep(self.seconds)
                    progress(1, 1)
                    if turns.stopped():
                        from emloc_ray.errors import Stopped

                        raise Stopped("stopped")
                finally:
                    with self._lock:
                        self._now -= 1
                reporter.finish(stage, {"train_loss": 2.0}, {"wall_s": self.seconds})

    def forget(self, task: Task) -> None:
        self.forgotten.append(task.name)


def batch_run(tmp_path: Path, work: Waits, cpus: float = 2.0, max_concurrent: int = 4) -> BatchRun:
    run = RunDirectory(tmp_path / "batch")
    run.create({})
    return BatchRun(
        run, Board(time.time()), work, Admission(lambda: Amount(cpus=cpus, memory=1e6)), lambda: max_concurrent
    )


def statuses(state: BatchState) -> dict[str, str]:
    return {task.name: task.status for task in state.tasks}


def asked(run: BatchRun) -> list[str]:
    return [name for name in run.directory.names() if name.startswith("request-")]


def test_a_failed_task_ends_alone_with_its_reason(tmp_path: Path) -> None:
    def fail() -> None:
        raise StageError("finetune: the loss is NaN: lower the learning rate.")

    def break_down() -> None:
        raise ZeroDivisionError("division by zero")

    work = Waits({"b": fail, "c": break_down})
    run = batch_run(tmp_path, work)
    for name in "abcd":
        run.add(task(name))
    state = run.run()
    assert statuses(state) == {"a": "done", "b": "failed", "c": "failed", "d": "done"}
    by_name = {task.name: task for task in state.tasks}
    assert by_name["b"].reason == "finetune: the loss is NaN: lower the learning rate."
    assert by_name["c"].reason == "ZeroDivisionError: division by zero"
    assert by_name["b"].stage == "calibrate"
    assert by_name["a"].train_loss == 2.0
    assert read_state(run.directory) == state
    assert sorted(work.forgotten) == ["a", "b", "c", "d"]


def test_no_more_at_once_than_there_are_resources_and_seats(tmp_path: Path) -> None:
    work = Waits(seconds=0.02)
    run = batch_run(tmp_path, work, cpus=3, max_concurrent=5)
    for number in range(20):
        run.add(task(f"t{number}"))
    assert set(statuses(run.run()).values()) == {"done"}
    assert 1 < work.most_at_once <= 3
    seats = batch_run(tmp_path / "other", Waits(seconds=0.02), cpus=30, max_concurrent=2)
    for number in range(8):
        seats.add(task(f"t{number}"))
    seats.run()
    assert seats.work.most_at_once <= 2  # type: ignore[attr-defined]


def test_more_tasks_begin_once_the_cluster_has_grown(tmp_path: Path) -> None:
    work, seats = Waits(seconds=0.05), [1]
    run = batch_run(tmp_path, work, cpus=30)
    run.max_concurrent = lambda: seats[0]
    for number in range(8):
        run.add(task(f"t{number}"))
    grown = threading.Timer(0.2, lambda: seats.__setitem__(0, 8))
    grown.start()
    run.run()
    grown.join()
    assert work.most_at_once > 1


def test_priority_decides_who_begins(tmp_path: Path) -> None:
    work = Waits()
    run = batch_run(tmp_path, work, cpus=1, max_concurrent=1)
    for name, priority in (("low", -1), ("middle", 0), ("high", 5)):
        run.add(task(name, priority=priority))
    run.run()
    assert [name for name, stage in work.begun if stage == "calibrate"] == ["high", "middle", "low"]


def test_cancelled_while_it_waits_and_while_it_runs(tmp_path: Path) -> None:
    started, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert let_go.wait(20)

    work = Waits({"first": hold})
    run = batch_run(tmp_path, work, cpus=1, max_concurrent=1)
    for name in ("first", "second", "third"):
        run.add(task(name))
    thread = threading.Thread(target=run.run)
    thread.start()
    assert started.wait(20)
    ask(run.directory, {"cancel": ["first", "second"]})
    while asked(run):
        time.sleep(0.01)
    killed_here = read_state(run.directory)
    assert killed_here is not None
    assert [task.is_cancelled for task in killed_here.tasks] == [True, True, False]
    assert killed_here.tasks[0].status == "running"
    let_go.set()
    thread.join(20)
    assert statuses(run.board.state()) == {"first": "cancelled", "second": "cancelled", "third": "done"}
    assert ("first", "finetune") not in work.begun
    assert not any(name == "second" for name, _ in work.begun)


def test_tasks_are_added_while_it_runs(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits({"first": lambda: ask(run.directory, {"add": [task("late").as_dict()]})}))
    run.add(task("first"))
    assert statuses(run.run()) == {"first": "done", "late": "done"}


def test_a_deadline_that_has_passed_ends_a_task(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits({"slow": lambda: time.sleep(0.3)}))
    run.add(task("slow", deadline=timedelta(seconds=0.2)))
    run.add(task("soon", deadline=timedelta(hours=1)))
    state = run.run()
    assert statuses(state) == {"slow": "late", "soon": "done"}
    assert state.tasks[0].reason == "its deadline passed"


def test_an_interrupt_ends_stages_and_leaves_tasks_to_go_on_with(tmp_path: Path) -> None:
    started, interrupted = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert interrupted.wait(20)
        time.sleep(0.1)  # until the batch has taken the interrupt

    run = batch_run(tmp_path, Waits({"first": hold}), cpus=1, max_concurrent=1)
    run.add(task("first"))
    run.add(task("second"))

    def show(state: BatchState) -> None:
        if started.is_set() and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    run.show = show
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert statuses(read_state(run.directory) or BatchState(0)) == {"first": "waiting", "second": "waiting"}


def test_what_was_over_is_begun_again_where_it_is_added_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def fail_once() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise StageError("a worker was lost.")

    run = batch_run(tmp_path, Waits({"a": fail_once}))
    run.add(task("a"))
    assert statuses(run.run()) == {"a": "failed"}
    run.add(task("a"))
    state = run.run()
    assert statuses(state) == {"a": "done"}
    assert state.tasks[0].reason is None


def test_what_is_added_and_can_never_run_ends_alone(tmp_path: Path) -> None:
    added = [
        task("wide").as_dict(),
        {**task("newer").as_dict(), "from_a_later_version": 1},
        task("odd", owner="unplannable").as_dict(),
        task("good").as_dict(),
    ]
    run = batch_run(tmp_path, Waits({"first": lambda: ask(run.directory, {"add": added})}))
    run.unfit = lambda task: ["finetune needs 5 GPUs: ask for less."] if task.name == "wide" else []
    run.add(task("first"))
    state = run.run()
    assert statuses(state) == {"first": "done", "wide": "failed", "newer": "failed", "odd": "failed", "good": "done"}
    reasons = {task.name: task.reason or "" for task in state.tasks}
    assert reasons["wide"] == "finetune needs 5 GPUs: ask for less."
    assert "from_a_later_version is not a key" in reasons["newer"]
    assert reasons["odd"] == "ZeroDivisionError: division by zero"
    assert asked(run) == []


def test_a_task_whose_plan_breaks_down_at_its_turn_fails(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits())
    run.add(task("a"))
    run.tasks["a"] = task("a", owner="unplannable")
    assert statuses(run.run()) == {"a": "failed"}


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"cancel": null}', '{"add": ["x"]}', '{"later": []}', "\xff"])
def test_what_is_no_request_is_removed_and_told(tmp_path: Path, text: str) -> None:
    told: list[str] = []
    run = batch_run(tmp_path, Waits())
    run.tell = told.append
    run.directory.path("request-1.json").write_bytes(text.encode("latin-1"))
    run.add(task("a"))
    assert statuses(run.run()) == {"a": "done"}
    assert asked(run) == []
    assert len(told) == 1
    assert "request-1.json was no request" in told[0]


def test_a_full_disk_for_a_moment_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    failures = iter([OSError(28, "No space left on device")] * 3)

    def fail_three_times(*given: object) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        write_state(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "write_state", fail_three_times)
    run = batch_run(tmp_path, Waits(seconds=0.5))
    run.tell = told.append
    run.add(task("a"))
    ask(run.directory, {"add": [task("b").as_dict()]})
    state = run.run()
    assert statuses(state) == {"a": "done", "b": "done"}
    assert read_state(run.directory) == state
    assert asked(run) == []
    assert sum("No space left on device" in text for text in told) == 2  # by who hears, and who writes
    assert told.count("b was added.") == 1


def test_a_duration_counts_from_this_run(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits())
    run.board.started_at -= 7200  # begun two hours ago, and now again
    run.add(task("again", deadline=timedelta(hours=1)))
    assert statuses(run.run()) == {"again": "done"}


def test_a_cancelled_task_is_restored(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits())
    for name in ("a", "b"):
        run.add(task(name))
        run.cancel(name, "by an earlier request")
    ask(run.directory, {"restore": ["a"]})
    state = run.run()
    assert statuses(state) == {"a": "done", "b": "cancelled"}
    assert state.tasks[1].reason == "by an earlier request"
