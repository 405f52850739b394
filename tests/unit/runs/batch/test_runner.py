"""A batch's tasks: each alone with its failure, cancelled, interrupted, run again; no Ray, stages are waits."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ArtifactError, ConfigError, StageError, Stopped, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.batch import runner
from emloc_ray.runs.batch.admission import Amount
from emloc_ray.runs.batch.begun import Tries
from emloc_ray.runs.batch.driver import check_free
from emloc_ray.runs.batch.runner import BatchRun, concurrency
from emloc_ray.runs.batch.state import (
    BatchState,
    Board,
    TaskReporter,
    TaskState,
    cancel,
    read_cancelled,
    read_state,
    write_state,
)
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.work import TaskPlan, TaskTurns
from emloc_ray.stages.ray.tasks import Resources

STAGES = ("calibrate", "finetune")
CONFIG = parse_config({"run_dir": "r", "model": {"source": "m"}, "data": {"train": {"path": "d.jsonl"}}})


class Waits:
    """Work whose stages do what ``acts`` says, then wait."""

    def __init__(
        self,
        acts: Mapping[str, Callable[[], object]] | None = None,
        seconds: float = 0.0,
        tries: Mapping[str, Tries] | None = None,
        edited: Container[str] = (),
    ) -> None:
        self.acts, self.seconds = acts or {}, seconds
        self.tries, self.edited = tries or {}, edited
        self.begun: list[tuple[str, str]] = []
        self.forgotten: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def planned(self, task: Task) -> TaskPlan:
        return TaskPlan(2.0, dict.fromkeys(STAGES, 100), self.tries.get(task.name, {}), task.name in self.edited)

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        for stage in STAGES:
            with turns.take(stage, Resources(), 1):
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
                        raise Stopped("stopped")
                finally:
                    with self._lock:
                        self._now -= 1
                reporter.finish(stage, {}, {"wall_s": self.seconds})
        reporter.board.change(task.name, train_loss=2.0)

    def forget(self, task: Task) -> None:
        self.forgotten.append(task.name)


def batch_run(
    tmp_path: Path,
    work: Waits,
    *names: str,
    cpus: float = 2.0,
    max_concurrent: int | None = 4,
    before: Sequence[TaskState] = (),
    **priorities: int,
) -> BatchRun:
    run = RunDirectory(tmp_path / "batch")
    run.create({}, kind="batch")
    if before:
        write_state(run, BatchState(0.0, tuple(before)))
    tasks = [Task(name, CONFIG, priorities.get(name, 0)) for name in names]
    return BatchRun(run, tasks, work, lambda: Amount(cpus=cpus, memory=1e6), max_concurrent)


def statuses(state: BatchState | None) -> dict[str, str]:
    assert state is not None
    return {task.name: task.status for task in state.tasks}


def test_a_failed_task_ends_alone_with_its_reason(tmp_path: Path) -> None:
    def fail() -> None:
        raise StageError("finetune: the loss is NaN: lower the learning rate.")

    def break_down() -> None:
        raise ZeroDivisionError("division by zero at https://host/a?sig=aBc")

    def read_latin_1() -> None:
        raise StageError("data: caf\udce9.jsonl is no file: name one.")

    work = Waits({"b": fail, "c": break_down, "d": read_latin_1})
    run = batch_run(tmp_path, work, *"abcde")
    state = run.run()
    assert statuses(state) == {"a": "done", "b": "failed", "c": "failed", "d": "failed", "e": "done"}
    by_name = {task.name: task for task in state.tasks}
    assert by_name["b"].reason == "finetune: the loss is NaN: lower the learning rate."
    assert by_name["c"].reason == "ZeroDivisionError: division by zero at https://host/a?sig=(hidden)"
    assert by_name["d"].reason == "data: caf\ufffd.jsonl is no file: name one."
    assert by_name["b"].stage == "calibrate"
    assert by_name["a"].train_loss == 2.0
    assert (by_name["a"].planned_seconds, by_name["a"].planned_bytes) == (2.0, 100)
    assert read_state(run.directory) == state
    assert sorted(work.forgotten) == ["a", "b", "c", "d", "e"]


def test_no_more_at_once_than_there_are_resources_and_threads(tmp_path: Path) -> None:
    names = [f"t{number}" for number in range(20)]
    work = Waits(seconds=0.02)
    assert set(statuses(batch_run(tmp_path, work, *names, cpus=3, max_concurrent=5).run()).values()) == {"done"}
    assert 1 < work.most_at_once <= 3
    work = Waits(seconds=0.02)
    batch_run(tmp_path / "other", work, *names, cpus=30, max_concurrent=2).run()
    assert work.most_at_once <= 2


def test_threads_are_bounded() -> None:
    assert concurrency(None, Amount(cpus=1)) == 4
    assert concurrency(None, Amount(cpus=20, gpus=4)) == 40
    assert concurrency(None, Amount(cpus=1000)) == 128
    assert concurrency(3, Amount(cpus=1000)) == 3


def test_more_tasks_begin_once_the_cluster_has_grown(tmp_path: Path) -> None:
    work = Waits(seconds=0.05)
    run = batch_run(tmp_path, work, *"abcdefgh", max_concurrent=None)
    run.capacity = lambda: Amount(cpus=8.0 if len(work.begun) > 4 else 1.0, memory=1e6)
    run.run()
    assert work.most_at_once > 1


@pytest.mark.parametrize(("max_concurrent", "begun"), [(None, True), (4, False)])
def test_who_waits_for_another_task_keeps_none_from_beginning(
    tmp_path: Path, max_concurrent: int | None, begun: bool
) -> None:
    made = threading.Event()

    class Shares(Waits):
        def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
            if task.name != "other":
                reporter.wait("calibrate", "another")
                assert made.wait(20)
            super().do(task, turns, reporter)

    work = Shares()
    run = batch_run(tmp_path, work, *"abcd", "other", cpus=1, max_concurrent=max_concurrent)
    threading.Timer(3.0, made.set).start()
    run.run()
    assert (work.begun[0] == ("other", "calibrate")) == begun


def test_hundreds_that_wait_for_another_task_keep_none_from_beginning(tmp_path: Path) -> None:
    """As of one model's tasks, while its Grams are gathered: another model's begin beside them."""
    other = threading.Event()

    class Shares(Waits):
        def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
            if task.name == "other":
                other.set()
            else:
                reporter.wait("calibrate", "another")
                assert other.wait(60)
            super().do(task, turns, reporter)

    names = [f"t{number}" for number in range(150)]
    run = batch_run(tmp_path, Shares(), *names, "other", cpus=100, max_concurrent=None)
    assert set(statuses(run.run()).values()) == {"done"}


def test_priority_decides_who_begins_then_the_order_of_the_file(tmp_path: Path) -> None:
    work = Waits()
    batch_run(tmp_path, work, "low", "first", "second", "high", cpus=1, max_concurrent=1, low=-1, high=5).run()
    assert [name for name, stage in work.begun if stage == "calibrate"] == ["high", "first", "second", "low"]


def test_cancelled_while_it_waits_and_while_it_runs(tmp_path: Path) -> None:
    started, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert let_go.wait(20)

    work = Waits({"first": hold})
    run = batch_run(tmp_path, work, "first", "second", "third", cpus=1, max_concurrent=1)
    told: list[str] = []
    run.tell = told.append
    thread = threading.Thread(target=run.run)
    thread.start()
    assert started.wait(20)
    assert not cancel(run.directory, ["first", "second"])  # this test does not hold the batch's lock
    while not told:
        time.sleep(0.01)
    let_go.set()
    thread.join(20)
    assert told == ["first ends as soon as its stage can stop."]
    assert statuses(run.board.state()) == {"first": "cancelled", "second": "cancelled", "third": "done"}
    assert ("first", "finetune") not in work.begun
    assert not any(name == "second" for name, _ in work.begun)
    # They stay cancelled, until somebody takes it back.
    cancel(run.directory, ["second"], undo=True)
    again = batch_run(tmp_path, Waits(), "first", "second", "third").run()
    assert statuses(again) == {"first": "cancelled", "second": "done", "third": "done"}
    assert again.started_at == run.board.started_at


def test_a_cancellation_that_comes_too_late_is_forgotten(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits(), "a")
    state = run.run()
    run.directory.path("cancel-a").write_text("a")
    run.directory.path("cancel-nobody").write_text("nobody")
    run.run()
    assert statuses(state) == {"a": "done"}
    assert read_cancelled(run.directory) == {"nobody"}


def test_a_cancellation_is_a_file_that_holds_the_name(tmp_path: Path) -> None:
    run = batch_run(tmp_path, Waits(), "a")
    run.run()
    state = dataclasses.replace(run.board.state().tasks[0], status="failed")
    write_state(run.directory, BatchState(0.0, (state,)))
    cancel(run.directory, ["a"])
    assert run.directory.path("cancel-a").read_text() == "a"


def test_an_interrupt_ends_stages_and_the_next_run_goes_on(tmp_path: Path) -> None:
    started, interrupted = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert interrupted.wait(20)
        time.sleep(0.1)  # until the batch has taken the interrupt

    run = batch_run(tmp_path, Waits({"first": hold}), "first", "second", cpus=1, max_concurrent=1)

    def show(state: BatchState) -> None:
        if started.is_set() and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    run.show = show
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert statuses(read_state(run.directory)) == {"first": "waiting", "second": "waiting"}
    assert statuses(batch_run(tmp_path, Waits(), "first", "second", "new").run()) == dict.fromkeys(
        ("first", "second", "new"), "done"
    )


def test_a_task_that_is_done_stays_so_until_it_was_checked_again(tmp_path: Path) -> None:
    losses = {"train_loss": 2.0, "original_loss": 4.0, "served_loss": 3.0, "seconds": 60.0, "notes": 2}
    done = TaskState("done", "done", "evaluate", **losses)  # type: ignore[arg-type]
    started, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert let_go.wait(20)

    work = Waits({"new": hold})
    run = batch_run(tmp_path, work, "new", "done", cpus=1, max_concurrent=1, before=(TaskState("new", "failed"), done))
    shown: list[dict[str, str]] = []
    run.show = lambda state: shown.append(statuses(state))
    thread = threading.Thread(target=run.run)
    thread.start()
    assert started.wait(20)
    state = read_state(run.directory)
    assert state is not None
    assert state.tasks[1] == dataclasses.replace(done, planned_seconds=2.0, planned_bytes=100)
    with pytest.raises(ConfigError, match="done is done already: there is nothing to cancel"):
        cancel(run.directory, ["done"])
    run.directory.path("cancel-done").write_text("done")  # asked before it was done
    let_go.set()
    thread.join(20)
    assert read_cancelled(run.directory) == set()
    assert shown[0] == {"new": "waiting", "done": "done"}
    assert statuses(run.board.state()) == {"new": "done", "done": "done"}
    assert ("done", "finetune") in work.begun
    assert run.board["done"].notes == 0  # counted anew


def test_an_edited_task_waits_without_what_it_was(tmp_path: Path) -> None:
    done = TaskState("a", "done", "evaluate", original_loss=4.0, served_loss=3.0)
    run = batch_run(tmp_path, Waits(edited={"a"}), "a", before=(done,))
    assert run.board["a"] == TaskState("a", planned_seconds=2.0, planned_bytes=100)


def test_a_task_that_fails_before_its_first_stage_has_no_results(tmp_path: Path) -> None:
    class Refuses(Waits):
        def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
            raise ConfigError("run_dir needs 90 GB: make room.")

    losses = {"train_loss": 2.0, "original_loss": 4.0, "served_loss": 3.0, "seconds": 60.0}
    done = TaskState("a", "done", "evaluate", (4, 4), taken=("data",), **losses)  # type: ignore[arg-type]
    (task,) = batch_run(tmp_path, Refuses(), "a", before=(done,)).run().tasks
    times = {"started_at": task.started_at, "ended_at": task.ended_at, "planned_seconds": 2.0, "planned_bytes": 100}
    assert task == TaskState("a", "failed", reason="run_dir needs 90 GB: make room.", **times)  # type: ignore[arg-type]


@pytest.mark.parametrize("makes", [False, True])
def test_a_task_that_is_checked_again_keeps_the_times_in_which_it_was_made(tmp_path: Path, makes: bool) -> None:
    class Checks(Waits):
        def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
            reporter.skip("calibrate")
            if makes:
                reporter.start("finetune")

    done = TaskState("a", "done", "evaluate", started_at=1.0, ended_at=99.0)
    old, new = (
        batch_run(tmp_path, Checks(), "a", "b", before=(done, TaskState("b", "failed", ended_at=99.0))).run().tasks
    )
    assert ((old.started_at, old.ended_at) == (1.0, 99.0)) != makes
    assert new.ended_at is not None
    assert new.ended_at > 99.0


def test_who_waits_for_resources_says_so_until_its_stage_begins(tmp_path: Path) -> None:
    run, shown = batch_run(tmp_path, Waits(seconds=0.6), "a", "b", cpus=1.0), list[TaskState]()
    run.show = lambda state: shown.extend(state.tasks)
    run.run()
    assert {task.active for task in shown if task.waits_for is None} == {False, True}
    assert {(task.status, task.active) for task in shown if task.waits_for == "resources"} == {("running", False)}


def test_of_equal_priority_who_has_begun_what_others_share_comes_first(tmp_path: Path) -> None:
    tries = {"b": {"calibrate": ("key", 1.0)}, "c": {"calibrate": ("key", 2.0)}, "d": {"calibrate": ("other", 1.0)}}
    work = Waits(tries=tries)
    batch_run(tmp_path, work, *"abcde", max_concurrent=1, e=1).run()
    assert [task for task, stage in work.begun if stage == "calibrate"] == ["e", "c", "d", "a", "b"]


def test_who_waits_for_one_that_has_begun_goes_on_when_that_one_fails(tmp_path: Path) -> None:
    let_go = threading.Event()

    def fail() -> None:
        assert let_go.wait(20)
        raise StageError("data: it is gone.")

    class Shares(Waits):
        def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
            if task.name == "begun":
                fail()
            threading.Timer(0.3, let_go.set).start()
            with turns.first("calibrate", "key"):
                assert let_go.is_set()

    run = batch_run(tmp_path, Shares(tries={"begun": {"calibrate": ("key", 1.0)}}), "other", "begun")
    assert statuses(run.run()) == {"other": "done", "begun": "failed"}


def test_what_is_redone_has_its_old_losses_no_more(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "task")
    run.create({})
    board = Board(0.0, [TaskState("a", "running", train_loss=2.0, original_loss=4.0, served_loss=3.0, taken=("data",))])
    reporter = TaskReporter(board, "a", lambda text: None)
    run.write_metrics({"stages": {"data": {"wall_s": 5.0}}})
    reporter.changed(run)
    assert board["a"] == TaskState("a", "running", seconds=5.0)


def test_what_a_task_took_from_the_cache_in_earlier_tries_counts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "task")
    run.create({})
    board = Board(0.0, [TaskState("a", "running")])
    run.write_metrics({"stages": {"data": {"wall_s": 5.0, "taken_from": "other"}, "calibrate": {"wall_s": 1.0}}})
    TaskReporter(board, "a", lambda text: None).changed(run)
    assert board["a"].taken == ("data",)


def test_a_task_has_the_loss_of_what_is_served(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "task")
    run.create({})
    board = Board(0.0, [TaskState("a", "running")])
    losses = {"original": 4.0, "corrected": 3.0, "finished": 2.5, "merged": 2.5}
    run.write_metrics({"stages": {}, "evaluation": {name: {"loss": loss} for name, loss in losses.items()}})
    TaskReporter(board, "a", lambda text: None).changed(run)
    assert (board["a"].original_loss, board["a"].served_loss) == (4.0, 2.5)


def test_a_full_disk_for_a_moment_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    run = batch_run(tmp_path, Waits(seconds=0.5), "a", "b")
    run.tell = told.append
    failures = iter([None, *[OSError(28, "No space left on device")] * 2])

    def fail_twice(*given: object) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        write_state(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "write_state", fail_twice)
    monkeypatch.setattr(runner, "WRITE_S", 0.0)
    state = run.run()
    assert statuses(state) == {"a": "done", "b": "done"}
    assert read_state(run.directory) == state
    assert [text.endswith("No space left on device: trying again.") for text in told] == [True]


def test_a_store_that_does_not_answer_for_a_moment_ends_nothing_and_another_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    errors: Iterator[Exception | None] = iter([None, *[ArtifactError("s3://b does not write lock.")] * 2])

    def check_held(run: RunDirectory) -> None:
        if (error := next(errors, None)) is not None:
            raise error

    monkeypatch.setattr(RunDirectory, "check_held", check_held)
    run = batch_run(tmp_path, Waits(seconds=0.5), "a", "b")
    run.tell = told.append
    assert statuses(run.run()) == {"a": "done", "b": "done"}
    assert [text.endswith("s3://b does not write lock: trying again.") for text in told] == [True]
    errors = iter([None, TakenOver("taken")])
    with pytest.raises(TakenOver):
        batch_run(tmp_path, Waits(seconds=0.5), "c").run()


def test_no_task_begins_while_the_store_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that wait would fail one after another, within a minute."""
    asked: list[bool] = []
    answers = threading.Event()

    def check_held(run: RunDirectory) -> None:
        asked.append(answers.is_set())
        if not answers.is_set():
            raise ArtifactError("s3://b does not write lock.")

    def act() -> None:
        begun.append(answers.is_set())

    begun: list[bool] = []
    run = batch_run(tmp_path, Waits({"a": act, "b": act}), "a", "b")
    monkeypatch.setattr(RunDirectory, "check_held", check_held)
    threading.Timer(1.2, answers.set).start()
    assert statuses(run.run()) == {"a": "done", "b": "done"}
    assert asked.count(False) >= 2
    assert begun
    assert all(begun)


def test_a_batch_that_runs_is_told_from_a_free_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "batch")
    check_free(run)
    run.create({}, kind="batch")
    run.lock()
    try:
        with pytest.raises(
            ConfigError, match=r"is run by process \d+ on .*: stop that with Ctrl-C, then give this command"
        ):
            check_free(run)
    finally:
        run.unlock()


def test_a_batch_on_a_store_is_not_refused_by_this_machine_s_clock(
    node_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emloc_ray.io.runs.directory.find_holder", lambda store: "process 7 on n1")
    run = RunDirectory("s3://bucket/batch")
    assert run.holder() == "process 7 on n1"
    check_free(run)
