"""Runs a batch: every task a pipeline in a thread of its own, whose stages are admitted one by one on the cluster."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from emloc_ray.batch.admission import Admission, AdmissionQueue, Amount, Grant, Need, Standing
from emloc_ray.batch.board import Board, TaskReporter, ended
from emloc_ray.batch.state import BatchState, TaskState, requests, write_state
from emloc_ray.batch.tasks import Task
from emloc_ray.batch.turns import Expected, Makers, TaskTurns
from emloc_ray.config import RayConfig
from emloc_ray.errors import EmlocError, Stopped
from emloc_ray.io.run_directory import RunDirectory

_TICK_S = 0.5
_WRITE_S = 2.0
_GRACE_S = 60.0  # for stages to end once they were asked to
_SEAT = Need(Amount(cpus=1.0), workers=1, least=1)


class Work(Protocol):
    """What a batch does with a task."""

    def expected(self, task: Task) -> Mapping[str, Expected]:
        """The task's stages in order, and what each is expected to take."""

    def do(self, task: Task, turns: TaskTurns, reporter: TaskReporter) -> None:
        """All of a task; raises EmlocError where it fails, Stopped where its turns say so."""

    def forget(self, task: Task) -> None:
        """The task is over: what was kept for it goes."""


@dataclass(frozen=True)
class _Open:
    """A task under way: its thread, and the seat that it holds."""

    thread: threading.Thread
    seat: Grant


class BatchRun:
    """One run of a batch over its directory."""

    def __init__(
        self,
        run: RunDirectory,
        board: Board,
        work: Work,
        admission: Admission,
        max_concurrent: int,
        show: Callable[[BatchState], None] = lambda state: None,
        tell: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        ray: RayConfig | None = None,
    ) -> None:
        """``admission`` admits stages; ``max_concurrent`` tasks are under way at once; ``ray`` is that of tasks added later."""
        self.directory, self.board, self.work, self.admission = run, board, work, admission
        self.max_concurrent, self.show, self.tell, self.clock = max_concurrent, show, tell, clock
        self.ray, self.makers = ray, Makers(admission)
        self.tasks: dict[str, Task] = {}
        self._seats = AdmissionQueue(clock)
        self._tickets: dict[str, Any] = {}
        self._open: dict[str, _Open] = {}
        self._cancelled: set[str] = set()
        self._ending = False
        self._changed = threading.Event()
        self._written = (-1, 0.0)

    def add(self, task: Task) -> None:
        """A task that waits for its turn; one that was over is begun again, and keeps what it had finished."""
        expected = self.work.expected(task)
        seconds = sum(stage.seconds for stage in expected.values())
        held = max((stage.worker_bytes for stage in expected.values()), default=0)
        self.tasks[task.name] = task
        self.board.put(TaskState(task.name, planned_seconds=seconds, planned_bytes=held))
        self._cancelled.discard(task.name)
        self._tickets[task.name] = self._seats.ask(self._standing(task, seconds), "task", _SEAT)

    def run(self) -> BatchState:
        """Until every task is over; what was asked for meanwhile (:func:`emloc_ray.batch.state.ask`) is done.

        Raises:
            KeyboardInterrupt: after the stages under way were asked to end, and did, or a minute has passed.
        """
        try:
            while True:
                self._hear()
                self._seat()
                self._tell_state()
                if not self._open and not self._tickets:
                    return self.board.state()
                self._changed.wait(_TICK_S)
                self._changed.clear()
        except BaseException:
            self._end()
            raise
        finally:
            self._tell_state(at_once=True)

    def cancel(self, name: str) -> None:
        """Ends one task: at once where it waits, else as soon as its stage can leave off."""
        self._cancelled.add(name)
        ticket = self._tickets.pop(name, None)
        if ticket is not None:
            self._seats.withdraw(ticket)
            ended(self.board, name, "cancelled")
        self.admission.wake()

    def _hear(self) -> None:
        for request in requests(self.directory):
            for values in request.get("add", []):
                task = Task.from_dict(values, self.ray)
                if task.name in self.board and not self.board[task.name].is_over:
                    continue
                try:
                    self.add(task)
                except EmlocError as error:
                    self.board.put(TaskState(task.name))
                    ended(self.board, task.name, "failed", str(error))
                self.tell(f"{task.name} was added.")
            for name in request.get("cancel", []):
                if name in self.board and not self.board[name].is_over:
                    self.cancel(name)
                    self.tell(f"{name} is cancelled.")

    def _seat(self) -> None:
        """Collects the tasks that are over, and begins those whose turn it is."""
        for name, opened in list(self._open.items()):
            if not opened.thread.is_alive():
                del self._open[name]
                self._seats.release(opened.seat)
        for seat in self._seats.admit(Amount(cpus=self.max_concurrent)):
            name = seat.ticket.standing.task
            del self._tickets[name]
            thread = threading.Thread(target=self._do, args=(self.tasks[name],), name=f"task {name}", daemon=True)
            self._open[name] = _Open(thread, seat)
            thread.start()

    def _do(self, task: Task) -> None:
        name = task.name
        self.board.change(name, status="running", started_at=time.time())
        reporter = TaskReporter(self.board, name, self.tell)
        standing = self._standing(task, self.board[name].planned_seconds)
        expected = self.work.expected(task)
        turns = TaskTurns(
            standing,
            self.admission,
            self.makers,
            expected,
            lambda: self._is_to_stop(name, standing.due),
            reporter.waits,
        )
        try:
            self.work.do(task, turns, reporter)
            ended(self.board, name, "done")
        except Stopped:
            self._tell_stopped(name)
        except EmlocError as error:
            ended(self.board, name, "failed", " ".join(str(error).split("\n")))
        except Exception as error:
            ended(self.board, name, "failed", f"{type(error).__name__}: {error}")
        finally:
            self.work.forget(task)
            self._changed.set()

    def _tell_stopped(self, name: str) -> None:
        if name in self._cancelled:
            ended(self.board, name, "cancelled")
        elif self._ending:
            self.board.change(name, status="waiting", active=False)
        else:
            ended(self.board, name, "late", "its deadline passed")

    def _is_to_stop(self, name: str, due: float | None) -> bool:
        return self._ending or name in self._cancelled or (due is not None and self.clock() > due)

    def _standing(self, task: Task, seconds: float) -> Standing:
        return Standing(task.name, task.priority, task.owner, self._due(task), seconds)

    def _due(self, task: Task) -> float | None:
        """The deadline on the clock of this process."""
        if task.deadline is None:
            return None
        if isinstance(task.deadline, datetime.timedelta):
            at = self.board.started_at + task.deadline.total_seconds()
        else:
            at = task.deadline.timestamp()
        return self.clock() + at - time.time()

    def _tell_state(self, at_once: bool = False) -> None:
        state = self.board.state()
        self.show(state)
        version, written_at = self._written
        now = time.monotonic()
        if at_once or (self.board.version != version and now - written_at >= _WRITE_S):
            self._written = (self.board.version, now)
            write_state(self.directory, state)

    def _end(self) -> None:
        self._ending = True
        self.admission.wake()
        end = time.monotonic() + _GRACE_S
        for opened in self._open.values():
            opened.thread.join(max(0.0, end - time.monotonic()))
