"""Sums of gradients, what ranks lose, and ranks as the stages' plain functions make them, and factors that keep predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slot_files import read_slot
from stage_artifacts import Artifacts

from emloc_ray.core.forms import Form
from emloc_ray.core.gram import Gram
from emloc_ray.core.ranks import factor_parameters
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore, StoredGram, reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.stages.calibrate.job import CalibrationJob, Labels
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.factorize.allocate import AllocationJob, allocate_ranks, group_losses
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.layer_reports import read_reports
from emloc_ray.stages.factorize.spend import read_ranks
from emloc_ray.stages.ray.tasks import Resources

DAMPING = 1e-2


def gradient_job(artifacts: Artifacts) -> CalibrationJob:
    names = tuple((spec.name,) for spec in artifacts.specs)
    return replace(artifacts.calibration_job, groups=names, gradients=Labels(seed=3))


@pytest.fixture(scope="module")
def gradients_dir(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sums of gradients of every linear over all token shards."""
    root = tmp_path_factory.mktemp("gradients")
    slot = ResidentSlot(gradient_job(artifacts), root / "slot.safetensors", 1)
    for number in range(4):
        slot.accumulate(number)
    slot.commit()
    names = [spec.name for spec in artifacts.specs]
    sums = reduce_slots([root / "slot.safetensors"], names)
    write_gram_shard(root / "sums.safetensors", sums)
    counts = {name: gram.num_tokens for name, gram in sums.items()}
    write_gram_index(root, [[name] for name in names], dict.fromkeys(names, "sums.safetensors"), counts)
    return root


def allocation_job(artifacts: Artifacts, gradients_dir: Path) -> AllocationJob:
    return AllocationJob(
        artifacts.model_dir,
        artifacts.calibration_dir,
        gradients_dir,
        artifacts.groups,
        artifacts.ranks,
        gradient_dampening_frac=DAMPING,
    )


def stored(directory: Path, names: list[str]) -> dict[str, StoredGram]:
    return {name: GramStore(directory).stored(name) for name in names}


def damped(matrix: torch.Tensor, share: float) -> torch.Tensor:
    matrix = matrix.double()
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def test_a_slot_of_gradients_goes_on_from_its_commit_to_the_same_bits(artifacts: Artifacts, tmp_path: Path) -> None:
    job = gradient_job(artifacts)
    calm = ResidentSlot(job, tmp_path / "calm", 1)
    for number in range(3):
        calm.accumulate(number)
    calm.commit()
    first = ResidentSlot(job, tmp_path / "killed", 1)
    first.accumulate(0)
    first.commit()
    first.accumulate(1)  # lost with the actor
    second = ResidentSlot(job, tmp_path / "killed", 1)
    assert second.position() == 0
    for number in (1, 2):
        second.accumulate(number)
    second.commit()
    (went_on, _), (expected, _) = read_slot(tmp_path / "killed"), read_slot(tmp_path / "calm")
    assert went_on.keys() == {spec.name for spec in artifacts.specs}
    grams, _ = read_slot(artifacts.root / "slot.safetensors")
    for name, gram in expected.items():
        assert torch.equal(went_on[name].matrix, gram.matrix)
        assert 0 < gram.num_tokens < max(other.num_tokens for other in grams.values())


def test_other_seeds_draw_other_labels(artifacts: Artifacts, tmp_path: Path) -> None:
    job = gradient_job(artifacts)
    found = []
    for seed in (0, 1):
        slot = ResidentSlot(replace(job, gradients=Labels(seed=seed)), tmp_path / str(seed), 1)
        slot.accumulate(0)
        found.append(slot.hooks.grams[artifacts.specs[0].name].matrix)
    assert not torch.equal(*found)


