"""What factorizing a group, or finding what its forms lose, takes of a device at its peak, beside what is planned."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_runs import tiny_run
from pretend_device import Meter

from emloc_ray.core.gram import Gram
from emloc_ray.io.formats.grams import GramStore, write_gram_index, write_gram_shard
from emloc_ray.planning import machine
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import StagePlan
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.context import Context
from emloc_ray.stages.factorize.allocate import group_losses
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.stage import allocation_job, factorization_job

pytestmark = pytest.mark.usefixtures("small_parts")

HIDDEN, INNER = 256, 896


@pytest.fixture
def prepared(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Prepared]:
    """A run on a GPU that is slow in float64, as the pretend device counts."""
    figures = {"compute_cap": ("8.9",), "memory.total": ("24000",)}
    monkeypatch.setattr(machine, "ask_gpus", lambda what: figures.get(what, ()))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1}

    def make(dtype: str, emulator: dict[str, Any]) -> Prepared:
        model_dir = tiny_model_dir("llama", dtype=dtype, **sizes)
        section = {"gpus_per_worker": 1, "rank_multiple": 8, **emulator}
        return tiny_run(tmp_path, model_dir, memory_budget=None, ray={"num_gpus": 1}, emulator=section)

    return make


def spread(features: int) -> Gram:
    """The Gram of 2,000 inputs whose sizes differ."""
    with torch.random.fork_rng():
        torch.manual_seed(features)
        inputs = torch.randn(2000, features) * torch.linspace(0.2, 3.0, features)
    return Gram(inputs.T @ inputs, 2000)


def write_grams(directory: Path, grams: dict[str, Gram]) -> GramStore:
    write_gram_shard(directory / "grams.safetensors", grams)
    counts = dict.fromkeys(grams, 2000)
    write_gram_index(directory, [[name] for name in grams], dict.fromkeys(grams, "grams.safetensors"), counts)
    return GramStore(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "emulator"),
    [
        ("bfloat16", {}),
        ("float32", {}),
        ("bfloat16", {"objective": "predictions"}),
        ("bfloat16", {"storage": "pivoted"}),
        ("bfloat16", {"objective": "weights"}),
        ("bfloat16", {"quantization": "nf4"}),
        ("bfloat16", {"quantization": "int2", "compression_ratio": 1.0}),
        ("bfloat16", {"quantization": "int2", "compression_ratio": 1.0, "residual_rank": 16}),
        ("float32", {"quantization": "int4"}),
        ("bfloat16", {"quantization": "int4", "objective": "predictions"}),
    ],
)
def test_the_widest_group_takes_at_its_peak_what_is_planned(
    dtype: str,
    emulator: dict[str, Any],
    prepared: Callable[..., Prepared],
    tmp_path: Path,
    device: torch.device,
    meter: Meter,
) -> None:
    run = prepared(dtype, emulator)
    planned = StagePlan("factorize", MemoryModel(run, Lengths(20.0, 20.0)).factorization_parts(), 0, 0.0, 1, 1, 1)
    context = Context(run, run.source.directory)
    job = factorization_job(context)
    group = max(job.groups, key=lambda group: group[0].in_features)  # by far the largest
    grams = write_grams(tmp_path / "grams", {group[0].name: spread(group[0].in_features)})
    if job.gradients_dir is not None:
        write_grams(job.gradients_dir, {spec.name: spread(spec.out_features) for spec in group})
    gc.collect()
    meter.restart()
    before = meter.current
    factorize_group(job, group, grams.stored(group[0].name), tmp_path / "made.safetensors", device)
    assert 0.6 * planned.gpu_bytes < meter.peak - before <= planned.gpu_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "emulator",
    [
        {"allocation": "sensitivity"},
        {"allocation": "sensitivity", "objective": "predictions"},
        {"budget": "2.4 bits"},
        {"budget": "2.4 bits", "objective": "activations"},
    ],
)
def test_finding_what_forms_lose_takes_no_more_than_is_planned(
    emulator: dict[str, Any], prepared: Callable[..., Prepared], tmp_path: Path, device: torch.device, meter: Meter
) -> None:
    run = prepared("bfloat16", emulator)
    planned = StagePlan("allocate", MemoryModel(run, Lengths(20.0, 20.0)).factorization_parts(), 0, 0.0, 1, 1, 1)
    job = allocation_job(Context(run, run.source.directory))
    group = max(job.groups, key=lambda group: group[0].in_features)
    grams = write_grams(tmp_path / "grams", {group[0].name: spread(group[0].in_features)})
    sums = write_grams(tmp_path / "gradients", {spec.name: spread(spec.out_features) for spec in group})
    gc.collect()
    meter.restart()
    before = meter.current
    of_each = {spec.name: sums.stored(spec.name) for spec in group}
    group_losses(job, group, grams.stored(group[0].name), of_each, device)
    assert 0.5 * planned.gpu_bytes < meter.peak - before <= planned.gpu_bytes
