"""How each task of a batch stands, as ``batch.json`` in the batch's directory; and what is asked of a batch that runs."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, TypeAdapter

from emloc_ray.config.base import Section
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.store.atomic import write_json
from emloc_ray.io.store.node_cache import discard, ensure
from emloc_ray.io.runs.directory import RunDirectory

STATE = "batch.json"
_REQUEST = "request-"
_FORMAT = 1

Status = Literal["waiting", "running", "done", "failed", "late", "cancelled"]
UNFINISHED = ("waiting", "running")


@dataclass(frozen=True)
class TaskState:
    """One task's standing; times in seconds since 1970, ``seconds`` those of its stages in this try and earlier ones.

    ``stage`` is the one that it is at, waits for, or ended in; ``units`` how many of that are done, of how many;
    ``to_cancel``, that it was asked to end; ``digest``, of what was asked of it.
    """

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
    corrected_loss: float | None = None
    notes: int = 0
    taken: tuple[str, ...] = ()
    to_cancel: bool = False
    digest: str = ""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants it any more, even where it has not left off yet; what was done before it could is done."""
        return self.status == "cancelled" or (self.to_cancel and self.status != "done")

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to it in this batch's present run."""
        return self.status not in UNFINISHED


@dataclass(frozen=True)
class BatchState:
    """All tasks, in the batch's order; ``started_at`` is when the batch first began."""

    started_at: float
    tasks: tuple[TaskState, ...] = ()

    def count(self, *statuses: str) -> int:
        """How many tasks stand so."""
        return sum(task.status in statuses for task in self.tasks)


_WRITTEN = TypeAdapter(BatchState)


def is_batch(run: RunDirectory) -> bool:
    """Whether a directory is a batch's rather than a run's."""
    ensure(run.path(STATE))
    return run.path(STATE).is_file()


def read_state(run: RunDirectory) -> BatchState | None:
    """What ``batch.json`` says; None where there is none.

    Raises:
        ArtifactError: where it is unreadable, or of another version.
    """
    if not is_batch(run):
        return None
    path = run.path(STATE)
    try:
        values: Any = json.loads(path.read_text())
        if values["format"] != _FORMAT:
            raise ValueError
        return _WRITTEN.validate_python(values)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path} is no state of a batch of this version: remove it, and the tasks are looked at anew."
        ) from error


def write_state(run: RunDirectory, state: BatchState) -> None:
    """Writes ``batch.json``, whole."""
    tasks = [dataclasses.asdict(task) for task in state.tasks]
    write_json(run.path(STATE), {"format": _FORMAT, "started_at": state.started_at, "tasks": tasks})


class Request(Section):
    """What is asked of a batch: tasks to add, in their own words for JSON, and names to cancel or to restore."""

    add: list[dict[str, Any]] = Field(default_factory=list)
    cancel: list[str] = Field(default_factory=list)
    restore: list[str] = Field(default_factory=list)


def ask(run: RunDirectory, request: dict[str, Any]) -> str:
    """Leaves a :class:`Request` for whoever runs the batch, now or next; gives the name of its file."""
    name = f"{_REQUEST}{time.time():017.6f}-{uuid.uuid4().hex[:8]}.json"
    write_json(run.path(name), request)
    return name


def requests(run: RunDirectory, tell: Callable[[str], None] = lambda text: None) -> dict[str, Request]:
    """What was asked since, oldest first, by the names of the files; a file that is no request is removed, and told of."""
    found = {}
    for name in sorted(name for name in run.names() if name.startswith(_REQUEST)):
        path = run.path(name)
        ensure(path)
        try:
            found[name] = Request.model_validate_json(path.read_bytes())
        except OSError:
            continue  # taken by another
        except ValueError:
            discard(path)
            tell(f"{path} was no request that this version knows, and was removed: ask again.")
    return found


def check_names(state: BatchState, names: Iterable[str], place: str) -> None:
    """Raises ConfigError where the batch has no task of a name."""
    known = {task.name for task in state.tasks}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"{place} has no task {unknown[0]}: emloc-ray status {place} lists them.")
