"""Measures what the README claims, each as a ratio in one run, and writes it as JSON and Markdown.

    python pipelines/benchmark.py all --out runs/benchmark
    python pipelines/benchmark.py factorization --out runs/benchmark

``factorization``  all linears of the quickstart's model under real Grams, against the published route
``layers``         single layers of 2048² and 4096² with known spectra, against the published route
``calibration``    forward passes with Grams, against the same passes without hooks and without the head
``memory``         peak of fine-tuning the emulator, against inference of the original: the quickstart's, and one of 1.1B
``planner``        every stage's planned memory, against what a process of its own held
``shapes``         the plan for the paper's models, beside the paper's peaks; writes ``shapes.md`` too
``merge``          merging, against a copy of the same files that hashes and fsyncs, and against its largest tensor
``quickstart``     the quickstart and the same run at ratio 1.0: wall time, peak memory, gain, gap closed
``data``           rows into token shards and batches at 10³ to 10⁶ rows: peaks of driver, worker, object store; speed
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from baselines import published_route
from data_path import data
from paper_shapes import write_shapes
from stage_memory import bare_prepared, made_directory, probe, probe_job, quickstart_cases, trained_cases
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import emloc_ray
from emloc_ray.config import RunConfig
from emloc_ray.core.factorization import factorize
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


def layers(out: Path) -> Figures:
    """Layers ``W`` with ``W G^½`` of a known spectrum at ratio 0.25; the error is against the exact optimum."""
    found: Figures = {}
    for order in (2048, 4096):
        for name, power in (("flat", 0.0), ("1/i", 1.0), ("1/i²", 2.0)):
            weight, gram, values = _layer(order, power)
            rank = rank_for_ratio(order, order, 0.25) or 1
            begin = time.perf_counter()
            result = factorize(weight, Whitening(gram, dampening_frac=1e-9), rank)
            ours = time.perf_counter() - begin
            begin = time.perf_counter()
            published_route(weight, gram, rank)
            baseline = time.perf_counter() - begin
            squares = values.square()
            optimum = math.sqrt(float(squares[rank:].sum() / squares.sum()))
            error = _error(weight, *result.factors, gram) / optimum - 1
            found[f"factorization, {order} × {order}, singular values {name}"] = figure(ours, baseline, "s", error)
    return found


def _layer(order: int, power: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``W``, ``G`` and the singular values ``i^-power`` of ``W G^½``; the eigenvalues of ``G`` span a factor of 100."""
    generator = torch.Generator().manual_seed(order)
    left, right, basis = (torch.linalg.qr(torch.randn(order, order, generator=generator)).Q for _ in range(3))
    values = torch.arange(1, order + 1, dtype=torch.float64) ** -power
    roots = torch.logspace(0, -1, order)
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
        for rows in (1, 4):
            size = ("--rows", str(rows), "--length", "512")
            ours, baseline = probe("finetune", emulator, *size), probe("inference", original, *size)
            found[f"peak of fine-tuning the emulator against inference, {name}, {rows} × 512 tokens"] = figure(
                ours["peak"] / 2**20, baseline["peak"] / 2**20, "MiB"
            )
    return found


def planner(out: Path) -> Figures:
    """What the plan says of every stage against what a process of its own held; the ratio is planned over measured."""
    _calibrated(out)
    config = emloc_ray.load_config(CONFIG, [f"run_dir={out / 'ratio-0.5'}", "finetune.max_steps=3"])
    emloc_ray.run(config, until="finetune")
    config = emloc_ray.load_config(CONFIG, [f"run_dir={out / 'ratio-0.5'}", "finetune.loss_on=all"])
    original, emulator = _large(out)
    values = {
        "run_dir": str(out / "unused"),
        "model": {"source": str(original)},
        "data": {"train": {"path": "-"}},
        "finetune": {"loss_on": "all"},
    }
    large = bare_prepared(values, AutoConfig.from_pretrained(original))
    scratch = made_directory(out / "planner")
    cases = [
        *quickstart_cases(config, Path(config.run_dir), scratch),
        *((f"{name}, 1.1B", *rest) for name, *rest in trained_cases(large, original, emulator, rows=1)),
    ]
    found: Figures = {}
    for name, function, arguments, parts in cases:
        measured = probe_job(function, arguments, scratch)
        planned = {"total above imports": (sum(parts.values()) - parts.get("base", 0), measured["peak"])}
        if "weights" in measured:
            planned["weights"] = (parts["weights"], measured["weights"])
        for what, (ours, baseline) in planned.items():
            ratio = ours / baseline
            line = figure(ours / 2**20, baseline / 2**20, "MiB (baseline: measured)", ratio - 1)
            found[f"plan, {name}, {what}"] = {**line, "ratio": ratio}
    return found


def shapes(out: Path) -> Figures:
    """The plan for the paper's models beside the paper's peaks, in GB; ``shapes.md`` has all of its lines."""
    found: Figures = {}
    for name, row in write_shapes(out).items():
        if row["paper_lora"] is not None:
            lora, emulator = row["lora_on_the_original"], row["five_billion"]["finetune"]
            found[f"plan, {name}: LoRA on the original"] = figure(lora, row["paper_lora"], "GB (baseline: the paper's)")
            found[f"plan, {name}: a 5B emulator"] = figure(emulator, row["paper_emloc"], "GB (baseline: the paper's)")
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
    found = {"merge throughput against a copy": {**figure(*rates, "MiB/s"), "ratio": rates[0] / rates[1]}}
    return {**found, **_merge_peaks(job, out)}


def _merge_peaks(job: MergeJob, out: Path) -> Figures:
    """Peak above imports against the largest tensor in its own dtype; the ratio is ours over that."""
    narrow = out / "merge-bfloat16"
    if not narrow.is_dir():
        load_model(job.model_dir, dtype="bfloat16").save_pretrained(narrow)
    found: Figures = {}
    for dtype, directory in (("float32", job.model_dir), ("bfloat16", narrow)):
        arguments = {"job": dataclasses.replace(job, model_dir=directory), "threads": 2}
        peak = probe_job("merge", arguments, out)["peak"]
        largest = max(entry.num_bytes for entry in Checkpoint(directory))
        line = figure(peak / 2**20, largest / 2**20, "MiB (baseline: the tensor)")
        found[f"merge peak against the largest tensor, {dtype}"] = {**line, "ratio": peak / largest}
    return found


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
    "planner": planner,
    "shapes": shapes,
    "merge": merge,
    "quickstart": quickstart,
    "data": data,
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
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS if "all" in arguments.which else arguments.which:
        write_results(arguments.out, BENCHMARKS[name](arguments.out))


if __name__ == "__main__":
    main()
