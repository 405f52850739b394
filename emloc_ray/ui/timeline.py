"""When stages ran and what workers did: lines of bars over the time in which anything ran, for the pages of a run and of
a batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from markupsafe import Markup

from emloc_ray.config.steps import STEPS
from emloc_ray.runs.log import RUN_EVENTS
from emloc_ray.stages.ray.spans import Span, joined
from emloc_ray.ui.page_text import visible
from emloc_ray.ui.terminal import duration

_MOST_LINES, _MOST_NAMED, _MOST_BARS = 1000, 60, 2000
_NAMED_REM, _LINE_REM, _HEIGHT_REM = 1.25, 0.25, 60.0  # of a line with a name and of one without; of those together
_LEAST_WIDTH = 0.15  # per cent: what is shorter would not be seen
_PAUSE_S, _PAUSE_SHARE = 60.0, 0.05  # a longer one, in which nothing ran, is no part of the time that is shown
_STEPS = {"s": (1, 2, 5, 10, 20, 30), "min": (1, 2, 5, 10, 20, 30), "h": (1, 2, 3, 6, 12), "d": (1, 2, 5, 10, 30, 100)}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class StageRun:
    """A finished stage, in seconds since 1970; ``taken`` from the cache, where another run had made it."""

    name: str
    begun_at: float
    finished_at: float
    taken: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar of a timeline: its kind, a step's name or another of the style's, its time, and what it says of itself."""

    kind: str
    begun_at: float
    finished_at: float
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a timeline."""

    name: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Clock:
    """The time from ``begun_at`` on without the ``pauses`` in it: ``seconds`` in all."""

    begun_at: float
    seconds: float
    pauses: tuple[tuple[float, float], ...] = ()

    def at(self, moment: float) -> float:
        """What it shows at a moment, which is given in seconds since 1970."""
        return moment - self.begun_at - sum(min(end, moment) - begin for begin, end in self.pauses if begin < moment)


def stage_runs(manifest: Mapping[str, Any]) -> tuple[StageRun, ...]:
    """When the finished stages of a manifest ran."""
    return tuple(
        StageRun(
            name,
            entry["finished_at"] - entry["result"].get("usage", {}).get("wall_s", 0.0),
            entry["finished_at"],
            bool(entry["result"].get("taken_from")),
        )
        for name, entry in manifest.get("stages", {}).items()
        if "finished_at" in entry
    )


@dataclass
class _Told:
    """What a log says of a stage since it was last begun after an end."""

    tries: list[tuple[float, float]] = field(default_factory=list)  # that came to no end
    work: list[Span] = field(default_factory=list)
    is_over: bool = False


def run_lines(manifest: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> list[Line]:
    """A line of a run's stages, then one a worker: what is finished, and what a killed or living run has come to."""
    done = {run.name: run for run in stage_runs(manifest)}
    told = _read_log(events, done)
    stages = [
        Bar(r.name, r.begun_at, r.finished_at, f"{r.name}: {duration(r.finished_at - r.begun_at)}")
        for r in done.values()
    ]
    stages += [
        Bar(f"{name} unfinished", begin, end, f"{name}, not finished: {duration(end - begin)}")
        for name, found in told.items()
        for begin, end in found.tries
    ]
    work = [span for name, found in told.items() if name in done or not found.is_over for span in found.work]
    if not stages and not work:
        return []
    return [Line("stages", sorted(stages, key=lambda bar: bar.begun_at)), *_worker_lines(work)]


def _read_log(events: Iterable[Mapping[str, Any]], done: Mapping[str, StageRun]) -> dict[str, _Told]:
    told: dict[str, _Told] = {}
    current: tuple[str, float] | None = None
    last = 0.0

    def leave(end: float) -> None:
        if current is not None:
            told[current[0]].tries.append((current[1], end))

    for event in events:
        with contextlib.suppress(TypeError, ValueError, KeyError):  # somebody else's hand was in it
            kind, moment = event["event"], datetime.fromisoformat(event["time"]).timestamp()
            name = str(event.get("stage", ""))
            if kind in RUN_EVENTS or kind == "started":
                leave(last if kind == RUN_EVENTS[0] else moment)  # a killed run's time ends with what it told last
                current = None
            if kind in ("started", "work") and told.setdefault(name, _Told()).is_over:
                told[name] = _Told()
            if kind == "started":
                current = (name, moment)
            elif kind == "work":
                told[name].work += [_span(name, *values) for values in event["spans"]]
            elif kind == "finished":
                current = None
                told.setdefault(name, _Told()).is_over = True
            last = moment
    leave(last)
    for name, found in told.items():  # recorded, and killed before the log heard of it
        if name in done and not found.is_over and found.tries and done[name].finished_at >= found.tries[-1][0]:
            found.tries.pop()
    return told


def _span(stage: str, worker: str, unit: str, begun_at: float, finished_at: float, count: int) -> Span:
    return Span(stage, str(worker), str(unit), float(begun_at), float(finished_at), int(count))


