"""Memory: fine-tuning against inference, and the plan against the paper; merging against a copy."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.figures import Figures, calibrated, emulated, figure, interleaved, saved_whole, write_result
from benchmarks.paper_shapes import write_shapes
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
from emloc_ray.stages.ray.session import LEAN_MEMORY

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
            ours, baseline = probe("finetune", emulator, rows, 512), probe("inference", original, rows, 512)
            both = peaks[str(rows)] = ours["peak"] / 2**20, baseline["peak"] / 2**20
            figures[f"peak of fine-tuning the emulator against inference, {name}, {rows} × 512 tokens"] = figure(
                *both, "MiB"
            )
        dtype = str(next(iter(Checkpoint(original))).dtype).removeprefix("torch.")
        table.append({"model": f"{name}, {dtype}", "mib": peaks})
    write_result(out / "memory.json", "peaks", "memory", rows=table)
    return figures


def probe(what: str, directory: Path, rows: int, length: int) -> dict[str, float]:
    """What ``memory_probe.py`` printed, run as workers under a memory_budget are."""
    size = ("--rows", str(rows), "--length", str(length))
    command = [sys.executable, str(Path(__file__).with_name("memory_probe.py")), what, str(directory), *size]
    output = subprocess.run(command, check=True, capture_output=True, env={**os.environ, **LEAN_MEMORY}).stdout
    return json.loads(output.splitlines()[-1])


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
    line = figure(rates[0], rates[1], "MiB/s (baseline: a copy)")
    return {"merge throughput": {**line, "ratio": rates[0] / rates[1]}}
