"""Ranks and factors by what predictions make of them, against uniform ones that keep each layer's outputs."""

from __future__ import annotations

from pathlib import Path

import torch

import emloc_ray
from benchmarks.figures import Figures, figure, paper_config, write_result
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.scoring import score_rows
from emloc_ray.stages.ray.session import connection

RATIOS = (0.5, 0.25)
PLAIN = ("uniform", "activations", "factors")
WAYS = (
    ("sensitivity", "predictions", "pivoted"),
    ("sensitivity", "predictions", "factors"),
    ("uniform", "predictions", "pivoted"),
    ("uniform", "predictions", "factors"),
    ("sensitivity", "activations", "factors"),
)
_ROWS = 64


def allocation(out: Path) -> Figures:
    """Bare emulators of the quickstart's model on 64 held-out rows: how far their loss is above the original's.

    The losses themselves are in ``better_ranks.json``, as ``pipelines/results`` holds them for the README's table.
    """
    torch.set_num_threads(2)
    cache, figures = ArtifactCache(str(out / "cache")), {}
    with connection():
        plain = {ratio: _emulator(out, cache, ratio, *PLAIN) for ratio in RATIOS}
        original = _loss(plain[RATIOS[0]], "model")
        print(f"original: {original:.3f}", flush=True)
        baseline = {ratio: _loss(run, "emulator") for ratio, run in plain.items()}
        print(f"uniform ranks, activations: {baseline}", flush=True)
        losses = {PLAIN: baseline}
        for allocation, objective, storage in WAYS:
            of = losses[allocation, objective, storage] = {}
            for ratio in RATIOS:
                loss = _loss(_emulator(out, cache, ratio, allocation, objective, storage), "emulator")
                of[ratio] = loss
                print(f"ratio {ratio}, {allocation} ranks, {objective}, {storage}: {loss:.3f}", flush=True)
                what = f"loss above the original's at ratio {ratio}, {allocation} ranks, {storage} for {objective}"
                figures[what] = figure(loss - original, baseline[ratio] - original, "nats/token")
    rows = [
        {
            "ranks": ranks,
            "factors": keep if storage == "factors" else f"{keep}, {storage}",
            "losses": {str(ratio): round(loss, 3) for ratio, loss in by_ratio.items()},
        }
        for (ranks, keep, storage), by_ratio in losses.items()
    ]
    write_result(out / "better_ranks.json", "bare_emulators", "allocation", original=round(original, 3), rows=rows)
    return figures


def _emulator(out: Path, cache: ArtifactCache, ratio: float, allocation: str, objective: str, storage: str) -> Path:
    """A run up to its emulator; runs share tokens, Grams and sums of gradients."""
    run = out / f"allocation-{ratio}-{allocation}-{objective}-{storage}"
    settings = {"compression_ratio": ratio, "allocation": allocation, "objective": objective, "storage": storage}
    config = paper_config(run, *(f"emulator.{key}={value}" for key, value in settings.items()))
    emloc_ray.run(config, until="factorize", cache=cache, accept_changes=True)
    return run


def _loss(run: Path, model: str) -> float:
    """A model's loss on completions of the run's held-out rows, nats a token."""
    shards = TokenShards(run / "data" / "tokens" / "eval")
    rows = [shards.row(position) for position in range(min(_ROWS, len(shards)))]
    opened = load_model(run / model)
    score = score_rows(opened, rows, batch_size=8, loss_on="completion", pad_token_id=0, name=model)
    return score.metrics()["loss"]
