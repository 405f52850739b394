"""report.html of a batch: how its tasks ended and when their stages ran, made from batch.json and their manifests alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from emloc_ray.batch.config import below
from emloc_ray.batch.state import BatchState, TaskState
from emloc_ray.batch.table import counts, standing
from emloc_ray.console import duration
from emloc_ray.errors import ArtifactError
from emloc_ray.io.atomic import atomic_file
from emloc_ray.io.run_directory import RunDirectory
from emloc_ray.report import render_page, visible
from emloc_ray.stages import STEPS

_TEMPLATE = "batch/report.html.j2"
_STAGES = STEPS
_LOST = ("failed", "late", "cancelled")
_MOST_ROWS, _MOST_LINES, _MOST_NAMED = 2000, 1000, 60
_MOST_REASON = 400  # letters of it: batch.json has it whole
_NAMED_REM, _LINE_REM, _HEIGHT_REM = 1.25, 0.25, 60.0  # of a line with a name and of one without; of those together
_LEAST_WIDTH = 0.15  # per cent: what is shorter would not be seen
_PAUSE_S, _PAUSE_SHARE = 60.0, 0.05  # a longer one, in which nothing ran, is no part of the time that is shown
_STEPS = {"s": (1, 2, 5, 10, 20, 30), "min": (1, 2, 5, 10, 20, 30), "h": (1, 2, 3, 6, 12), "d": (1, 2, 5, 10, 30, 100)}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_READERS = 8


@dataclass(frozen=True)
class StageRun:
    """A finished stage of a task, in seconds since 1970; ``taken`` from the cache, where another run had made it."""

    name: str
    begun_at: float
    finished_at: float
    taken: bool = False


Stages = Mapping[str, Sequence[StageRun]]  # of each task that has begun, by its name
Place = Callable[[float], float]  # of a moment, in per cent of a timeline


@dataclass(frozen=True)
class Clock:
    """The time from ``begun_at`` on without the ``pauses`` in it: ``seconds`` in all."""

    begun_at: float
    seconds: float
    pauses: tuple[tuple[float, float], ...] = ()

    def at(self, moment: float) -> float:
        """What it shows at a moment, which is given in seconds since 1970."""
        return moment - self.begun_at - sum(min(end, moment) - begin for begin, end in self.pauses if begin < moment)


def write_batch_report(run: RunDirectory, state: BatchState) -> Path:
    """Writes ``report.html`` into the batch's directory; what no task has reached yet is left out."""
    path = run.path("report.html")
    with atomic_file(path) as file:
        file.write(render_batch(run.name, state, read_stages(run, state)).encode(errors="replace"))
    return path


def read_stages(run: RunDirectory, state: BatchState) -> dict[str, tuple[StageRun, ...]]:
    """What the tasks' manifests say; tasks without one are left out."""

    def read(task: TaskState) -> tuple[StageRun, ...] | None:
        try:
            entries = RunDirectory(below(run.place, "tasks", task.name)).manifest()["stages"]
        except ArtifactError:
            return None
        return tuple(
            StageRun(
                name,
                entry["finished_at"] - entry["result"]["usage"]["wall_s"],
                entry["finished_at"],
                bool(entry["result"].get("taken_from")),
            )
            for name, entry in entries.items()
        )

    with ThreadPoolExecutor(_READERS) as pool:
        found = zip(state.tasks, pool.map(read, state.tasks), strict=True)
        return {task.name: stages for task, stages in found if stages is not None}


def render_batch(name: str, state: BatchState, stages: Stages) -> str:
    """The page's HTML."""
    return render_page(_TEMPLATE, batch_view(name, state, stages))


