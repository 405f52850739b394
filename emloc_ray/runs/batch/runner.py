"""Runs a batch: every task a pipeline in a thread of its own, whose stages are admitted one by one on the cluster."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from emloc_ray.runs.batch.admission import Admission, AdmissionQueue, Amount, Grant, Need, Standing
from emloc_ray.runs.batch.board import Board, TaskReporter, ended
from emloc_ray.runs.batch.state import BatchState, Request, TaskState, requests, write_state
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.turns import Expected, Makers, TaskTurns
from emloc_ray.config.schema import RayConfig
from emloc_ray.errors import ConfigError, EmlocError, Stopped
from emloc_ray.io.store.node_cache import discard
from emloc_ray.io.runs.directory import RunDirectory

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
        max_concurrent: Callable[[], int],
        show: Callable[[BatchState], None] = lambda state: None,
        tell: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        ray: RayConfig | None = None,
        unfit: Callable[[Task], list[str]] = lambda task: [],
    ) -> None:
        """``admission`` admits stages; as many tasks are under way at once as ``max_concurrent`` says when it is asked; ``ray``
        is that of tasks added later, and ``unfit`` says why one of these could never run."""
        self.directory, self.board, self.work, self.admission = run, board, work, admission
        self.max_concurrent, self.show, self.tell, self.clock = max_concurrent, show, tell, clock
        self.ray, self.unfit, self.makers = ray, unfit, Makers(admission)
        self.tasks: dict[str, Task] = {}
        self._seats = AdmissionQueue(clock)
        self._tickets: dict[str, Any] = {}
        self._due: dict[str, float | None] = {}  # on the clock
        self._open: list[_Open] = []
        self._heard: set[str] = set()  # requests
        self._hindered: set[Callable[[], Any]] = set()
        self._ending = False
        self._changed = threading.Event()
        self._written = (-1, 0.0)

    def add(self, task: Task) -> None:
        """A task that waits for its turn; one that was over is begun again, and keeps what it had finished."""
        expected = self.work.expected(task)
        seconds = sum(stage.seconds for stage in expected.values())
        held = max((stage.worker_bytes for stage in expected.values()), default=0)
        self.tasks[task.name] = task
        self._due[task.name] = self._due_on_clock(task)
        self.board.put(TaskState(task.name, planned_seconds=seconds, planned_bytes=held, digest=task.digest))
        self._tickets[task.name] = self._seats.ask(self._standing(task, seconds), "task", _SEAT)

    def run(self) -> BatchState:
        """Until every task is over; what was asked for meanwhile (:func:`emloc_ray.runs.batch.state.ask`) is done.

        Raises:
            StageError: where another process took the batch over, since this one was cut off from its object store.
            KeyboardInterrupt: after the stages under way were asked to end, and did, or a minute has passed.
        """
        try:
            while True:
                self.directory.check_held()  # another process that took the batch over has its tasks now
                self.hear()
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

    def cancel(self, name: str, reason: str | None = None) -> None:
        """Ends one task: at once where it waits, else as soon as its stage can leave off."""
        self.board.change(name, to_cancel=True)
        ticket = self._tickets.pop(name, None)
        if ticket is not None:
            self._seats.withdraw(ticket)
            ended(self.board, name, "cancelled", reason)
            self.work.forget(self.tasks[name])
        self.admission.wake()

    def hear(self) -> bool:
        """Does what was asked since; whether that was anything."""
        known = len(self._heard)
        self._try(self._hear)
        return len(self._heard) > known

    def _hear(self) -> None:
        found = requests(self.directory, self.tell)
        for file, request in found.items():
            if file not in self._heard:
                self._heard.add(file)
                self._obey(request)
        if found:
            self._write()  # before they go: what a kill leaves of them is in one place or the other
        for file in found:
            discard(self.directory.path(file))

    def _obey(self, request: Request) -> None:
        for values in request.add:
            name = str(values.get("name")).strip()
            if name not in self.board or self.board[name].is_over:
                self._add_later(name, values)
        for name in request.cancel:
            if name in self.board and not self.board[name].is_over:
                self.cancel(name)
                self.tell(f"{name} is cancelled.")
        for name in request.restore:
            if name in self.tasks and self.board[name].status == "cancelled":
                self._add_later(name, self.tasks[name])

    def _add_later(self, name: str, given: Task | dict[str, Any]) -> None:
        """What is wrong with a task that is added while others run ends it alone."""
        try:
            task = given if isinstance(given, Task) else Task.from_dict(given, self.ray)
            problems = self.unfit(task)
            if problems:
                raise ConfigError(" ".join(problems))
            self.add(task)
        except Exception as error:
            self.board.put(TaskState(name))
            ended(self.board, name, "failed", _told(error))
        self.tell(f"{name} was added.")

    def _try(self, act: Callable[[], None]) -> None:
        """What a full disk or a store that is away hinders is told once, and left to the next turn."""
        try:
            act()
            self._hindered.discard(act)
        except (OSError, EmlocError) as error:
            if act not in self._hindered:
                self.tell(f"{self.directory.place}: {_told(error)}: it is tried again.")
            self._hindered.add(act)

    def _seat(self) -> None:
        """Collects the tasks that are over, and begins those whose turn it is."""
        for opened in list(self._open):
            if not opened.thread.is_alive():
                self._open.remove(opened)
                self._seats.release(opened.seat)
        for seat in self._seats.admit(Amount(cpus=self.max_concurrent())):
            name = seat.ticket.standing.task
            del self._tickets[name]
            thread = threading.Thread(target=self._do, args=(self.tasks[name],), name=f"task {name}", daemon=True)
            self._open.append(_Open(thread, seat))
            thread.start()

    def _do(self, task: Task) -> None:
        name = task.name
        self.board.change(name, status="running", started_at=time.time())
        reporter = TaskReporter(self.board, name, self.tell)
        try:
            standing = self._standing(task, self.board[name].planned_seconds)
            expected = self.work.expected(task)
            turns = TaskTurns(
                standing, self.admission, self.makers, expected, lambda: self._is_to_stop(name), reporter.waits
            )
            self.work.do(task, turns, reporter)
            ended(self.board, name, "done")
        except Stopped:
            self._tell_stopped(name)
        except (Exception, SystemExit) as error:  # a task's exit is not the batch's
            ended(self.board, name, "failed", _told(error))
        finally:
            self.work.forget(task)
            self._changed.set()

    def _tell_stopped(self, name: str) -> None:
        if self.board[name].to_cancel:
            ended(self.board, name, "cancelled")
        elif self._ending:
            self.board.change(name, status="waiting", active=False)
        else:
            ended(self.board, name, "late", "its deadline passed")

    def _is_to_stop(self, name: str) -> bool:
        due = self._due[name]
        return self._ending or self.board[name].to_cancel or (due is not None and self.clock() > due)

    def _standing(self, task: Task, seconds: float) -> Standing:
        return Standing(task.name, task.priority, task.owner, self._due[task.name], seconds)

    def _due_on_clock(self, task: Task) -> float | None:
        """The deadline of a task that is added now; a duration counts from here: an earlier run's time was no time for it."""
        if task.deadline is None:
            return None
        if isinstance(task.deadline, datetime.timedelta):
            return self.clock() + task.deadline.total_seconds()
        return self.clock() + task.deadline.timestamp() - time.time()

    def _tell_state(self, at_once: bool = False) -> None:
        self.show(self.board.state())
        version, written_at = self._written
        if at_once or (self.board.version != version and time.monotonic() - written_at >= _WRITE_S):
            self._try(self._write)

    def _write(self) -> None:
        version = self.board.version
        write_state(self.directory, self.board.state())
        self._written = (version, time.monotonic())

    def _end(self) -> None:
        self._ending = True
        self.admission.wake()
        end = time.monotonic() + _GRACE_S
        for opened in self._open:
            opened.thread.join(max(0.0, end - time.monotonic()))


def _told(error: BaseException) -> str:
    """On one line."""
    text = " ".join(str(error).split("\n"))
    return text if isinstance(error, EmlocError) else f"{type(error).__name__}: {text}"