def test_what_is_lost_is_a_sum_of_eigenvalues_of_both_sums(artifacts: Artifacts, gradients_dir: Path) -> None:
    group = next(group for group in artifacts.groups if len(group) == 2)  # gate and up
    job = allocation_job(artifacts, gradients_dir)
    grams, sums = GramStore(artifacts.calibration_dir), GramStore(gradients_dir)
    found = group_losses(job, group, grams.stored(group[0].name), stored(gradients_dir, [spec.name for spec in group]))
    for spec in group:
        weight, gram = (
            Checkpoint(artifacts.model_dir).read(spec.weight_name).double(),
            damped(grams.read(spec.name), 1e-6),
        )
        matrix = weight @ gram @ weight.T @ damped(sums.read(spec.name), DAMPING)
        values = torch.linalg.eigvals(matrix).real.sort(descending=True).values[: min(weight.shape)]
        forms = job.forms(spec)
        after = torch.stack([values[f.rank :].sum() if f.rank else torch.zeros((), dtype=values.dtype) for f in forms])
        expected = after / (2 * grams.num_tokens(spec.name))
        assert forms[-1] == Form()
        torch.testing.assert_close(found[spec.name], expected, rtol=1e-3, atol=1e-5 * float(expected[0]))


def test_plain_factors_are_allocated_by_what_they_save(artifacts: Artifacts, gradients_dir: Path) -> None:
    group = artifacts.groups[0]
    job = allocation_job(artifacts, gradients_dir)
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    sums = stored(gradients_dir, [spec.name for spec in group])
    best, plain = (
        group_losses(job, group, gram, sums),
        group_losses(replace(job, plain_factors=True), group, gram, sums),
    )
    for name, values in best.items():
        # No factors of a rank lose less than those that are made for it.
        assert bool((plain[name] >= values * (1 - 1e-4)).all())
        assert float(plain[name][3]) > 1.001 * float(values[3])


def test_linears_of_which_the_data_says_nothing_lose_nothing(artifacts: Artifacts, tmp_path: Path) -> None:
    group = artifacts.groups[0]
    names = [spec.name for spec in group]
    zeros = {spec.name: Gram(torch.zeros(spec.out_features, spec.out_features), 0) for spec in group}
    write_gram_shard(tmp_path / "zeros", zeros)
    job = allocation_job(artifacts, tmp_path)
    gram = GramStore(artifacts.calibration_dir).stored(names[0])
    unseen = {name: StoredGram(tmp_path / "zeros", name) for name in names}
    none = dict.fromkeys(names, 0.0)
    assert {name: float(v.abs().sum()) for name, v in group_losses(job, group, gram, unseen).items()} == none
    write_gram_shard(tmp_path / "identity", {names[0]: Gram(torch.eye(group[0].in_features), 0)})
    nothing = StoredGram(tmp_path / "identity", names[0])
    assert {name: float(v.abs().sum()) for name, v in group_losses(job, group, nothing, {}).items()} == none


def write_losses(job: AllocationJob, directory: Path, silent: str) -> None:
    """What tasks leave, so that none is started; ``silent``: of which linear the data says nothing."""
    directory.mkdir()
    for number, group in enumerate(job.groups):
        gram = GramStore(job.calibration_dir).stored(group[0].name)
        found = group_losses(job, group, gram, stored(job.gradients_dir, [spec.name for spec in group]))
        found |= {silent: torch.zeros_like(found[silent])} if silent in found else {}
        write_tensors(directory / f"losses-{number + 1:05d}-of-{len(job.groups):05d}.safetensors", found)


def test_ranks_are_written_with_what_they_lose(artifacts: Artifacts, gradients_dir: Path, tmp_path: Path) -> None:
    job = allocation_job(artifacts, gradients_dir)
    silent, out_dir = artifacts.specs[3].name, tmp_path / "out"
    write_losses(job, out_dir, silent)
    result = allocate_ranks(job, out_dir, Resources())
    ranks = read_ranks(out_dir)
    assert list(ranks) == [spec.name for group in job.groups for spec in group]
    assert ranks[silent] == artifacts.ranks[silent]
    assert result["num_kept_even"] == 1
    used = sum(factor_parameters(s.out_features, s.in_features, ranks[s.name]) for s in artifacts.specs)
    assert result["budget"] - result["left"] == used
    assert 0 <= result["left"] < min(s.out_features + s.in_features for s in artifacts.specs)
    assert 0 < result["loss"] <= result["even_loss"]
    told = json.loads((out_dir / "ranks.json").read_text())["layers"]
    assert {name for name, layer in told.items() if layer["loss"] is None} == {silent}
    assert sum(layer["loss"] or 0 for layer in told.values()) == pytest.approx(result["loss"])
    alone = replace(job, never_dense=frozenset(ranks))
    write_losses(alone, tmp_path / "alone", silent)
    allocate_ranks(alone, tmp_path / "alone", Resources())
    assert None not in read_ranks(tmp_path / "alone").values()