def batch_view(name: str, state: BatchState, stages: Stages) -> dict[str, Any]:
    """All that the template shows."""
    ordered = sorted(state.tasks, key=lambda task: task.status not in ("failed", "late"))
    rows = [_row(task, stages.get(task.name, ())) for task in ordered]
    gains = {row["name"]: row["gain"] for row in rows if row["gain"] is not None and math.isfinite(row["gain"])}
    every = [stage for found in stages.values() for stage in found]
    times = [task.ended_at for task in state.tasks if task.ended_at] + [stage.finished_at for stage in every]
    clock = running_time(_spans(state, every))
    return {
        "name": name,
        "updated": datetime.fromtimestamp(max(times), timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if times else None,
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
        "rows": rows[:_MOST_ROWS],
        "timeline": timeline(clock, state, stages) if clock and every else None,
    }


def _row(task: TaskState, stages: Sequence[StageRun]) -> dict[str, Any]:
    before, after = task.original_loss, task.corrected_loss
    reason = visible(task.reason or "")
    return {
        "name": visible(task.name),
        "href": f"tasks/{quote(task.name, safe='=', errors='replace')}/report.html" if stages else None,
        "status": task.status,
        "standing": visible(standing(task)),
        "reason": reason if len(reason) <= _MOST_REASON else f"{reason[:_MOST_REASON]} …",
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


def running_time(spans: Iterable[tuple[float, float]]) -> Clock | None:
    """The time in which anything ran, short pauses included: a batch may be gone on with days later. None without spans."""
    joined: list[list[float]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    if not joined:
        return None
    longest = max(_PAUSE_S, _PAUSE_SHARE * sum(end - begin for begin, end in joined))
    gaps = [(before[1], after[0]) for before, after in itertools.pairwise(joined)]
    pauses = tuple((begin, end) for begin, end in gaps if end - begin > longest)
    seconds = joined[-1][1] - joined[0][0] - sum(end - begin for begin, end in pauses)
    return Clock(joined[0][0], seconds, pauses)


def time_ticks(seconds: float, most: int = 6) -> list[tuple[float, str]]:
    """Round times from 0 on, none above ``seconds``, each with its text; at most ``most`` steps of 100 d."""
    steps = [(unit, number) for unit, numbers in _STEPS.items() for number in numbers]
    unit, number = next((step for step in steps if seconds / (_SECONDS[step[0]] * step[1]) <= most), steps[-1])
    count = int(seconds / (_SECONDS[unit] * number))
    return [(step * number * _SECONDS[unit], f"{step * number} {unit}") for step in range(count + 1)]


def timeline(clock: Clock, state: BatchState, stages: Stages) -> dict[str, Any]:
    """A line a task, who began first on top, as SVG that stretches; its ticks in per cent; names where these find room."""
    begun = sorted((found[0].begun_at, name) for name, found in stages.items() if found)
    ended = {task.name: task.ended_at for task in state.tasks if task.status in _LOST and task.started_at is not None}
    names = [name for _, name in begun][:_MOST_LINES]
    scale = 100 / (clock.seconds or 1.0)

    def place(moment: float) -> float:
        return clock.at(moment) * scale

    ticks = [(f"{moment * scale:.2f}", text) for moment, text in time_ticks(clock.seconds)]
    rules = "".join(f'<path class="rule" d="M{x} 0V{len(names)}"/>' for x, _ in ticks)
    cuts = "".join(
        f'<path class="pause" d="M{place(begin):.2f} 0V{len(names)}"><title>nothing ran for {duration(end - begin)}</title>'
        "</path>"
        for begin, end in clock.pauses
    )
    lines = "".join(_line(name, number, stages[name], ended.get(name), place) for number, name in enumerate(names))
    label = f"the stages of {len(names)} tasks over {duration(clock.seconds)}"
    svg = (
        f'<svg viewBox="0 0 100 {len(names)}" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{rules}{cuts}{lines}</svg>"
    )
    found = {stage.name for name in names for stage in stages[name]}
    is_named = len(names) <= _MOST_NAMED
    return {
        "svg": Markup(svg),
        "ticks": ticks,
        "names": [visible(name) for name in names] if is_named else [],
        "num_lines": len(names),
        "num_more": len(begun) - len(names),
        "line_rem": f"{_NAMED_REM if is_named else min(_LINE_REM, _HEIGHT_REM / len(names)):.4f}",
        "stages": [stage for stage in _STAGES if stage in found],
        "lost": any(name in ended for name in names),
    }


def _line(name: str, number: int, stages: Sequence[StageRun], ended_at: float | None, place: Place) -> str:
    """One task's stages; a mark where it ended without a result."""
    y = number + 0.5
    spans = [(stage.name if stage.name in _STAGES else "other", stage.begun_at, stage.finished_at) for stage in stages]
    if ended_at is not None:
        spans.append(("lost", ended_at, ended_at))
    paths = (
        f'<path class="{kind}" d="M{place(begin):.2f} {y}h{max(place(end) - place(begin), _LEAST_WIDTH):.2f}"/>'
        for kind, begin, end in spans
    )
    return f"<g><title>{Markup.escape(visible(name))}</title>{''.join(paths)}</g>"
