"""Small plots as SVG: they stretch to the width they get, and take the page's colours, light or dark.

Libraries do not fit: pygal's curve is a page of 44 KB with a script and its own colours, leather's colours are fixed, and
the hundreds of spectra of a heat map would be megabytes by either.
"""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

_FIXED = 'vector-effect="non-scaling-stroke"'
_DECADES = 8  # of energy that a spectrum's plot spans


def share(value: float, top: float) -> float:
    """``value / top``, cut to 0 and 1; 0 where it is not finite."""
    return min(max(value / top, 0.0), 1.0) if top > 0 and math.isfinite(value / top) else 0.0


def bar(value: float, top: float, mark: float | None = None, kind: str = "", goal: float | None = None) -> Markup:
    """A horizontal bar from zero; ``mark`` adds a dashed line to compare with, ``goal`` a bold one."""
    lines = "".join(
        f'<path class="{name}" d="M{100 * share(at, top):.2f} 0V10" {_FIXED}/>'
        for name, at in (("mark", mark), ("goal", goal))
        if at is not None
    )
    return Markup(
        f'<svg class="bar {Markup.escape(kind)}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="fill" y="1" width="{100 * share(value, top):.2f}" height="8"/>{lines}</svg>'
    )


def before_after(before: float, after: float, top: float) -> Markup:
    """Two thin bars, one above the other."""
    rects = "".join(
        f'<rect class="{name}" y="{y}" width="{100 * share(value, top):.2f}" height="4"/>'
        for name, y, value in (("before", 0, before), ("after", 5, after))
    )
    return Markup(f'<svg class="pair" viewBox="0 0 100 9" preserveAspectRatio="none" aria-hidden="true">{rects}</svg>')


def nice_ticks(low: float, high: float) -> list[float]:
    """Evenly spaced round numbers from below ``low`` to above ``high``; at most five steps."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def loss_curve(training: dict[str, Any]) -> dict[str, Any] | None:
    """The curve of a training's logged losses."""
    return curve([(float(entry["step"]), entry["loss"]) for entry in training.get("history", []) if "loss" in entry])


def validation_curve(training: dict[str, Any]) -> dict[str, Any] | None:
    """The losses of the emulator that was scored while it was trained, and pale those of the original."""
    history = (training.get("validation") or {}).get("history", [])
    on = {
        name: [(float(line["step"]), line[name]) for line in history if name in line]
        for name in ("loss", "original_loss")
    }
    return curve(on["loss"], "validation loss", "step", on["original_loss"])


def block_errors(refinement: dict[str, Any]) -> dict[str, Any] | None:
    """The curves of the blocks' errors before and after they were refined; None for a run whose blocks' are not known."""
    before, after = ([(float(k), pair[n]) for k, pair in enumerate(refinement.get("errors", []))] for n in (0, 1))
    return curve(after, "error", "block", before)


def curve(
    points: Sequence[tuple[float, float]],
    what: str = "training loss",
    at: str = "step",
    compared: Sequence[tuple[float, float]] = (),
) -> dict[str, Any] | None:
    """A line through the points, and the places of its labels in per cent of its height; None without finite points.
    ``compared``: points of the same places, for a pale line beside it."""
    points, compared = ([point for point in line if math.isfinite(point[1])] for line in (points, compared))
    if not points:
        return None
    all_y = [y for _, y in (*points, *compared)]
    ticks = nice_ticks(min(all_y), max(all_y))
    low, high, first, last = ticks[0], ticks[-1], points[0][0], points[-1][0]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    heights = [100 - 100 * (tick - low) / (high - low) for tick in ticks]

    def placed(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(100 * (x - first) / ((last - first) or 1), 100 - 100 * (y - low) / (high - low)) for x, y in line]

    lines = "".join(f'<path class="rule" d="M0 {y:.2f}H100" {_FIXED}/>' for y in heights)
    route, pale = ("L".join(f"{x:.2f} {y:.2f}" for x, y in placed(line)) for line in (points, compared))
    beside = f'<path class="compared" d="M{pale}" {_FIXED}/>' if compared else ""
    dots = "".join(
        f'<path class="dot" d="M{px:.2f} {py:.2f}h.01" {_FIXED}><title>{at} {x:g}: {y:.4f}</title></path>'
        for (px, py), (x, y) in zip(placed(points), points, strict=True)
    )
    svg = Markup(
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img"'
        f' aria-label="{what}, {points[0][1]:.3f} at {at} {first:g} to {points[-1][1]:.3f} at {at} {last:g}">'
        f'{lines}{beside}<path class="line" d="M{route}" {_FIXED}/>{dots if len(points) <= 80 else ""}</svg>'
    )
    labels = [(f"{tick:.{digits}f}", f"{y:.2f}") for tick, y in zip(ticks, heights, strict=True)]
    return {"svg": svg, "ticks": labels, "first": f"{at} {first:g}", "last": f"{at} {last:g}"}


def spectrum(points: Sequence[tuple[int, float]], rank: int) -> Markup:
    """A spectrum, both axes logarithmic: the share of the energy in each direction, with a dashed line at ``rank``, behind
    which the area is filled: what the rank loses."""
    width = math.log(max(points[-1][0], 2))

    def across(number: int) -> float:
        return 100 * min(math.log(max(number, 1)) / width, 1.0)

    def down(part: float) -> float:
        return 100 * min(max(0.0, -math.log10(part) / _DECADES), 1.0) if 0 < part < math.inf else 100.0

    route = "L".join(f"{across(number):.1f} {down(part):.1f}" for number, part in points)
    tail = [(rank, next(part for number, part in reversed(points) if number <= max(rank, points[0][0])))]
    tail += [(number, part) for number, part in points if number > rank]
    lost = "L".join(f"{across(number):.1f} {down(part):.1f}" for number, part in tail)
    label = (
        f"{points[0][1]:.1e} of the energy in the first of {points[-1][0]} directions, {points[-1][1]:.1e} in the last"
    )
    return Markup(
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'<path class="lost" d="M{across(rank):.1f} 100L{lost}V100Z"/>'
        f'<path class="mark" d="M{across(rank):.1f} 0V100"/><path class="line" d="M{route}"/></svg>'
    )
