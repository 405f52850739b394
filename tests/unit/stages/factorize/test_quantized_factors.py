"""Factors and dense linears written in 4 bits, and the correction that accounts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_differences import layer_difference
from safetensors.torch import load_file
from stage_artifacts import Artifacts, gpt2_group, write_lora
from tiny import save_quantized_emulator
from transformers import AutoConfig

from emloc_ray.core.correction import Candidate
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.nf4 import dequantize_nf4, quantize_nf4
from emloc_ray.modeling.stored_names import stored_parameters, stored_specs
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.job import CorrectionJob
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.layer_reports import read_reports, spectra_file


def job_of(artifacts: Artifacts, **changes: Any) -> FactorizationJob:
    names = tuple(spec.name for spec in artifacts.specs)
    job = FactorizationJob(artifacts.model_dir, artifacts.root / "no", artifacts.groups, artifacts.ranks, in_4bit=names)
    return replace(job, **changes)


def unpacked(file: Path, name: str) -> torch.Tensor:
    """A linear as a shard stores it, its factors multiplied, in float64."""
    held = load_file(file)
    parts = [f"{name}.up.", f"{name}.down."] if f"{name}.up.weight" in held else [f"{name}."]
    found = [dequantize_nf4({k.removeprefix(p): v for k, v in held.items() if k.startswith(p)}).double() for p in parts]
    return found[0] @ found[1] if len(found) == 2 else found[0]


def test_the_error_told_is_that_of_what_is_stored(artifacts: Artifacts, tmp_path: Path) -> None:
    # High ranks, so that 4 bits are what most of the error comes from; one of the group stays dense.
    group = next(group for group in artifacts.groups if len(group) == 3)
    ranks = {group[0].name: 30, group[2].name: 29}
    gram = GramStore(artifacts.calibration_dir).stored(group[0].name)
    factorize_group(job_of(artifacts, ranks=ranks), group, gram, tmp_path / "a.safetensors")
    factorize_group(job_of(artifacts, ranks=ranks, in_4bit=()), (group[0], group[2]), gram, tmp_path / "b.safetensors")
    exact = {report.name: report.relative_error for report in read_reports(tmp_path / "b.safetensors")}
    matrix = gram.read().double()
    for spec, report in zip(group, read_reports(tmp_path / "a.safetensors"), strict=True):
        weight = Checkpoint(artifacts.model_dir).read(spec.weight_name).double()
        delta = weight - unpacked(tmp_path / "a.safetensors", spec.name)
        error = float(((delta @ matrix @ delta.T).trace() / (weight @ matrix @ weight.T).trace()).sqrt())
        assert report.relative_error == pytest.approx(error, rel=1e-3)
        assert report.total_energy == pytest.approx(float((weight @ matrix @ weight.T).trace()), rel=1e-3)
        assert report.rank == ranks.get(spec.name, min(weight.shape))
        assert (report.solver == "dense") == (spec.name not in ranks)
        if spec.name in ranks:
            assert report.relative_error > 1.02 * exact[spec.name]
    # Spectra are of the weight: 4 bits change nothing in them.
    one, other = (load_file(spectra_file(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert one.keys() == other.keys() == ranks.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_a_gram_a_linear_is_only_put_into_4_bits(artifacts: Artifacts, tmp_path: Path) -> None:
    spec = artifacts.specs[-1]
    file = tmp_path / "a.safetensors"
    factorize_group(job_of(artifacts, ranks={}), (spec,), None, file)
    expected = quantize_nf4(Checkpoint(artifacts.model_dir).read(spec.weight_name), torch.float32)
    assert read_reports(file) == []
    assert {entry.name for entry in read_shard(file).entries} == {f"{spec.name}.{key}" for key in expected}
    assert torch.equal(unpacked(file, spec.name).float(), dequantize_nf4(expected))


def test_a_dense_conv1d_is_turned(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    job, group, gram = gpt2_group(tiny_model_dir("gpt2"), tmp_path)
    in_4bit = replace(job, ranks={}, in_4bit=(group[0].name,))
    factorize_group(in_4bit, group, gram, tmp_path / "a.safetensors")
    weight = Checkpoint(job.model_dir).read(group[0].weight_name).T
    found = unpacked(tmp_path / "a.safetensors", group[0].name).float()
    assert float((found - weight).norm() / weight.norm()) < 0.1
    assert not [entry for entry in read_shard(tmp_path / "a.safetensors").entries if entry.name.endswith("bias")]


def test_a_weight_that_is_no_number_is_refused_without_a_gram_too(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = type(Checkpoint(artifacts.model_dir).entry(artifacts.specs[-1].weight_name)).read_rows
    monkeypatch.setattr(
        "emloc_ray.io.formats.checkpoint.TensorEntry.read_rows", lambda self: read(self).fill_(torch.nan)
    )
    with pytest.raises(NumericsError, match=artifacts.specs[-1].name.replace(".", r"\.")):
        factorize_group(job_of(artifacts, ranks={}), artifacts.specs[-1:], None, tmp_path / "a.safetensors")


@pytest.mark.parametrize("ranks", ["dense", "high"])
def test_correction_takes_out_what_4_bits_changed(artifacts: Artifacts, tmp_path: Path, ranks: str) -> None:
    # At full rank, or dense, 4 bits are all that the emulator differs by.
    full = {spec.name: min(spec.out_features, spec.in_features) for spec in artifacts.specs}
    emulator_dir = save_quantized_emulator(artifacts.model_dir, tmp_path / "e", full if ranks == "high" else {})
    assert_corrected(artifacts.correction(emulator_dir, tmp_path, Candidate("projection", None), calibration_dir=None))


def test_experts_in_4_bits_are_corrected_as_any_linear(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("mixtral")
    model, checkpoint = empty_model(AutoConfig.from_pretrained(model_dir)), Checkpoint(model_dir)
    stored = stored_parameters(model, (entry.name for entry in checkpoint))
    specs = stored_specs(block_linears(model), stored, checkpoint)
    ranks = {spec.name: min(spec.out_features, spec.in_features) for spec in specs if not spec.name.endswith("1.down")}
    job = CorrectionJob(
        model_dir=model_dir,
        emulator_dir=save_quantized_emulator(model_dir, tmp_path / "e", ranks),
        calibration_dir=None,
        adapter_dir=write_lora(tmp_path / "a", specs),
        out_dir=tmp_path / "corrected",
        selection_dir=tmp_path,
        tokens_dir=tmp_path,
        specs=specs,
        candidates=(Candidate("projection", None),),
    )
    assert_corrected(job)


def assert_corrected(job: CorrectionJob) -> None:
    """On what the adapter reads, the original with it does what the emulator as stored did."""
    told = correct_adapter(job)["modules"]
    before, after = Adapter(job.adapter_dir), Adapter(job.out_dir)
    assert told.keys() == set(before.names)
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    specs = {spec.name: spec for spec in job.specs}
    for name in before.names:
        weight, delta = specs[name].read_weight(original), layer_difference(specs[name], original, emulator)
        assert delta is not None
        stored = unpacked(job.emulator_dir / "model.safetensors", name)
        torch.testing.assert_close(weight.double() - delta.double(), stored, rtol=1e-4, atol=1e-6)
        assert 0.05 < float(delta.norm() / weight.norm()) < 0.2
        trained, corrected = before.module(name), after.module(name)
        x = trained.lora_a.double().T
        served = weight.double() @ x + corrected.scale * corrected.lora_b.double() @ (corrected.lora_a.double() @ x)
        meant = stored @ x + trained.scale * trained.lora_b.double() @ (trained.lora_a.double() @ x)
        torch.testing.assert_close(served, meant, rtol=1e-4, atol=1e-5)
