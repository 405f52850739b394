"""Measures what the README claims, each as a ratio in one run, and writes it as JSON and Markdown.

    python pipelines/benchmark.py all --out runs/benchmark
    python pipelines/benchmark.py factorization --out runs/benchmark

``factorization``  all linears of the quickstart's model under real Grams, against the published route
``calibration``    forward passes with Grams, against the same passes without hooks and without the head
``quickstart``     the quickstart and the same run at ratio 1.0: wall time, peak memory, gain, gap closed
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from baselines import published_route

import emloc_ray
from emloc_ray.config import RunConfig
from emloc_ray.core.factorization import factorize
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.core.whitening import Whitening
from emloc_ray.data.token_shards import TokenShards, collate, length_batches
from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.loading import load_model
from emloc_ray.results import gap_closed

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
Figures = dict[str, dict[str, Any]]


def figure(ours: float, baseline: float, unit: str, error: float | None = None) -> dict[str, Any]:
    """One line of the result; ``ratio`` is baseline over ours, so that more is better."""
    return {"ratio": baseline / ours, "ours": ours, "baseline": baseline, "unit": unit, "error": error}


def _calibrated(out: Path) -> tuple[RunConfig, Path]:
    """The quickstart run up to its Grams, made once."""
    config = emloc_ray.load_config(CONFIG, [f"run_dir={out / 'ratio-0.5'}"])
    emloc_ray.run(config, until="calibrate")
    return config, Path(config.run_dir)


def factorization(out: Path) -> Figures:
    """Both routes layer by layer, interleaved, with the same threads; errors relative to ``‖W G^½‖``."""
    _, run = _calibrated(out)
    return {f"factorization at ratio {ratio}": _factorize_all(run, ratio) for ratio in (0.5, 0.25)}


def _factorize_all(run: Path, ratio: float) -> dict[str, Any]:
    _, weights, gram = next(_groups(run))
    for weight in weights:  # the libraries' own first calls are nobody's
        published_route(weight, gram, factorize(weight, Whitening(gram), 1).factors.up.shape[1])
    ours = baseline = 0.0
    found: list[list[tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]] = []
    for names, weights, gram in _groups(run):
        begin = time.perf_counter()
        whitening = Whitening(gram)  # shared by the group, as in the stage
        mine = []
        for name, weight in zip(names, weights, strict=True):
            rank = rank_for_ratio(*weight.shape, ratio) or 1
            mine.append(factorize(weight, whitening, rank, name=name).factors)
        ours += time.perf_counter() - begin
        begin = time.perf_counter()
        theirs = [published_route(weight, gram, f.up.shape[1]) for weight, f in zip(weights, mine, strict=True)]
        baseline += time.perf_counter() - begin
        found.append(list(zip(mine, theirs, strict=True)))
    worst = 0.0
    for (_, weights, gram), pairs in zip(_groups(run), found, strict=True):
        for weight, (factors, published) in zip(weights, pairs, strict=True):
            worst = max(worst, _error(weight, *factors, gram) / _error(weight, *published, gram) - 1)
    return figure(ours, baseline, "s", worst)


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


def calibration(out: Path) -> Figures:
    """Passes with Gram hooks against the same headless passes without; the ratio is the cost, ours over baseline."""
    config, run = _calibrated(out)
    shards = TokenShards(run / "data" / "tokens" / "calibration")
    rows = [shards.row(position) for position in range(min(64, len(shards)))]
    batches = [collate(part, 0) for part in length_batches(rows, config.calibration.batch_size)]
    groups = list(GramStore(run / "calibration").index["groups"].values())

    plain = GramHooks(load_model(run / "model"), [])
    hooked = GramHooks(load_model(run / "model"), groups)

    def passes(hooks: GramHooks) -> Callable[[], None]:
        def forward() -> None:
            for batch in batches:
                hooks.forward(batch["input_ids"], batch["attention_mask"], batch["attention_mask"].bool())

        return forward

    seconds = _interleaved([passes(hooked), passes(plain)], repeats=5)
    result = figure(seconds[0], seconds[1], "s")
    return {"calibration cost over headless forward passes": {**result, "ratio": seconds[0] / seconds[1]}}


def _interleaved(actions: list[Callable[[], None]], repeats: int) -> list[float]:
    """The median seconds of each action, in turns, so that a busy moment of the machine hits all."""
    times: list[list[float]] = [[] for _ in actions]
    for action in actions:
        action()
    for _ in range(repeats):
        for action, found in zip(actions, times, strict=True):
            begin = time.perf_counter()
            action()
            found.append(time.perf_counter() - begin)
    return [sorted(found)[len(found) // 2] for found in times]


def quickstart(out: Path) -> Figures:
    """The quickstart from nothing, timed as a whole, and LoRA on the original at the same steps."""
    bound = emloc_ray.load_config(CONFIG, [f"run_dir={out / 'ratio-1.0'}", "emulator.compression_ratio=1.0"])
    upper = emloc_ray.run(bound)
    config = emloc_ray.load_config(CONFIG, [f"run_dir={out / 'quickstart'}", f"evaluation.upper_bound={bound.run_dir}"])
    begin = time.perf_counter()
    metrics = emloc_ray.run(config, fresh=True)
    wall = time.perf_counter() - begin
    losses = {name: values["loss"] for name, values in metrics["evaluation"].items()}
    peak = max(stage["peak_pss_bytes"] for stage in metrics["stages"].values()) / 2**30
    closed = gap_closed(metrics["evaluation"], Path(bound.run_dir))
    steps = metrics["stages"]["finetune"]["wall_s"], upper["stages"]["finetune"]["wall_s"]
    return {
        "quickstart wall time": figure(wall, 600, "s (baseline: the limit)"),
        "quickstart peak memory": figure(peak, 12, "GiB (baseline: the limit)"),
        "quickstart held-out loss": figure(losses["merged"], losses["original"], "nats/token"),
        **{
            f"gap closed, {name}": figure(closed[name], 1.0, "share (baseline: LoRA on the original)")
            for name in ("uncorrected", "corrected")
            if closed is not None
        },
        "fine-tuning stage against LoRA on the original": figure(*steps, "s"),
    }


BENCHMARKS = {"factorization": factorization, "calibration": calibration, "quickstart": quickstart}


def write_results(out: Path, figures: Figures) -> None:
    """``benchmark.json`` (flat: name to figures), merged into what earlier parts wrote, and ``benchmark.md``."""
    path = out / "benchmark.json"
    known: Figures = json.loads(path.read_text()) if path.is_file() else {}
    known.update(figures)
    path.write_text(json.dumps(known, indent=2) + "\n")
    lines = ["| what | ratio | ours | baseline | unit | error over baseline |", "| --- | --- | --- | --- | --- | --- |"]
    for name, f in known.items():
        error = "" if f["error"] is None else f"{f['error']:+.1e}"
        lines.append(f"| {name} | {f['ratio']:.2f} | {f['ours']:.4g} | {f['baseline']:.4g} | {f['unit']} | {error} |")
    (out / "benchmark.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Runs the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS if "all" in arguments.which else arguments.which:
        write_results(arguments.out, BENCHMARKS[name](arguments.out))


if __name__ == "__main__":
    main()
