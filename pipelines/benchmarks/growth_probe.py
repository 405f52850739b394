"""Calibrates and factorizes a random model in this process, and prints seconds and the peak of its memory as JSON.

    python pipelines/benchmarks/growth_probe.py DIR DEPTH ROWS

The peak is the resident set above what the imports took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.io.formats.grams import StoredGram, write_gram_shard
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob

THREADS = 2


def main(directory: Path, depth: int, num_rows: int) -> None:
    """Prints seconds and the peak resident set above the imports."""
    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    if not (directory / "config.json").is_file():
        LlamaForCausalLM(config).save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    rows = [Tokens(torch.randint(3, 1000, (128,), generator=generator).tolist(), [True] * 128) for _ in range(num_rows)]
    tokens = directory / f"tokens-{num_rows}"
    for number in range(num_rows // 32):
        write_shard(tokens / shard_name(number), rows[32 * number : 32 * (number + 1)])
    write_index(tokens, [32] * (num_rows // 32), {})
    baseline = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    model = empty_model(config)
    specs = {spec.name: spec for spec in block_linears(model)}
    names = tuple(tuple(group) for group in trace_inputs(model, list(specs.values())).groups)
    slot = ResidentSlot(
        CalibrationJob(directory, tokens, names, (0, num_rows // 32)), directory / "slot.safetensors", THREADS
    )
    for number in range(num_rows // 32):
        slot.accumulate(number)
    calibrate_seconds, calibrate_peak = time.perf_counter() - begin, peak() - baseline
    for group in names:
        grams = {group[0]: slot.hooks.grams[group[0]]}
        write_gram_shard(directory / "grams.safetensors", grams)
        ranks = {name: rank_for_ratio(specs[name].out_features, specs[name].in_features, 0.5) or 1 for name in group}
        work = tuple(specs[name] for name in group)
        job = FactorizationJob(directory, directory, (work,), ranks)
        gram = StoredGram(directory / "grams.safetensors", group[0])
        factorize_group(job, work, gram, directory / "factors.safetensors")
    seconds = time.perf_counter() - begin
    measured = {"seconds": seconds, "peak": peak() - baseline}
    print(json.dumps({**measured, "calibrate_seconds": calibrate_seconds, "calibrate_peak": calibrate_peak}))


def peak() -> int:
    """The most bytes that this process held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
