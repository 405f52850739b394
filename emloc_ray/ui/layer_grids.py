"""Layers as tables of a report: a row a block, a column a kind of linear; thousands of experts share cells."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from emloc_ray.ui.drawing import spectrum

_MOST_CELLS = 2000  # of a table: experts share cells where there are more layers
_MOST_SPECTRA = 1000
_ROUNDING = 0.02  # by which the shares of parameters may differ for the rounding of ranks alone


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map, of one layer or several: the mean error, the ranks (or the bits of weights that are none of factors),
    and the share of parameters kept, where layers differ in it."""

    error: float
    rank: str
    title: str
    kept: float | None = None
    spectrum: Markup | None = None
    last_direction: int = 0  # of the spectrum


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers of each cell: one each, or, above :data:`_MOST_CELLS` layers, those that differ by an expert's number alone."""
    names = list(names)
    cells: dict[str, list[str]] = {}
    for name in names:
        shared = re.sub(r"\bexperts\.\d+\.", "experts.*.", name) if len(names) > _MOST_CELLS else name
        cells.setdefault(shared, []).append(name)
    return cells


def heat_cells(
    layers: Mapping[str, dict[str, Any]], spectra: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, Cell]:
    """The cells of a heat map by the names of its layers; with spectra where a page has room for them all."""
    drawn = spectra if len(layers) <= _MOST_SPECTRA else {}
    shares = [layer["share"] for layer in layers.values() if "share" in layer]
    differ = bool(shares) and max(shares) - min(shares) > _ROUNDING
    return {
        name: _cell(name, [layers[part] for part in parts], drawn.get(name, ()), differ)
        for name, parts in _groups(layers).items()
    }


def _cell(name: str, layers: Sequence[dict[str, Any]], points: Sequence[tuple[int, float]], differ: bool) -> Cell:
    errors, ranks = [layer["relative_error"] for layer in layers], [layer["rank"] for layer in layers]
    shares = [layer["share"] for layer in layers if "share" in layer]
    kept = sum(shares) / len(shares) if shares else None
    stored = sorted({layer["form"] for layer in layers if "form" in layer})
    of_factors = [layer["rank"] for layer in layers if "form" not in layer]
    lowest, highest = min(of_factors, default=0), max(of_factors, default=0)
    span = [f"{lowest}" if lowest == highest else f"{lowest}–{highest}"] if of_factors else []
    rank = ", ".join([*span, *dict.fromkeys(form.removesuffix(" and factors") for form in stored)])
    if len(layers) == 1:
        facts = [f"relative error {errors[0]:.6g}, {stored[0] if stored else f'rank {rank}'}"]
    else:
        facts = [f"{len(layers)} layers, relative errors of {min(errors):.3g} to {max(errors):.3g}"]
    facts += [] if kept is None else [f"{kept:.1%} of its parameters"]
    facts += [layers[0]["solver"]] if len(layers) == 1 and "solver" in layers[0] and not stored else []
    return Cell(
        sum(errors) / len(errors),
        rank,
        f"{name}: {', '.join(facts)}",
        kept if differ else None,
        spectrum(points, ranks[0]) if points else None,
        points[-1][0] if points else 0,
    )


def total_shortfall(modules: Collection[dict[str, float]]) -> dict[str, float] | None:
    """The shortfall of several modules, before and after the correction: the root of their sum of squares; None of none."""
    return {key: math.hypot(*(m[key] for m in modules)) for key in ("before", "after")} if modules else None


def shortfall_cells(modules: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float] | None]:
    """The shortfalls of the modules, by cell."""
    return {name: total_shortfall([modules[part] for part in parts]) for name, parts in _groups(modules).items()}


@dataclass(frozen=True)
class Grid:
    """Linears of one stack of blocks: a row a block, a column a kind; a cell holds the layer's name, or None."""

    prefix: str
    kinds: list[str]
    rows: list[tuple[int | None, list[str | None]]]


def grids(names: Iterable[str]) -> list[Grid]:
    """Sorts layers such as ``model.layers.3.self_attn.q_proj`` into a grid a stack; the first integer is the block."""
    stacks: dict[str, dict[tuple[int | None, str], str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            stacks.setdefault("", {})[None, name] = name
        else:
            stacks.setdefault(".".join(parts[:at]), {})[int(parts[at]), ".".join(parts[at + 1 :])] = name
    return [_grid(prefix, cells) for prefix, cells in stacks.items()]


def _grid(prefix: str, cells: Mapping[tuple[int | None, str], str]) -> Grid:
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    blocks = sorted({block for block, _ in cells}, key=lambda block: -1 if block is None else block)
    rows = [(block, [cells.get((block, kind)) for kind in kinds]) for block in blocks]
    return Grid(prefix, shortest_suffixes(kinds), rows)


def column_tops(grid: Grid, modules: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest number in the column of each module of a grid."""
    tops: dict[str, float] = {}
    for column in zip(*(names for _, names in grid.rows), strict=True):
        present = [name for name in column if name is not None]
        tops |= dict.fromkeys(present, max(max(modules[name].values()) for name in present))
    return tops


def shortest_suffixes(names: Sequence[str]) -> list[str]:
    """The shortest ending of each dotted name that no other name has: ``q_proj`` for ``self_attn.q_proj``."""
    endings = {name: [".".join(name.split(".")[at:]) for at in range(name.count("."), -1, -1)] for name in names}
    counts = Counter(ending for options in endings.values() for ending in options)
    return [next((ending for ending in endings[name] if counts[ending] == 1), name) for name in names]
