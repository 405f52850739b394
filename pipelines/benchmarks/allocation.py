"""Ranks and factors by what predictions make of them, against uniform ones that keep each layer's outputs."""

from __future__ import annotations

from pathlib import Path

import torch

import emloc_ray
from benchmarks.figures import CONFIG, Figures, figure
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.artifact_cache import ArtifactCache
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.scoring import score_rows

RATIOS = (0.5, 0.25)
PLAIN = ("uniform", "activations")
WAYS = (
    ("spectral", "activations"),
    ("sensitivity", "activations"),
    ("uniform", "predictions"),
    ("sensitivity", "predictions"),
)


def allocation(out: Path) -> Figures:
    """Bare emulators of the quickstart's model on its held-out rows: how far their loss is above the original's."""
    torch.set_num_threads(2)
    cache, found = ArtifactCache(str(out / "cache")), {}
    for ratio in RATIOS:
        plain = _emulator(out, cache, ratio, *PLAIN)
        original = _loss(plain, plain / "model")
        baseline = _loss(plain, plain / "emulator")
        print(f"ratio {ratio}: original {original:.3f}, {' ranks, '.join(PLAIN)} {baseline:.3f}", flush=True)
        for way in WAYS:
            run = _emulator(out, cache, ratio, *way)
            loss = _loss(run, run / "emulator")
            print(f"ratio {ratio}: {' ranks, '.join(way)} {loss:.3f}", flush=True)
            what = f"loss above the original's at ratio {ratio}, {way[0]} ranks, factors for {way[1]}"
            found[what] = figure(loss - original, baseline - original, "nats/token")
    return found


def _emulator(out: Path, cache: ArtifactCache, ratio: float, allocation: str, objective: str) -> Path:
    """A run up to its emulator; runs share tokens, Grams and sums of gradients."""
    run = out / f"allocation-{ratio}-{allocation}-{objective}"
    settings = {"compression_ratio": ratio, "allocation": allocation, "objective": objective}
    overrides = [f"run_dir={run}", *(f"emulator.{key}={value}" for key, value in settings.items())]
    emloc_ray.run(emloc_ray.load_config(CONFIG, overrides), until="factorize", cache=cache)
    return run


def _loss(run: Path, model_dir: Path) -> float:
    """A model's loss on completions of the run's held-out rows, nats a token."""
    shards = TokenShards(run / "data" / "tokens" / "eval")
    rows = [shards.row(position) for position in range(len(shards))]
    model = load_model(model_dir)
    score = score_rows(model, rows, batch_size=8, loss_on="completion", pad_token_id=0, name=str(model_dir))
    return score.metrics()["loss"]
