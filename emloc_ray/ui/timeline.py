"""When stages ran, as bars over time, for the pages of a run and of a batch; long pauses are cut out."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from emloc_ray.config.steps import STEP_NAMES
from emloc_ray.text import duration, visible

_MOST_LINES, _MOST_NAMED = 1000, 60
_NAMED_REM, _LINE_REM, _HEIGHT_REM = 1.25, 0.25, 60.0  # heights of a line with a name, of one without, of all of these
_LEAST_WIDTH = 0.15  # per cent: a narrower bar cannot be seen
_PAUSE_S, _PAUSE_SHARE = 60.0, 0.05  # longer pauses are cut out of the time that is shown
_STEPS = {"s": (1, 2, 5, 10, 20, 30), "min": (1, 2, 5, 10, 20, 30), "h": (1, 2, 3, 6, 12), "d": (1, 2, 5, 10, 30, 100)}
# ColorBrewer's "Paired" (colorbrewer2.org), its pale yellow darkened, and the pink of "Dark2": a colour for each step, which
# differ on light and on dark.
COLOURS = (
    "#1f78b4", "#a6cee3", "#33a02c", "#b2df8a", "#6a3d9a", "#cab2d6",
    "#ff7f00", "#e31a1c", "#fb9a99", "#fdbf6f", "#b15928", "#c9b93a",
    "#e7298a",
)  # fmt: skip
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class StageRun:
    """A bar: a finished stage, or ``lost`` where a task ended without a result; in seconds since 1970. ``taken``: from the
    cache, where another run had made it."""

    name: str
    begun_at: float
    finished_at: float
    taken: bool = False


Line = tuple[str, Sequence[StageRun]]
"""The name of a line, and its bars."""


@dataclass(frozen=True)
class Clock:
    """The time from ``begun_at`` on without its ``pauses``: ``seconds`` in all."""

    begun_at: float
    seconds: float
    pauses: tuple[tuple[float, float], ...] = ()

    def at(self, moment: float) -> float:
        """The clock's time at a moment (seconds since 1970)."""
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


def run_lines(manifest: Mapping[str, Any]) -> list[Line]:
    """A line a finished stage of a run, in the order in which they began."""
    return [(run.name, [run]) for run in sorted(stage_runs(manifest), key=lambda run: run.begun_at)]


def running_time(spans: Iterable[tuple[float, float]]) -> Clock | None:
    """The time in which anything ran, without long pauses: a run may go on days later. None without spans."""
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


def time_ticks(seconds: float) -> list[tuple[float, str]]:
    """Round times from 0 on, none above ``seconds``, each with its text; at most six steps, or steps of 100 d."""
    steps = [(unit, number) for unit, numbers in _STEPS.items() for number in numbers]
    unit, number = next((step for step in steps if seconds / (_SECONDS[step[0]] * step[1]) <= 6), steps[-1])
    count = int(seconds / (_SECONDS[unit] * number))
    return [(step * number * _SECONDS[unit], f"{step * number} {unit}") for step in range(count + 1)]


def draw(lines: Sequence[Line], what: str, clock: Clock | None = None) -> dict[str, Any] | None:
    """The lines as SVG that stretches, with ticks in per cent, and names where there is room. None without bars. ``what`` is
    said to screen readers: ``the stages of 3 tasks``. ``clock`` is that of all bars by default."""
    every = [bar for _, bars in lines for bar in bars]
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
    is_named = len(shown) <= _MOST_NAMED
    drawn = "".join(_draw_line(*line, number + 0.5, clock, scale, is_named) for number, line in enumerate(shown))
    kinds = {bar.name for bar in every}
    return {
        "svg": Markup(
            f'<svg viewBox="0 0 100 {len(shown)}" preserveAspectRatio="none" role="img"'
            f' aria-label="{Markup.escape(what)} over {duration(clock.seconds)}">{rules}{cuts}{drawn}</svg>'
        ),
        "ticks": ticks,
        "pauses": clock.pauses,
        "names": [visible(name) for name, _ in shown] if is_named else [],
        "num_lines": len(shown),
        "num_more": len(lines) - len(shown),
        "line_rem": f"{_NAMED_REM if is_named else min(_LINE_REM, _HEIGHT_REM / len(shown)):.4f}",
        "stages": [stage for stage in STEP_NAMES if stage in kinds],
        "lost": "lost" in kinds,
    }


def _draw_line(name: str, bars: Sequence[StageRun], y: float, clock: Clock, scale: float, with_times: bool) -> str:
    paths = ""
    for bar in bars:
        width = max((clock.at(bar.finished_at) - clock.at(bar.begun_at)) * scale, _LEAST_WIDTH)
        kind = bar.name if bar.name in (*STEP_NAMES, "lost") else "other"  # of another version
        took = f"{Markup.escape(visible(bar.name))}: {duration(bar.finished_at - bar.begun_at)}"
        title = f"<title>{took}</title>" if with_times else ""
        paths += f'<path class="{kind}" d="M{clock.at(bar.begun_at) * scale:.2f} {y}h{width:.2f}">{title}</path>'
    return f"<g><title>{Markup.escape(visible(name))}</title>{paths}</g>"
