"""Measures what the README claims, each as a ratio in one run, and writes it as JSON and Markdown.

    python pipelines/benchmark.py all --out runs/benchmark
    python pipelines/benchmark.py factorization --out runs/benchmark

``factorization``  all linears of the quickstart's model under real Grams, against the published route
``layers``         single layers of known spectra and real ones, against the published route; ``--layers`` picks some
``calibration``    forward passes with Grams, against the same passes without hooks and without the head
``memory``         peak of fine-tuning the emulator, against inference of the original: the quickstart's, and one of 1.1B
``merge``          merging, against a copy of the same files that hashes and fsyncs
``quickstart``     the quickstart and the same run at ratio 1.0: wall time, peak memory, gain, gap closed
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from baselines import published_route
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import emloc_ray
from emloc_ray.config import RunConfig
from emloc_ray.core.factorization import LowRankFactors, factorize
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.core.whitening import Whitening
from emloc_ray.data.token_shards import TokenShards, collate, length_batches
from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore
from emloc_ray.modeling.adapter import attach_adapter, lora_config
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.emulator import EmulatorModelConfig, emulator_class
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.loading import load_model
from emloc_ray.results import gap_closed
from emloc_ray.stages.merge import MergeJob, merge_shard

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
Figures = dict[str, dict[str, Any]]
LAYERS = ("2048x2048", "4096x4096", "14336x4096", "real")
SPECTRA = {"flat": 0.0, "1/i": 1.0, "1/i²": 2.0}
# Of the quickstart's model: a tall one and a wide one, in the middle.
REAL_LAYERS = (".15.mlp.up_proj", ".15.mlp.down_proj")


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


def layers(out: Path, chosen: Sequence[str] = LAYERS) -> Figures:
    """Single layers at ratio 0.25, each route timed in turns; the error is against the exact optimum.

    ``W G^½`` has the singular values ``1``, ``1/i`` or ``1/i²``; ``real`` are two layers of the quickstart's model. Where the
    published route takes a minute, it runs once for all spectra: its time does not depend on them.
    """
    torch.set_num_threads(2)
    warm = _layer(512, 512, 1.0)
    _race(*warm[:2], 64, repeats=1)  # the libraries' own first calls are nobody's
    found: Figures = {}
    for shape in chosen:
        if shape == "real":
            found.update(_real_layers(out))
            continue
        out_features, in_features = map(int, shape.split("x"))
        rank = rank_for_ratio(out_features, in_features, 0.25) or 1
        baseline = None
        for name, power in SPECTRA.items():
            weight, gram, values = _layer(out_features, in_features, power)
            repeats = 5 if max(weight.shape) <= 2048 else 3
            known = baseline if out_features != in_features else None
            ours, baseline, factors = _race(weight, gram, rank, repeats=repeats, damping=1e-9, baseline=known)
            squares = values.square()
            optimum = math.sqrt(float(squares[rank:].sum() / squares.sum()))
            error = _error(weight, *factors, gram) / optimum - 1
            what = f"factorization, {out_features} × {in_features}, singular values {name}"
            found[what] = figure(ours, baseline, "s", error)
            print(what, found[what], flush=True)
    return found


def _real_layers(out: Path) -> Figures:
    _, run = _calibrated(out)
    found: Figures = {}
    for names, weights, gram in _groups(run):
        for name, weight in zip(names, weights, strict=True):
            if not name.endswith(REAL_LAYERS):
                continue
            rank = rank_for_ratio(*weight.shape, 0.25) or 1
            ours, baseline, factors = _race(weight, gram, rank, repeats=9)
            best = published_route(weight.double(), gram.double(), rank)
            error = _error(weight, *factors, gram) / _error(weight, *best, gram) - 1
            what = f"factorization, {weight.shape[0]} × {weight.shape[1]}, {name}"
            found[what] = figure(ours, baseline, "s", error)
    return found


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


def memory(out: Path) -> Figures:
    """Each side in a process of its own: resident set above the imports on a CPU, the allocator's peak on a GPU."""
    _, run = _calibrated(out)
    pairs = {
        "the quickstart's model": (run / "model", _emulated(run, out / "ratio-0.5")),
        "1.1B, bfloat16": _large(out),
    }
    found: Figures = {}
    for name, (original, emulator) in pairs.items():
        ours, baseline = _probe("finetune", emulator), _probe("inference", original)
        found[f"peak of fine-tuning the emulator against inference, {name}"] = figure(
            ours / 2**20, baseline / 2**20, "MiB"
        )
    return found


def _emulated(run: Path, out: Path) -> Path:
    if not (run / "emulator" / "config.json").is_file():
        emloc_ray.run(emloc_ray.load_config(CONFIG, [f"run_dir={out}"]), until="factorize")
    return run / "emulator"


def _large(out: Path) -> tuple[Path, Path]:
    """A random Llama of 1.1B parameters and an emulator of it at ratio 0.5, saved once."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )
    original, emulator = out / "large", out / "large-emulator"
    if not (emulator / "config.json").is_file():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(original)
        ranks = {s.name: rank_for_ratio(s.out_features, s.in_features, 0.5) or 1 for s in block_linears(model)}
        del model
        wrapped = EmulatorModelConfig(config.to_dict(), ranks)
        small = emulator_class(LlamaForCausalLM, wrapped)(config).to(torch.bfloat16)
        small.save_pretrained(emulator)
    return original, emulator


def _probe(what: str, directory: Path) -> float:
    probe = Path(__file__).with_name("memory_probe.py")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}  # as workers under a memory_budget have it
    command = [sys.executable, str(probe), what, str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(json.loads(output.splitlines()[-1])["peak"])


def merge(out: Path) -> Figures:
    """One shard after the other in this process, against copies of the same bytes, hashed and fsynced."""
    _, run = _calibrated(out)
    config = AutoConfig.from_pretrained(run / "model")
    specs = tuple(block_linears(empty_model(config)))
    adapter = out / "merge-adapter"
    model = attach_adapter(
        load_model(run / "model"),
        lora_config(target_modules=[s.name for s in specs], r=8, lora_alpha=16, init_lora_weights=False),
    )
    model.save_pretrained(adapter)
    job = MergeJob(run / "model", adapter, out / "merge-merged", specs)
    shards = Checkpoint(run / "model").shards
    files = [shard.file for shard in shards]
    size = sum(file.stat().st_size for file in files)

    def ours() -> None:
        for shard in shards:
            merge_shard(job, shard, job.out_dir / shard.file.name)

    def copy() -> None:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as source, (out / "merge-copy").open("wb") as target:
                while chunk := source.read(2**25):
                    digest.update(chunk)
                    target.write(chunk)
                target.flush()
                os.fsync(target.fileno())

    seconds = _interleaved([ours, copy], repeats=3)
    rates = [size / 2**20 / s for s in seconds]
    return {"merge throughput against a copy": {**figure(*rates, "MiB/s"), "ratio": rates[0] / rates[1]}}


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


BENCHMARKS = {
    "factorization": factorization,
    "layers": layers,
    "calibration": calibration,
    "memory": memory,
    "merge": merge,
    "quickstart": quickstart,
}


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
    parser.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=LAYERS, help="which of them the part `layers` takes"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = {**BENCHMARKS, "layers": functools.partial(layers, chosen=arguments.layers)}
    for name in BENCHMARKS if "all" in arguments.which else arguments.which:
        write_results(arguments.out, parts[name](arguments.out))


if __name__ == "__main__":
    main()
