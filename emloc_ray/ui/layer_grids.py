"""Layers as tables of a report's page: a row a block, a column a kind of linear; experts in one where they are thousands."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from emloc_ray.ui.drawing import spectrum

_MOST_CELLS = 2000  # more layers than these are shown in groups
_MOST_SPECTRA = 1000
_ALIKE = 0.02  # shares of parameters that differ by less, by the rounding of ranks


@dataclass(frozen=True)
class Cell:
    """What a heat map says of a layer, or of ``count`` layers in one: the mean error, the ranks, the share kept where that is
    not alike everywhere."""

    error: float
    rank: str
    title: str
    kept: float | None = None
    spectrum: Markup | None = None
    ends: tuple[int, int] = (0, 0)  # the layer's rank, and the last that its spectrum knows of


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Each name alone; where they are more than :data:`_MOST_CELLS`, those that differ in an expert's number alone in one."""
    names = list(names)
    if len(names) <= _MOST_CELLS:
        return {name: [name] for name in names}
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\bexperts\.\d+\.", "experts.*.", name), []).append(name)
    return found


def heat_cells(
    layers: Mapping[str, dict[str, Any]], spectra: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, Cell]:
    """The cells of a heat map by the names of its layers; with spectra where these are not too many for a page."""
    few = len(layers) <= _MOST_SPECTRA
    shares = [layer["share"] for layer in layers.values() if "share" in layer]
    differ = bool(shares) and max(shares) - min(shares) > _ALIKE
    return {
        name: _cell(name, [layers[part] for part in parts], spectra.get(name, ()) if few else (), differ)
        for name, parts in _groups(layers).items()
    }


def _cell(name: str, layers: Sequence[dict[str, Any]], points: Sequence[tuple[int, float]], differ: bool) -> Cell:
    errors, ranks = [layer["relative_error"] for layer in layers], [layer["rank"] for layer in layers]
    shares = [layer["share"] for layer in layers if "share" in layer]
    kept = sum(shares) / len(shares) if shares else None
    if len(layers) == 1:
        solver = f", {layers[0]['solver']}" if "solver" in layers[0] else ""
        told = f"relative error {errors[0]:.6g}, rank {ranks[0]}"
        rank, kind = str(ranks[0]), solver
    else:
        told = f"{len(layers)} layers, relative errors of {min(errors):.3g} to {max(errors):.3g}"
        rank, kind = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}", ""
    title = f"{name}: {told}{'' if kept is None else f', {kept:.1%} of its parameters'}{kind}"
    drawn = spectrum(points, ranks[0]) if points else None
    ends = (ranks[0], points[-1][0]) if points else (0, 0)
    return Cell(sum(errors) / len(errors), rank, title, kept if differ else None, drawn, ends)


def shortfall_cells(modules: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The modules' shortfalls; those of modules in one are the root of their sum of squares."""
    return {
        name: {key: math.hypot(*(modules[part][key] for part in parts)) for key in ("before", "after")}
        for name, parts in _groups(modules).items()
    }


@dataclass(frozen=True)
class Grid:
    """Linears of one stack of blocks: a row a block, a column a kind; a cell is the layer's name, or None."""

    prefix: str
    kinds: list[str]
    rows: list[tuple[int | None, list[str | None]]]


def grids(names: Iterable[str]) -> list[Grid]:
    """Sorts layers such as ``model.layers.3.self_attn.q_proj`` into one grid a stack: the first integer is the block."""
    stacks: dict[str, dict[tuple[int | None, str], str]] = {}
    for name in names:
        parts = name.split(".")
        at = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            stacks.setdefault("", {})[None, name] = name
        else:
            stacks.setdefault(".".join(parts[:at]), {})[int(parts[at]), ".".join(parts[at + 1 :])] = name
    found = []
    for prefix, cells in stacks.items():
        kinds = list(dict.fromkeys(kind for _, kind in cells))
        blocks = sorted({block for block, _ in cells}, key=lambda block: -1 if block is None else block)
        rows = [(block, [cells.get((block, kind)) for kind in kinds]) for block in blocks]
        found.append(Grid(prefix, shortest_suffixes(kinds), rows))
    return found


def column_tops(grid: Grid, modules: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each module of a grid, the largest number that its column holds."""
    tops: dict[str, float] = {}
    for column in zip(*(names for _, names in grid.rows), strict=True):
        present = [name for name in column if name is not None]
        tops |= dict.fromkeys(present, max(max(modules[name].values()) for name in present))
    return tops


def shortest_suffixes(names: Sequence[str]) -> list[str]:
    """Every dotted name's shortest ending that no other one shares: ``q_proj`` for ``self_attn.q_proj``."""
    endings = {name: [".".join(name.split(".")[at:]) for at in range(name.count("."), -1, -1)] for name in names}
    counts = Counter(ending for options in endings.values() for ending in options)
    return [next((ending for ending in endings[name] if counts[ending] == 1), name) for name in names]
