"""Runs a batch: every task is a pipeline in its own thread, whose stages are admitted one by one."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from emloc_ray.errors import ArtifactError, EmlocError, Stopped
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.secret_values import hide_secrets
from emloc_ray.runs.batch.admission import Admission, Amount
from emloc_ray.runs.batch.begun import Begun
from emloc_ray.runs.batch.config import MAX_CONCURRENT
from emloc_ray.runs.batch.state import (
    BatchState,
    Board,
    TaskReporter,
    TaskState,
    read_cancelled,
    read_state,
    remove_cancel,
    write_state,
)
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.work import TaskPlan, TaskTurns
from emloc_ray.text import one_line, visible

_MIN_CONCURRENT = 4
_MAX_RUNNING = 512  # those that wait for another task too: each has a thread, and its run's lock open
_TICK_S = 0.5
WRITE_S = 2.0  # between two writes of the state
_GRACE_S = 60.0  # for stages to end once they were asked to


class Work(Protocol):
    """What a batch does with a task."""

    def planned(self, task: Task) -> TaskPlan:
        """The task's plan."""

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        """Runs all of a task; raises EmlocError where it fails, Stopped where its turns say so."""

    def forget(self, task: Task) -> None:
        """Forgets a task that is over."""


class BatchRun:
    """One run of a batch over its directory."""

    def __init__(
        self,
        run: RunDirectory,
        tasks: Sequence[Task],
        work: Work,
        capacity: Callable[[], Amount],
        max_concurrent: int | None = None,
        show: Callable[[BatchState], None] = lambda state: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``capacity``: what the tasks may use now; ``max_concurrent``: see :func:`concurrency`."""
        self.directory, self.work, self.capacity, self.max_concurrent = run, work, capacity, max_concurrent
        self.show, self.tell = show, tell
        before = read_state(run) or BatchState(time.time())
        self._done = {task.name: task for task in before.tasks if task.status == "done"}
        self.board = Board(before.started_at, map(self._begin, tasks))
        self.admission = Admission()
        begun = {task.name: work.planned(task).begun for task in tasks}
        self._begun = Begun(begun, lambda name: name in self._running)
        # Of the same priority those first that others may wait for, else as in the file.
        in_order = sorted(tasks, key=lambda task: (-task.priority, task.name not in self._begun.tasks))
        self._order = {task.name: number for number, task in enumerate(in_order)}
        self._waiting = {task.name: task for task in in_order}
        self._running: dict[str, threading.Thread] = {}
        self._cancelled: set[str] = set()
        self._failing: set[Callable[[], None]] = set()
        self._ending = False
        self._task_ended = threading.Event()
        self._written = (-1, 0.0)
        self._last: BatchState | None = None  # as written

    def run(self) -> BatchState:
        """Runs until every task is over; cancels those whose cancel file appears. Raises StageError where another process took
        the batch over, while this one was cut off from its object store, KeyboardInterrupt after the running stages were
        stopped, or a minute has passed."""
        self._write()  # at once, for status and cancel
        self.show(self.board.state())
        try:
            while True:
                self._attempt(self.directory.check_held)  # else another process has taken the batch and its tasks over
                is_over = not self._running and not self._waiting
                self._attempt(self._cancel_asked)
                self._start_tasks()
                self._publish()
                if is_over:
                    return self.board.state()
                self._task_ended.wait(_TICK_S)
                self._task_ended.clear()
        except BaseException:
            self._end()
            raise
        finally:
            self._publish(at_once=True)

    def _begin(self, task: Task) -> TaskState:
        """A task that is done stays so, with its results, until it is its turn to be checked again; not one that was edited."""
        plan, fresh = self.work.planned(task), TaskState(task.name)
        before = fresh if plan.edited else self._done.get(task.name, fresh)
        return replace(before, planned_seconds=plan.seconds, planned_bytes=plan.peak_bytes)

    def _start_tasks(self) -> None:
        capacity = self.capacity()
        self.admission.update(capacity)
        if self._failing:  # what fails the batch, a full disk or a store, would fail every task that begins now
            return
        running = [*self._running]
        busy = sum(self.max_concurrent is not None or self.board[name].waits_for != "another" for name in running)
        free = min(concurrency(self.max_concurrent, capacity) - busy, _MAX_RUNNING - len(running))
        for name in list(self._waiting)[: max(0, free)]:
            task = self._waiting.pop(name)
            self._running[name] = threading.Thread(target=self._do, args=(task,), name=f"task {name}", daemon=True)
            self._running[name].start()

    def _do(self, task: Task) -> None:
        name = task.name
        self.board.begin(name)
        reporter = TaskReporter(self.board, name, self.tell)
        try:
            plan = self.work.planned(task)
            turns = TaskTurns(
                name,
                self._order[name],
                self.admission,
                plan,
                lambda: self._ending or name in self._cancelled,
                lambda stage: reporter.wait(stage, "resources"),
                self._begun,
            )
            self.work.do(task, turns, reporter)
            before = None if reporter.has_begun else self._done.get(name)
            times = None if before is None else {"started_at": before.started_at, "ended_at": before.ended_at}
            self.board.end(name, "done", times=times)
        except Stopped:
            if name in self._cancelled:
                self.board.end(name, "cancelled")
            else:
                self.board.change(name, status="waiting", active=False)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a task's exit is not the batch's
            self.board.end(name, "failed", _reason(error))
        finally:
            self.work.forget(task)
            del self._running[name]
            self._task_ended.set()

    def _cancel_asked(self) -> None:
        """Cancels tasks that have a cancel file: waiting ones at once, running ones as soon as their stage can stop."""
        for name in read_cancelled(self.directory):
            if name in self.board and self.board[name].status == "done":
                remove_cancel(self.directory, name)  # it came too late
            elif name in self._waiting:
                self.board.end(name, "cancelled")
                self.work.forget(self._waiting.pop(name))
            elif name in self._running and name not in self._cancelled:
                self._cancelled.add(name)
                self.tell(f"{name} ends as soon as its stage can stop.")

    def _publish(self, at_once: bool = False) -> None:
        self.show(self.board.state())
        version, written_at = self._written
        if at_once or (self.board.version != version and time.monotonic() - written_at >= WRITE_S):
            self._attempt(self._write)

    def _write(self) -> None:
        version, state = self.board.version, self.board.state()
        write_state(self.directory, state, self._last)
        self._written, self._last = (version, time.monotonic()), state

    def _attempt(self, action: Callable[[], None]) -> None:
        """Tries an action; where a disk is full or a store does not answer, says so once and leaves it to the next tick. Raises
        TakenOver."""
        try:
            action()
            self._failing.discard(action)
        except (OSError, ArtifactError) as error:
            if action not in self._failing:
                self.tell(f"{self.directory.place}: {one_line(_reason(error), 2000)}: trying again.")
            self._failing.add(action)

    def _end(self) -> None:
        self._ending = True
        end = time.monotonic() + _GRACE_S
        for thread in list(self._running.values()):
            thread.join(max(0.0, end - time.monotonic()))


def concurrency(max_concurrent: int | None, capacity: Amount) -> int:
    """How many tasks run at once: ``max_concurrent``, or two a CPU or GPU, up to 128, beside those that wait for what
    another makes."""
    return min(max_concurrent or max(_MIN_CONCURRENT, 2 * int(max(capacity.cpus, capacity.gpus))), MAX_CONCURRENT)


def _reason(error: BaseException) -> str:
    text = visible(hide_secrets(" ".join(str(error).split("\n"))))  # the state, the summary and the page are UTF-8
    return text if isinstance(error, EmlocError) else f"{type(error).__name__}: {text}"
