"""Factorizing one group of linears: the files, the errors told, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_weights import stored_product
from layer_differences import layer_difference
from safetensors.torch import load_file, save_file
from stage_artifacts import Artifacts, gpt2_group
from transformers import AutoConfig

from emloc_ray.core.gram import Gram
from emloc_ray.core.ranks import Storage
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.checkpoint import Checkpoint, write_index
from emloc_ray.io.formats.grams import GramStore, StoredGram, write_gram_shard
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model
from emloc_ray.stages.factorize.factorize import factorize_group
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import Kept, copy_rest
from emloc_ray.stages.factorize.layer_reports import read_reports, spectra_file


def job_of(artifacts: Artifacts, model_dir: Path | None = None) -> FactorizationJob:
    return FactorizationJob(
        model_dir or artifacts.model_dir, artifacts.root / "unused", artifacts.groups, artifacts.ranks
    )


def gram_of(artifacts: Artifacts, group: Sequence[LinearSpec]) -> StoredGram:
    return GramStore(artifacts.calibration_dir).stored(group[0].name)


@pytest.mark.parametrize("large", [1000.0, 60000.0])
def test_factors_that_float16_cannot_hold_are_told(tmp_path: Path, large: float) -> None:
    """Of a weight that it can."""
    weight = torch.full((64, 32), 1.0, dtype=torch.float16)
    weight[:, 3] = large
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    group = (LinearSpec("layer", 64, 32, False, False, "block"),)
    job = FactorizationJob(tmp_path, tmp_path / "out", (group,), {"layer": 4})
    write_gram_shard(tmp_path / "grams.safetensors", {"layer": Gram(torch.eye(32, dtype=torch.float64), 100)})
    stored = StoredGram(tmp_path / "grams.safetensors", "layer")
    if large < 2000:
        factorize_group(job, group, stored, tmp_path / "factors.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "factors.safetensors").values())
        return
    with pytest.raises(NumericsError, match="The factors of layer overflow float16, in which the model is stored"):
        factorize_group(job, group, stored, tmp_path / "factors.safetensors")


def test_a_group_is_written_with_the_errors_that_it_reports(artifacts: Artifacts, tmp_path: Path) -> None:
    group = next(group for group in artifacts.groups if len(group) == 3)
    factors = tmp_path / "factors.safetensors"
    factorize_group(job_of(artifacts), group, gram_of(artifacts, group), factors)
    reports, spectra = read_reports(factors), load_file(spectra_file(factors))
    written = load_file(tmp_path / "factors.safetensors")
    assert set(written) == {f"{spec.name}.{part}.weight" for spec in group for part in ("up", "down")}
    original, grams = Checkpoint(artifacts.model_dir), GramStore(artifacts.calibration_dir)
    for spec, report in zip(group, reports, strict=True):
        up, down = written[f"{spec.name}.up.weight"], written[f"{spec.name}.down.weight"]
        rank = artifacts.ranks[spec.name]
        assert up.shape == (spec.out_features, rank)
        assert down.shape == (rank, spec.in_features)
        weight, gram = original.read(spec.weight_name).double(), grams.read(spec.name).double()
        delta = weight - up.double() @ down.double()
        error = float((torch.trace(delta @ gram @ delta.T) / torch.trace(weight @ gram @ weight.T)).sqrt())
        assert report.name == spec.name
        assert report.relative_error == pytest.approx(error, rel=1e-2)
        assert report.num_tokens == grams.num_tokens(spec.name)
        sampled = [
            (number, float(spectra[spec.name][number - 1]) / report.total_energy) for number, _ in report.spectrum
        ]
        assert sampled == [(number, pytest.approx(share, rel=0.01)) for number, share in report.spectrum]
        assert sampled[-1][0] == len(spectra[spec.name])
        # The spectrum tells the error of every rank, this one's among them.
        energy = spectra[spec.name].double()
        assert bool((energy[:-1] >= energy[1:] - 1e-6 * energy[0]).all())
        assert float((1 - energy[:rank].sum() / report.total_energy).clamp_min(0).sqrt()) == pytest.approx(
            error, rel=0.02
        )


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs", ["plain", "fewer tokens than ranks", "a channel 3,000 times the others"])
def test_the_residual_energy_is_that_of_what_is_stored(
    inputs: str, dtype: str, storage: Storage, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = tiny_model_dir("llama", dtype=dtype)
    group = tuple(block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))[:3])  # q, k and v
    x = torch.randn(10 if inputs.startswith("fewer") else 500, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 3000 if inputs.startswith("a channel") else 1
    name = group[0].name
    write_gram_shard(tmp_path / "grams.safetensors", {name: Gram(x.T @ x, len(x))})
    ranks = {spec.name: 12 for spec in group}
    job = FactorizationJob(model_dir, tmp_path, (group,), ranks, storage=storage)
    stored = StoredGram(tmp_path / "grams.safetensors", name)
    factorize_group(job, group, stored, tmp_path / "factors.safetensors")
    gram, written = stored.read().double(), load_file(tmp_path / "factors.safetensors")
    gram.diagonal().add_(job.dampening_frac * gram.diagonal().mean())
    for spec, report in zip(group, read_reports(tmp_path / "factors.safetensors"), strict=True):
        up, down = (written[f"{spec.name}.{part}.weight"].double() for part in ("up", "down"))
        product = stored_product(up, down, written.get(f"{spec.name}.order"))
        delta = Checkpoint(model_dir).read(spec.weight_name).double() - product
        assert report.residual_energy == pytest.approx(float((delta @ gram @ delta.T).trace()), rel=5e-3)


def test_factors_of_the_weights_are_their_truncated_svd_and_their_error_is_told_under_the_gram(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    group = next(group for group in artifacts.groups if len(group) == 3)
    job, gram = dataclasses.replace(job_of(artifacts), by_weights=True), gram_of(artifacts, group)
    factorize_group(job, group, gram, tmp_path / "model.safetensors")
    factorize_group(job_of(artifacts), group, gram, tmp_path / "activations" / "model.safetensors")
    reports, spectra = read_reports(tmp_path / "model.safetensors"), _spectra(tmp_path / "model.safetensors")
    written, original, g = load_file(tmp_path / "model.safetensors"), Checkpoint(artifacts.model_dir), gram.read()
    for spec, report, best in zip(
        group, reports, read_reports(tmp_path / "activations" / "model.safetensors"), strict=True
    ):
        rank, weight = artifacts.ranks[spec.name], original.read(spec.weight_name)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        product = written[f"{spec.name}.up.weight"] @ written[f"{spec.name}.down.weight"]
        torch.testing.assert_close(product, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(spectra[spec.name], s.square(), rtol=1e-3, atol=1e-6)
        assert report.weighed_error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-3)
        delta = weight - product
        error = float((torch.trace(delta @ g @ delta.T) / torch.trace(weight @ g @ weight.T)).sqrt())
        assert report.relative_error == pytest.approx(error, rel=1e-3)
        assert report.relative_error > best.relative_error


def _spectra(factors: Path) -> dict[str, torch.Tensor]:
    return load_file(spectra_file(factors))


def test_biases_and_transposed_weights_are_carried_over(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    job, group, gram = gpt2_group(tiny_model_dir("gpt2"), tmp_path)
    factorize_group(job, group, gram, tmp_path / "factors.safetensors")
    [report] = read_reports(tmp_path / "factors.safetensors")
    [spec] = group
    written = load_file(tmp_path / "factors.safetensors")
    original = Checkpoint(job.model_dir)
    assert torch.equal(written[f"{spec.name}.up.bias"], original.read(f"{spec.name}.bias"))
    product = written[f"{spec.name}.up.weight"] @ written[f"{spec.name}.down.weight"]
    weight = original.read(spec.weight_name).T
    assert product.shape == weight.shape
    assert float((weight - product).norm() / weight.norm()) == pytest.approx(report.relative_error, rel=1e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_pivoted_factors_are_the_same_weights(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], packed: bool
) -> None:
    job, [spec], gram = gpt2_group(tiny_model_dir("gpt2"), tmp_path)
    factorize_group(job, [spec], gram, tmp_path / "plain.safetensors")
    names = (spec.name,) if packed else ()
    pivoted = replace(job, storage="pivoted", in_4bit=names)
    factorize_group(pivoted, [spec], gram, tmp_path / "pivoted.safetensors")
    plain, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "pivoted"))
    assert torch.equal(found[f"{spec.name}.bias"], plain[f"{spec.name}.up.bias"])
    expected = plain[f"{spec.name}.up.weight"] @ plain[f"{spec.name}.down.weight"]
    write_index(tmp_path, dict.fromkeys(found, "pivoted.safetensors"), 0, 0)
    weight = Checkpoint(job.model_dir).read(spec.weight_name).T
    delta = layer_difference(spec, Checkpoint(job.model_dir), Checkpoint(tmp_path))
    assert delta is not None
    error = float((weight - delta - expected).norm() / expected.norm())
    assert error < (0.3 if packed else 1e-5)
    assert (error > 1e-3) == packed
    [report] = read_reports(tmp_path / "pivoted.safetensors")
    assert float(delta.norm() / weight.norm()) == pytest.approx(report.relative_error, rel=1e-2)
    if not packed:
        rows = spec.out_features - job.ranks[spec.name]
        assert found[f"{spec.name}.up.weight"].shape == (rows, job.ranks[spec.name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_names_its_layer(artifacts: Artifacts, tmp_path: Path, value: float) -> None:
    group = next(group for group in artifacts.groups if group[0].name.endswith("1.mlp.down_proj"))
    shutil.copytree(artifacts.model_dir, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(file)
        if group[0].weight_name in tensors:
            tensors[group[0].weight_name][3, 5] = value
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.down_proj"):
        factorize_group(
            job_of(artifacts, tmp_path / "model"), group, gram_of(artifacts, group), tmp_path / "factors.safetensors"
        )
    assert not (tmp_path / "factors.safetensors").exists()


def test_the_rest_is_copied_byte_for_byte(artifacts: Artifacts, tmp_path: Path) -> None:
    entries = [entry for entry in Checkpoint(artifacts.model_dir) if "norm" in entry.name or "embed" in entry.name]
    copy_rest([Kept(entry, (entry,)) for entry in entries], tmp_path / "rest.safetensors")
    written = load_file(tmp_path / "rest.safetensors")
    assert set(written) == {entry.name for entry in entries}
    assert all(torch.equal(written[entry.name], entry.read_rows()) for entry in entries)
