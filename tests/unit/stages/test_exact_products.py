"""What workers compute of Grams, ranks, factors, corrections and merged weights is exact float32, though TF32 was allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from float32_products import Float32Products
from stage_artifacts import Artifacts
from tiny import save_emulator

from emloc_ray.core.correction import Candidate
from emloc_ray.core.gram import Gram
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore, StoredGram, write_gram_shard
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.factorize.allocate import AllocationJob, group_losses
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.merge.merge import MergeJob, merge_shard
from emloc_ray.stages.refine.refine import RefinementJob, refine_blocks


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def products() -> Iterator[Float32Products]:
    with Float32Products() as products:
        yield products
    assert set(products.precisions) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


def test_factors(artifacts: Artifacts, products: Float32Products, tmp_path: Path) -> None:
    job = FactorizationJob(artifacts.model_dir, tmp_path, artifacts.groups, artifacts.ranks)
    group = artifacts.groups[0]
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    factorize_group(job, group, gram, tmp_path / "factors.safetensors")


def test_spectra(artifacts: Artifacts, products: Float32Products, tmp_path: Path) -> None:
    job = AllocationJob(artifacts.model_dir, artifacts.calibration_dir, tmp_path, artifacts.groups, artifacts.ranks)
    group, file = artifacts.groups[0], tmp_path / "gradients.safetensors"
    made = {spec.name: torch.randn(64, spec.out_features, generator=torch.Generator().manual_seed(0)) for spec in group}
    write_gram_shard(file, {name: Gram(x.T @ x, 64) for name, x in made.items()})
    products.precisions.clear()  # of the sums that were just made
    sums = {spec.name: StoredGram(file, spec.name) for spec in group}
    group_losses(job, group, GramStore(artifacts.calibration_dir).stored(group[0].name), sums)


def test_refined_blocks(artifacts: Artifacts, products: Float32Products, tmp_path: Path) -> None:
    emulator = save_emulator(artifacts.model_dir, tmp_path / "emulator")
    paths = artifacts.model_dir, emulator, artifacts.tokens_dir, tmp_path / "work", tmp_path / "refined"
    refine_blocks(RefinementJob(*paths, steps=2, learning_rate=0.01))


def test_corrections(artifacts: Artifacts, products: Float32Products, tmp_path: Path) -> None:
    emulator = save_emulator(artifacts.model_dir, tmp_path / "emulator")
    correct_adapter(artifacts.correction(emulator, tmp_path, Candidate("covariance", None)))


def test_merged_weights(artifacts: Artifacts, products: Float32Products, tmp_path: Path) -> None:
    job = MergeJob(artifacts.model_dir, artifacts.adapter_dir, tmp_path, artifacts.specs)
    for shard in Checkpoint(artifacts.model_dir).shards:
        merge_shard(job, shard, tmp_path / shard.file.name)