def _worker_lines(work: Sequence[Span]) -> list[Line]:
    """A line a worker, who began first on top; bars that lie close are one where there are very many."""
    whole = max((span.finished_at for span in work), default=0.0) - min((s.begun_at for s in work), default=0.0)
    pause, spans = whole / 2000, list(work)
    while len(spans) > _MOST_BARS and pause < whole:
        spans, pause = joined(work, pause), 4 * pause
    hosts = {end for _, on, end in (span.worker.partition(" on ") for span in work) if on}
    lines: dict[str, list[Bar]] = {}
    for span in sorted(spans, key=lambda span: span.begun_at):
        unit = span.unit if span.count == 1 else f"{span.count:,} pieces of work"
        title = f"{span.stage}, {unit}: {max(span.finished_at - span.begun_at, 0.0):.1f} s"
        lines.setdefault(span.worker, []).append(Bar(span.stage, span.begun_at, span.finished_at, title))
    alone = len(hosts) == 1
    return [Line(worker.partition(" on ")[0] if alone else worker, bars) for worker, bars in lines.items()]


def running_time(spans: Iterable[tuple[float, float]]) -> Clock | None:
    """The time in which anything ran, short pauses included: it may be gone on with days later. None without spans."""
    merged: list[list[float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    if not merged:
        return None
    longest = max(_PAUSE_S, _PAUSE_SHARE * sum(end - begin for begin, end in merged))
    gaps = [(before[1], after[0]) for before, after in itertools.pairwise(merged)]
    pauses = tuple((begin, end) for begin, end in gaps if end - begin > longest)
    seconds = merged[-1][1] - merged[0][0] - sum(end - begin for begin, end in pauses)
    return Clock(merged[0][0], seconds, pauses)


def time_ticks(seconds: float, most: int = 6) -> list[tuple[float, str]]:
    """Round times from 0 on, none above ``seconds``, each with its text; at most ``most`` steps of 100 d."""
    steps = [(unit, number) for unit, numbers in _STEPS.items() for number in numbers]
    unit, number = next((step for step in steps if seconds / (_SECONDS[step[0]] * step[1]) <= most), steps[-1])
    count = int(seconds / (_SECONDS[unit] * number))
    return [(step * number * _SECONDS[unit], f"{step * number} {unit}") for step in range(count + 1)]


def draw(lines: Sequence[Line], what: str, clock: Clock | None = None) -> dict[str, Any] | None:
    """The lines as SVG that stretches; its ticks in per cent; names where these find room. None without bars.

    ``what`` says what a number of lines are: ``the stages of 3 tasks``. ``clock`` is that of all bars by default.
    """
    every = [bar for line in lines for bar in line.bars]
    clock = clock or running_time((bar.begun_at, bar.finished_at) for bar in every)
    if clock is None or not every:
        return None
    shown = lines[:_MOST_LINES]
    scale = 100 / (clock.seconds or 1.0)
    ticks = [(f"{moment * scale:.2f}", text) for moment, text in time_ticks(clock.seconds)]
    rules = "".join(f'<path class="rule" d="M{x} 0V{len(shown)}"/>' for x, _ in ticks)
    cuts = "".join(
        f'<path class="pause" d="M{clock.at(begin) * scale:.2f} 0V{len(shown)}">'
        f"<title>nothing ran for {duration(end - begin)}</title></path>"
        for begin, end in clock.pauses
    )
    drawn = "".join(_draw_line(line, number, clock, scale) for number, line in enumerate(shown))
    kinds = {kind for bar in every for kind in bar.kind.split()}
    is_named = len(shown) <= _MOST_NAMED
    return {
        "svg": Markup(
            f'<svg viewBox="0 0 100 {len(shown)}" preserveAspectRatio="none" role="img"'
            f' aria-label="{Markup.escape(what)} over {duration(clock.seconds)}">{rules}{cuts}{drawn}</svg>'
        ),
        "ticks": ticks,
        "pauses": clock.pauses,
        "names": [visible(line.name) for line in shown] if is_named else [],
        "num_lines": len(shown),
        "num_more": len(lines) - len(shown),
        "line_rem": f"{_NAMED_REM if is_named else min(_LINE_REM, _HEIGHT_REM / len(shown)):.4f}",
        "stages": [stage for stage in STEPS if stage in kinds],
        "lost": "lost" in kinds,
        "unfinished": "unfinished" in kinds,
    }


def _draw_line(line: Line, number: int, clock: Clock, scale: float) -> str:
    y = number + 0.5
    paths = (
        f'<path class="{_kind(bar.kind)}" d="M{clock.at(bar.begun_at) * scale:.2f} {y}'
        f'h{max((clock.at(bar.finished_at) - clock.at(bar.begun_at)) * scale, _LEAST_WIDTH):.2f}"'
        + (f"><title>{Markup.escape(visible(bar.title))}</title></path>" if bar.title else "/>")
        for bar in line.bars
    )
    return f"<g><title>{Markup.escape(visible(line.name))}</title>{''.join(paths)}</g>"


def _kind(kind: str, known: Collection[str] = (*STEPS, "lost")) -> str:
    """Of the style's: what another version calls a stage is none."""
    name, _, rest = kind.partition(" ")
    return (name if name in known else "other") + (" unfinished" if rest == "unfinished" else "")
