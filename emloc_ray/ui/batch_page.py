"""A batch's report.html, made from batch.json and the tasks' manifests: how tasks ended, when their stages ran."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from emloc_ray.errors import ArtifactError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.places import below
from emloc_ray.runs.batch.state import BatchState, TaskState
from emloc_ray.text import visible
from emloc_ray.ui.batch_table import counts, status_text
from emloc_ray.ui.page import last_minute, render_page, write_page
from emloc_ray.ui.timeline import Clock, StageRun, draw, running_time, stage_runs

_TEMPLATE = "batch_report.html.j2"
_LOST = ("failed", "cancelled")
_MAX_ROWS = 2000
_MAX_REASON = 400  # letters: batch.json has all
_READERS = 8

Stages = Mapping[str, Sequence[StageRun]]  # of each task that has begun, by its name


def write_batch_report(run: RunDirectory, state: BatchState) -> Path:
    """Writes ``report.html`` into the batch's directory; leaves out what no task has reached yet."""
    return write_page(run, render_batch(run.name, state, read_stages(run, state)))


def read_stages(run: RunDirectory, state: BatchState) -> dict[str, tuple[StageRun, ...]]:
    """The stages in the tasks' manifests, by task; leaves out tasks without a manifest."""

    def read(task: TaskState) -> tuple[StageRun, ...] | None:
        try:
            manifest = RunDirectory(below(run.place, "tasks", task.name)).manifest()
        except ArtifactError:
            return None
        return stage_runs(manifest)

    with ThreadPoolExecutor(_READERS) as pool:
        pairs = zip(state.tasks, pool.map(read, state.tasks), strict=True)
        return {task.name: stages for task, stages in pairs if stages is not None}


def render_batch(name: str, state: BatchState, stages: Stages) -> str:
    """The page's HTML."""
    ordered = sorted(state.tasks, key=lambda task: task.status != "failed")
    rows = [_row(task, stages.get(task.name, ())) for task in ordered]
    gains = {row["name"]: row["gain"] for row in rows if row["gain"] is not None and math.isfinite(row["gain"])}
    every = [stage for of_task in stages.values() for stage in of_task]
    times = [task.ended_at for task in state.tasks if task.ended_at] + [stage.finished_at for stage in every]
    clock = running_time(_spans(state, every))
    view: dict[str, Any] = {
        "name": name,
        "updated": last_minute(times),
        "counts": counts(state),
        "num_tasks": len(state.tasks),
        "num_done": state.count("done"),
        "clock": clock,
        "worked": sum(stage.finished_at - stage.begun_at for stage in every),
        "num_stages": len(every),
        "num_taken": sum(stage.taken for stage in every),
        "best": max(gains.items(), key=lambda item: item[1]) if gains else None,
        "median": statistics.median(gains.values()) if gains else None,
        "top": max(gains.values(), default=0.0),
        "rows": rows[:_MAX_ROWS],
        "timeline": timeline(clock, state, stages) if clock and every else None,
    }
    return render_page(_TEMPLATE, view)


def _row(task: TaskState, stages: Sequence[StageRun]) -> dict[str, Any]:
    before, after = task.original_loss, task.served_loss
    reason = visible(task.reason or "")
    return {
        "name": visible(task.name),
        "href": f"tasks/{quote(task.name, safe='=', errors='replace')}/report.html" if stages else None,
        "status": task.status,
        "status_text": visible(status_text(task)),
        "reason": reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]} …",
        "losses": None if before is None or after is None else (before, after),
        "gain": None if before is None or after is None else before - after,
        "seconds": task.seconds,
        "taken": [stage.name for stage in stages if stage.taken],
        "notes": task.notes,
    }


def _spans(state: BatchState, stages: Iterable[StageRun]) -> list[tuple[float, float]]:
    tasks = [(task.started_at, task.ended_at) for task in state.tasks]
    known = [(begin, end) for begin, end in tasks if begin is not None and end is not None]
    return known + [(stage.begun_at, stage.finished_at) for stage in stages]


def timeline(clock: Clock, state: BatchState, stages: Stages) -> dict[str, Any] | None:
    """A line a task, the first to begin on top, with a mark where it ended without a result."""
    begun = sorted((of_task[0].begun_at, name) for name, of_task in stages.items() if of_task)
    ended = {task.name: task.ended_at for task in state.tasks if task.status in _LOST and task.started_at is not None}
    lines = []
    for _, name in begun:
        end = ended.get(name)
        lines.append((name, [*stages[name], *([] if end is None else [StageRun("lost", end, end)])]))
    return draw(lines, f"the stages of {len(lines)} tasks", clock)
