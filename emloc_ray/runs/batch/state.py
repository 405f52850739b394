"""The state of a batch's tasks: ``batch.json`` and its parts in the directory, and the board that threads write to."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from emloc_ray.config.steps import served_variant
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.atomic import write_json, write_text
from emloc_ray.io.store.node_cache import discard, ensure
from emloc_ray.io.store.object_store import MANIFEST
from emloc_ray.runs.reporter import Awaited, Reporter

STATE = "batch.json"
_CANCEL = "cancel-"
_FORMAT = 3
_TASKS_A_PART = 50

Status = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class TaskState:
    """The state of one task; times in seconds since 1970, ``seconds`` of its stages in all tries. ``stage`` is the one that it
    runs, waits for or ended in; ``units``: those done of this stage, and all; ``waits_for``: what keeps it from running;
    ``served_loss``: of the result as it is served."""

    name: str
    status: Status = "waiting"
    stage: str | None = None
    units: tuple[int, int] | None = None
    active: bool = False
    reason: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    seconds: float = 0.0
    planned_seconds: float = 0.0
    planned_bytes: int = 0
    train_loss: float | None = None
    original_loss: float | None = None
    served_loss: float | None = None
    notes: int = 0
    taken: tuple[str, ...] = ()
    stage_began_at: float | None = None
    waits_for: Awaited | None = None

    @property
    def is_over(self) -> bool:
        """Whether this run of the batch is done with the task."""
        return self.status in ("done", "failed", "cancelled")


@dataclass(frozen=True)
class BatchState:
    """All tasks, in the batch's order; ``started_at`` is when the batch first began."""

    started_at: float
    tasks: tuple[TaskState, ...] = ()

    def count(self, *statuses: str) -> int:
        """How many tasks have one of these statuses."""
        return sum(task.status in statuses for task in self.tasks)


_PART = TypeAdapter(tuple[TaskState, ...])


def is_batch(run: RunDirectory) -> bool:
    """Whether a directory is a batch's, not a run's, from its manifest on."""
    return MANIFEST in run.names() and run.manifest().get("kind") == "batch"


def read_state(run: RunDirectory) -> BatchState | None:
    """What ``batch.json`` and its parts say; None where there is none. Raises ArtifactError where one of them is unreadable, or
    of another version."""
    path = run.path(STATE)
    ensure(path)
    if not path.is_file():
        return None
    try:
        head: Any = json.loads(path.read_text())
        if head["format"] != _FORMAT:
            raise ValueError
        parts = (_read_part(run, number) for number in range(head["parts"]))
        return BatchState(float(head["started_at"]), tuple(task for part in parts for task in part))
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path} is of another version of emloc_ray, or damaged: remove it, and the batch checks every task again."
        ) from error


def _read_part(run: RunDirectory, number: int) -> tuple[TaskState, ...]:
    path = _part_path(run, number)
    ensure(path)
    return _PART.validate_json(path.read_bytes())


def _part_path(run: RunDirectory, number: int) -> Path:
    return run.path(f"batch-{number:03}.json")


def write_state(run: RunDirectory, state: BatchState, before: BatchState | None = None) -> None:
    """Writes the state in parts of 50 tasks: those that differ from ``before``; all, then ``batch.json``, where that is
    None.

    To write all parts whenever a task ends would write bytes that grow with the square of the number of tasks.
    """
    parts, old = _parts(state), [] if before is None else _parts(before)
    for number, part in enumerate(parts):
        if before is None or part != old[number]:
            write_json(_part_path(run, number), [vars(task) for task in part])
    if before is None:
        write_json(run.path(STATE), {"format": _FORMAT, "started_at": state.started_at, "parts": len(parts)})


def _parts(state: BatchState) -> list[tuple[TaskState, ...]]:
    return [state.tasks[k : k + _TASKS_A_PART] for k in range(0, len(state.tasks), _TASKS_A_PART)]


