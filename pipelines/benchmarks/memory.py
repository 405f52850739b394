"""Memory: fine-tuning against inference, the plan against measurement and the paper, merging against its largest tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import emloc_ray
from benchmarks.figures import (
    Figures,
    calibrated,
    emulated,
    figure,
    interleaved,
    paper_config,
    saved_whole,
    write_result,
)
from benchmarks.paper_shapes import write_shapes
from benchmarks.stage_memory import (
    Case,
    bare_prepared,
    made_directory,
    probe,
    probe_job,
    quickstart_cases,
    trained_cases,
)
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.emulator import emulator_class
from emloc_ray.modeling.emulator_type import EmulatorModelConfig
from emloc_ray.modeling.loading import load_model
from emloc_ray.planning.machine import cpu_capabilities, has_bfloat16
from emloc_ray.stages.merge.merge import MergeJob, merge_shard

# A random Llama of 1.1 B parameters.
LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
MODELS = ("the quickstart's model", "a random one of 1.1 B parameters")
BATCHES = (1, 4)  # rows


def memory(out: Path) -> Figures:
    """Each side in a process of its own: resident set above the imports on a CPU, the allocator's peak on a GPU.

    In the type that its files have; the random model's is bfloat16, where this machine computes in it.
    """
    _, run = calibrated(out)
    pairs = dict(zip(MODELS, ((run / "model", emulated(run, out)), _large(out)), strict=True))
    figures: Figures = {}
    table = []
    for name, (original, emulator) in pairs.items():
        peaks = {}
        for rows in BATCHES:
            size = ("--rows", str(rows), "--length", "512")
            ours, baseline = probe("finetune", emulator, *size), probe("inference", original, *size)
            both = peaks[str(rows)] = ours["peak"] / 2**20, baseline["peak"] / 2**20
            figures[f"peak of fine-tuning the emulator against inference, {name}, {rows} × 512 tokens"] = figure(
                *both, "MiB"
            )
        dtype = str(next(iter(Checkpoint(original))).dtype).removeprefix("torch.")
        table.append({"model": f"{name}, {dtype}", "mib": peaks})
    write_result(out / "memory.json", "peaks", "memory", rows=table)
    return figures


def planner(out: Path) -> Figures:
    """What the plan says of every stage against what a process of its own held; the ratio is planned over measured."""
    calibrated(out)
    config = paper_config(out / "ratio-0.5", "finetune.max_steps=3")
    emloc_ray.run(config, until="finetune", accept_changes=True)
    config = paper_config(out / "ratio-0.5", "finetune.loss_on=all")
    original, emulator = _large(out)
    values = {
        "run_dir": str(out / "unused"),
        "model": {"source": str(original)},
        "data": {"train": {"path": "-"}},
        "finetune": {"loss_on": "all"},
    }
    large = bare_prepared(values, AutoConfig.from_pretrained(original))
    scratch = made_directory(out / "planner")
    cases: list[Case] = [
        *quickstart_cases(config, Path(config.run_dir), scratch),
        *((f"{case[0]}, 1.1B", *case[1:]) for case in trained_cases(large, original, emulator, rows=1)),
    ]
    figures: Figures = {}
    for name, function, arguments, parts in cases:
        measured = probe_job(function, arguments)
        planned = {"total above imports": (sum(parts.values()) - parts.get("base", 0), measured["peak"])}
        if "weights" in measured:
            planned["weights"] = (parts["weights"], measured["weights"])
        for what, (ours, baseline) in planned.items():
            ratio = ours / baseline
            line = figure(ours / 2**20, baseline / 2**20, "MiB (baseline: measured)", ratio - 1)
            figures[f"plan, {name}, {what}"] = {**line, "ratio": ratio}
    return figures


def shapes(out: Path) -> Figures:
    """The plan for the paper's models beside the paper's peaks, in GB; ``shapes.md`` has all of its lines."""
    figures: Figures = {}
    for name, row in write_shapes(out).items():
        if row["paper_lora"] is not None:
            lora, emulator = row["lora_on_the_original"], row["five_billion"]["finetune"]
            figures[f"plan, {name}: LoRA on the original"] = figure(
                lora, row["paper_lora"], "GB (baseline: the paper's)"
            )
            figures[f"plan, {name}: a 5B emulator"] = figure(emulator, row["paper_emloc"], "GB (baseline: the paper's)")
    return figures


def _large(out: Path) -> tuple[Path, Path]:
    """The random model and an emulator of it at ratio 0.5, saved once."""
    native = torch.cuda.is_available() or has_bfloat16(cpu_capabilities())
    dtype = torch.bfloat16 if native else torch.float32
    config = LlamaConfig(**LARGE, vocab_size=32000, dtype=dtype)

    def save_original(directory: Path) -> None:
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)

    def save_emulator(directory: Path) -> None:
        linears = block_linears(empty_model(config))
        ranks = {s.name: rank_for_ratio(s.out_features, s.in_features, 0.5) or 1 for s in linears}
        wrapped = EmulatorModelConfig(config.to_dict(), ranks)
        emulator: Any = emulator_class(LlamaForCausalLM, wrapped)(config)
        emulator.to(dtype).save_pretrained(directory)

    return saved_whole(out / "large", save_original), saved_whole(out / "large-emulator", save_emulator)


def merge(out: Path) -> Figures:
    """One shard after the other in this process, against copies of the same bytes, hashed and fsynced."""
    _, run = calibrated(out)
    config = AutoConfig.from_pretrained(run / "model")
    specs = tuple(block_linears(empty_model(config)))
    adapter = out / "merge-adapter"
    model = attach_adapter(
        load_model(run / "model"),
        adapter_config(target_modules=[s.name for s in specs], r=8, lora_alpha=16, init_lora_weights=False),
    )
    model.save_pretrained(str(adapter))
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

    seconds = interleaved([ours, copy], repeats=3)
    rates = [size / 2**20 / s for s in seconds]
    peaks = {
        "merge throughput": {**figure(rates[0], rates[1], "MiB/s (baseline: a copy)"), "ratio": rates[0] / rates[1]}
    }
    return {**peaks, **_merge_peaks(job, out)}


def _merge_peaks(job: MergeJob, out: Path) -> Figures:
    """Peak above imports against the largest tensor in its own dtype; the ratio is ours over that."""
    narrow = saved_whole(out / "merge-bfloat16", load_model(job.model_dir, dtype="bfloat16").save_pretrained)
    figures: Figures = {}
    for dtype, directory in (("float32", job.model_dir), ("bfloat16", narrow)):
        arguments = {"job": dataclasses.replace(job, model_dir=directory), "threads": 2}
        peak = probe_job("merge", arguments)["peak"]
        largest = max(entry.num_bytes for entry in Checkpoint(directory))
        line = figure(peak / 2**20, largest / 2**20, "MiB (baseline: the tensor)")
        figures[f"merge peak against the largest tensor, {dtype}"] = {**line, "ratio": peak / largest}
    return figures
