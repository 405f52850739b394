"""Factorization against the published route: all linears of the quickstart's model, and single layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines import published_route
from benchmarks.figures import Figures, calibrated, figure
from emloc_ray.core.factorization import LowRankFactors, factorize
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore

_PUBLISHED = "s (baseline: the published route)"
SPECTRA = {"flat": 0.0, "1/i": 1.0, "1/i²": 2.0}
# Of the quickstart's model: a tall one and a wide one, in the middle.
REAL_LAYERS = (".15.mlp.up_proj", ".15.mlp.down_proj")


def factorization(out: Path) -> Figures:
    """Both routes layer by layer, interleaved, with the same threads; errors relative to ``‖W G^½‖``."""
    _, run = calibrated(out)
    return {f"factorizing all linears at ratio {ratio}": _factorize_all(run, ratio) for ratio in (0.5, 0.25)}


def _factorize_all(run: Path, ratio: float) -> dict[str, Any]:
    _, weights, gram = next(_groups(run))
    for weight in weights:  # the libraries' first calls are not counted
        published_route(weight, gram, factorize(weight, Whitening(gram), 1).factors.up.shape[1])
    ours = baseline = 0.0
    groups: list[list[tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]] = []
    for names, weights, gram in _groups(run):
        begin = time.perf_counter()
        whitening = Whitening(gram)  # shared by the group, as in the stage
        mine = []
        for name, weight in zip(names, weights, strict=True):
            rank = rank_for_ratio(weight.shape[0], weight.shape[1], ratio) or 1
            mine.append(factorize(weight, whitening, rank, name=name).factors)
        ours += time.perf_counter() - begin
        begin = time.perf_counter()
        theirs = [published_route(weight, gram, f.up.shape[1]) for weight, f in zip(weights, mine, strict=True)]
        baseline += time.perf_counter() - begin
        groups.append(list(zip(mine, theirs, strict=True)))
    worst = 0.0
    for (_, weights, gram), pairs in zip(_groups(run), groups, strict=True):
        for weight, (factors, published) in zip(weights, pairs, strict=True):
            worst = max(worst, _error(weight, *factors, gram) / _error(weight, *published, gram) - 1)
    return figure(ours, baseline, _PUBLISHED, worst)


def _groups(run: Path) -> Iterator[tuple[list[str], list[torch.Tensor], torch.Tensor]]:
    checkpoint, grams = Checkpoint(run / "model"), GramStore(run / "calibration")
    for names in grams.index["groups"].values():
        # Cloned, so that the file is read here and not while either route is timed.
        yield names, [checkpoint.read(f"{name}.weight").clone() for name in names], grams.read(names[0])


def _error(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, gram: torch.Tensor) -> float:
    gram = gram.double()
    rest = weight.double() - up.double() @ down.double()
    whole = weight.double()
    return math.sqrt(float(((rest @ gram) * rest).sum() / ((whole @ gram) * whole).sum()))


def layers(out: Path, chosen: Sequence[str]) -> Figures:
    """Single layers at ratio 0.25, each route timed in turns; the error is against the exact optimum.

    ``W G^½`` has the singular values ``1``, ``1/i`` or ``1/i²``; ``real`` are two layers of the quickstart's model. Where the
    published route takes a minute, it runs once for all spectra: its time does not depend on them.
    """
    torch.set_num_threads(2)
    warm = _layer(512, 512, 1.0)
    _race(*warm[:2], 64, repeats=1)  # the libraries' first calls are not counted
    figures: Figures = {}
    for shape in chosen:
        if shape == "real":
            figures.update(_real_layers(out))
            continue
        out_features, in_features = map(int, shape.split("x"))
        rank = rank_for_ratio(out_features, in_features, 0.25) or 1
        baseline: float | None = None
        for name, power in SPECTRA.items():
            weight, gram, values = _layer(out_features, in_features, power)
            repeats = 5 if max(weight.shape) <= 2048 else 3
            known = baseline if out_features != in_features else None
            ours, baseline, factors = _race(weight, gram, rank, repeats=repeats, damping=1e-9, baseline=known)
            squares = values.square()
            optimum = math.sqrt(float(squares[rank:].sum() / squares.sum()))
            error = _error(weight, *factors, gram) / optimum - 1
            what = f"one linear, {out_features} × {in_features}, singular values {name}"
            figures[what] = figure(ours, baseline, _PUBLISHED, error)
            print(what, figures[what], flush=True)
    return figures


def _real_layers(out: Path) -> Figures:
    _, run = calibrated(out)
    figures: Figures = {}
    for names, weights, gram in _groups(run):
        for name, weight in zip(names, weights, strict=True):
            if not name.endswith(REAL_LAYERS):
                continue
            rank = rank_for_ratio(weight.shape[0], weight.shape[1], 0.25) or 1
            ours, baseline, factors = _race(weight, gram, rank, repeats=9)
            best = published_route(weight.double(), gram.double(), rank)
            error = _error(weight, *factors, gram) / _error(weight, *best, gram) - 1
            what = f"one linear, {weight.shape[0]} × {weight.shape[1]}, {name}"
            figures[what] = figure(ours, baseline, _PUBLISHED, error)
    return figures


def _race(
    weight: torch.Tensor,
    gram: torch.Tensor,
    rank: int,
    *,
    repeats: int,
    damping: float = 1e-6,
    baseline: float | None = None,
) -> tuple[float, float, LowRankFactors]:
    """The median seconds of ours, those of the published route unless they are known, and our factors."""
    made: list[LowRankFactors] = []

    def ours() -> None:
        made[:] = [factorize(weight, Whitening(gram, damping), rank).factors]

    def published() -> None:
        published_route(weight, gram, rank)

    times: dict[Callable[[], None], list[float]] = {ours: [], published: [] if baseline is None else [baseline]}
    slow = weight.numel() > 2**22
    for turn in range(repeats):
        for route, seconds in times.items():
            if route is ours or (not slow and turn < 3) or not seconds:
                begin = time.perf_counter()
                route()
                seconds.append(time.perf_counter() - begin)
    return sorted(times[ours])[repeats // 2], sorted(times[published])[len(times[published]) // 2], made[0]


def _layer(out_features: int, in_features: int, power: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``W``, ``G`` and the singular values ``i^-power`` of ``W G^½``; the eigenvalues of ``G`` span a factor of 100."""
    generator = torch.Generator().manual_seed(in_features)
    order = min(out_features, in_features)
    left, right, basis = (
        torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
        for n, k in ((out_features, order), (in_features, order), (in_features, in_features))
    )
    values = torch.arange(1, order + 1, dtype=torch.float64) ** -power
    roots = torch.logspace(0, -1, in_features)
    weight = (left * values.float()) @ right.T @ ((basis / roots) @ basis.T)
    return weight, (basis * roots.square()) @ basis.T, values