def cancel(run: RunDirectory, names: Sequence[str], undo: bool = False) -> bool:
    """Cancels tasks, in this run of the batch and later ones, by a file that holds the name; ``undo`` removes the file.

    Returns whether a process runs the batch now. Raises ConfigError where it is no batch, or one that has not begun, a task is
    unknown or over, or ``undo`` is asked of a running batch.
    """
    state, holder = read_state(run), run.holder()
    if state is None and is_batch(run):  # written once Ray has started
        raise ConfigError(f"{run.place} has no tasks yet: try again once emloc-ray status {run.place} lists them.")
    if state is None:
        raise ConfigError(f"{run.place} is no batch's directory: name the run_dir of one.")
    if undo and holder is not None:
        raise ConfigError(f"{run.place} is run by {holder}: undo once that is over, then run emloc-ray batch again.")
    statuses = {task.name: task.status for task in state.tasks}
    cancelled = read_cancelled(run)
    for name in names:
        status = statuses.get(name)
        if status is None:
            raise ConfigError(f"{run.place} has no task {name}: emloc-ray status {run.place} lists them.")
        if undo and name not in cancelled:
            raise ConfigError(f"{name} is {status}, not cancelled: emloc-ray batch runs it anyway.")
        # Where no process runs the batch, the next run tries failed tasks again.
        if not undo and (status == "done" or (holder and status in ("failed", "cancelled"))):
            raise ConfigError(f"{name} is {status} already: there is nothing to cancel.")
    for name in names:
        if undo:
            remove_cancel(run, name)
            continue
        write_text(run.path(_CANCEL + name), name)
    return holder is not None


def read_cancelled(run: RunDirectory) -> set[str]:
    """The names of the tasks that are cancelled."""
    return {name.removeprefix(_CANCEL) for name in run.names() if name.startswith(_CANCEL)}


def remove_cancel(run: RunDirectory, name: str) -> None:
    """Removes the file that cancels a task."""
    discard(run.path(_CANCEL + name))


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

    def change(self, name: str, **values: Any) -> None:
        """Sets values of a task's state."""
        with self._lock:
            before = self._tasks[name]
            self._tasks[name] = dataclasses.replace(before, **values)
            self.version += self._tasks[name] != before

    def begin(self, name: str) -> None:
        """Begins a task, with its plan alone: its results may be made again."""
        with self._lock:
            before = self._tasks[name]
            self._tasks[name] = TaskState(
                name,
                "running",
                started_at=time.time(),
                planned_seconds=before.planned_seconds,
                planned_bytes=before.planned_bytes,
            )
            self.version += 1

    def end(
        self, name: str, status: Status, reason: str | None = None, times: Mapping[str, float | None] | None = None
    ) -> None:
        """Ends a task, for this run of the batch, now; ``times``: when it was made, where that was before."""
        self.change(name, status=status, reason=reason, active=False, **(times or {"ended_at": time.time()}))

    def state(self) -> BatchState:
        """All states as they are now."""
        with self._lock:
            return BatchState(self.started_at, tuple(self._tasks.values()))


class TaskReporter(Reporter):
    """A reporter that keeps one task's line of the board."""

    def __init__(self, board: Board, name: str, tell: Callable[[str], None]) -> None:
        self.board, self.name, self.tell = board, name, tell
        self.has_begun = False  # any stage

    def wait(self, stage: str, awaited: Awaited | None = None) -> None:
        """A stage is next."""
        self.board.change(self.name, stage=stage, units=None, active=False, waits_for=awaited)

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        self.has_begun = True
        self.board.change(self.name, stage=stage, units=None, active=True, waits_for=None, stage_began_at=time.time())
        return lambda done, total: self.board.change(self.name, units=(done, total))

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has finished."""
        self.board.change(self.name, active=False)

    def skip(self, stage: str) -> None:
        """A stage was done already."""
        self.board.change(self.name, stage=stage, units=None, active=False)

    def note(self, text: str) -> None:
        """Counts a remark, and says it."""
        self.board.change(self.name, notes=self.board[self.name].notes + 1)
        self.tell(f"{self.name}: {text}")

    def changed(self, run: RunDirectory) -> None:
        """Keeps the run's time and losses so far, and what it took from the cache, with the stages of earlier tries."""
        metrics = run.metrics()
        losses = {name: values["loss"] for name, values in metrics.get("evaluation", {}).items()}
        self.board.change(
            self.name,
            seconds=sum(stage["wall_s"] for stage in metrics["stages"].values()),
            train_loss=metrics.get("finetune", {}).get("train_loss"),
            original_loss=losses.get("original"),
            served_loss=losses.get(served_variant(losses)),
            taken=tuple(name for name, stage in metrics["stages"].items() if stage.get("taken_from")),
        )