def factorization_job(artifacts: Artifacts, gradients_dir: Path, **changes: Any) -> FactorizationJob:
    job = FactorizationJob(
        artifacts.model_dir, artifacts.root / "no", artifacts.groups, artifacts.ranks, gradients_dir=gradients_dir
    )
    return replace(job, gradient_dampening_frac=DAMPING, **changes)


def energies(artifacts: Artifacts, gradients_dir: Path, name: str, delta: torch.Tensor) -> tuple[float, float]:
    """``tr(Δ G Δᵀ)`` and ``tr(S Δ G Δᵀ)``."""
    gram = damped(GramStore(artifacts.calibration_dir).read(name), 1e-6)
    weighing = damped(GramStore(gradients_dir).read(name), DAMPING)
    change = delta @ gram @ delta.T
    return float(change.trace()), float((weighing @ change).trace())


def test_factors_keep_predictions_and_tell_both_errors(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path
) -> None:
    group = next(group for group in artifacts.groups if len(group) == 3)
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    factorize_group(factorization_job(artifacts, gradients_dir), group, gram, tmp_path / "both")
    factorize_group(
        replace(factorization_job(artifacts, gradients_dir), gradients_dir=None), group, gram, tmp_path / "one"
    )
    both, one = load_file(tmp_path / "both"), load_file(tmp_path / "one")
    for spec, report in zip(group, read_reports(tmp_path / "both"), strict=True):
        weight = Checkpoint(artifacts.model_dir).read(spec.weight_name).double()
        found = {}
        for key, held in (("both", both), ("one", one)):
            product = held[f"{spec.name}.up.weight"].double() @ held[f"{spec.name}.down.weight"].double()
            found[key] = energies(artifacts, gradients_dir, spec.name, weight - product)
        assert found["both"][1] < found["one"][1]
        assert found["both"][0] > found["one"][0]
        whole = energies(artifacts, gradients_dir, spec.name, weight)
        assert report.relative_error == pytest.approx((found["both"][0] / whole[0]) ** 0.5, rel=1e-3)
        assert report.weighed_error == pytest.approx((found["both"][1] / whole[1]) ** 0.5, rel=1e-3)
        assert report.total_energy == pytest.approx(whole[1], rel=1e-3)


def test_factors_in_4_bits_tell_the_error_of_what_is_stored(
    artifacts: Artifacts, gradients_dir: Path, tmp_path: Path
) -> None:
    group = artifacts.groups[0]
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    names = tuple(spec.name for spec in group)
    factorize_group(factorization_job(artifacts, gradients_dir), group, gram, tmp_path / "wide")
    factorize_group(factorization_job(artifacts, gradients_dir, in_4bit=names), group, gram, tmp_path / "packed")
    for wide, packed in zip(read_reports(tmp_path / "wide"), read_reports(tmp_path / "packed"), strict=True):
        assert wide.relative_error < packed.relative_error < 1.5 * wide.relative_error
        assert packed.weighed_error == wide.weighed_error


def test_gradients_that_are_no_numbers_name_their_layer(artifacts: Artifacts, tmp_path: Path) -> None:
    group = artifacts.groups[0]
    sums = {spec.name: Gram(torch.full((spec.out_features, spec.out_features), torch.nan), 4) for spec in group}
    write_gram_shard(tmp_path / "sums", sums)
    job = allocation_job(artifacts, tmp_path)
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    with pytest.raises(NumericsError, match=r"the gradients of what model\.layers\.0\.self_attn\.q_proj gives"):
        group_losses(job, group, gram, {name: StoredGram(tmp_path / "sums", name) for name in sums})
