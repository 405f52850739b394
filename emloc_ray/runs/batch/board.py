"""The board of a batch: every task's state, told by the tasks' own threads, shown and written by the batch's."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from emloc_ray.runs.batch.state import BatchState, TaskState


class Board:
    """All tasks' states; safe for many threads."""

    def __init__(self, started_at: float, tasks: Iterable[TaskState] = ()) -> None:
        self._lock = threading.Lock()
        self._tasks = {task.name: task for task in tasks}
        self.started_at = started_at
        self.version = 0

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def __getitem__(self, name: str) -> TaskState:
        return self._tasks[name]

    def put(self, task: TaskState) -> None:
        """A new task, or another state for one."""
        with self._lock:
            self._tasks[task.name] = task
            self.version += 1

    def change(self, name: str, **values: Any) -> None:
        """Other values of a task's state."""
        with self._lock:
            self._tasks[name] = dataclasses.replace(self._tasks[name], **values)
            self.version += 1

    def state(self) -> BatchState:
        """All of it, as it is now."""
        with self._lock:
            return BatchState(self.started_at, tuple(self._tasks.values()))


class TaskReporter:
    """A reporter that keeps one task's line of the board."""

    def __init__(self, board: Board, name: str, tell: Callable[[str], None]) -> None:
        self.board, self.name, self.tell = board, name, tell

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        self.board.change(self.name, stage=stage, units=None, active=True)
        return lambda done, total: self.board.change(self.name, units=(done, total))

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has ended well: its time, and the losses that it found."""
        task = self.board[self.name]
        values: dict[str, Any] = {"active": False, "seconds": task.seconds + usage["wall_s"]}
        if result.get("taken_from"):
            values["taken"] = (*task.taken, stage)
        self.board.change(self.name, **values, **_losses(stage, result))

    def skip(self, stage: str) -> None:
        """A stage was found done."""
        self.board.change(self.name, stage=stage, units=None, active=False)

    def note(self, text: str) -> None:
        """Something that a reader should know."""
        self.board.change(self.name, notes=self.board[self.name].notes + 1)
        self.tell(f"{self.name}: {text}")

    def results(self, metrics: dict[str, Any]) -> None:
        """What the whole run came to, stages of earlier tries included."""
        values: dict[str, Any] = {"seconds": sum(stage["wall_s"] for stage in metrics["stages"].values())}
        if "finetune" in metrics:
            values |= _losses("finetune", metrics["finetune"])
        if "evaluation" in metrics:
            values |= _losses("evaluate", metrics)
        self.board.change(self.name, **values)

    def waits(self, stage: str) -> None:
        """A stage waits for its turn."""
        self.board.change(self.name, stage=stage, units=None, active=False)


def _losses(stage: str, result: dict[str, Any]) -> dict[str, float]:
    if stage == "finetune":
        return {"train_loss": result["train_loss"]}
    if stage == "evaluate":
        evaluation = result["evaluation"]
        return {f"{name}_loss": evaluation[name]["loss"] for name in ("original", "corrected")}
    return {}


def ended(board: Board, name: str, status: str, reason: str | None = None) -> None:
    """A task is over, for this run of the batch."""
    board.change(name, status=status, reason=reason, active=False, ended_at=time.time())
