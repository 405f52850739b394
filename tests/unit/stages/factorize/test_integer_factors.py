"""Linears written in integers by the factorization, and the difference that the correction takes from what is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layer_differences import layer_difference
from safetensors.torch import load_file
from stage_artifacts import Artifacts
from transformers import AutoConfig

from emloc_ray.core.gram import Gram
from emloc_ray.core.integer_forms import IntegerForms, integer_bytes
from emloc_ray.core.ranks import Storage
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard, write_index
from emloc_ray.io.formats.grams import GramStore, write_gram_index, write_gram_shard
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.loading import load_model
from emloc_ray.stages.factorize.factorize import factorize_group, finish_emulator
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.factorize.layer_reports import read_reports


def job_of(artifacts: Artifacts, integers: IntegerForms, ranks: dict[str, int]) -> FactorizationJob:
    return FactorizationJob(artifacts.model_dir, artifacts.root / "no", artifacts.groups, ranks, integers=integers)


def difference(artifacts: Artifacts, shard: Path, name: str) -> torch.Tensor:
    """``Δ`` as the correction reads it."""
    write_index(shard.parent, {entry.name: shard.name for entry in read_shard(shard).entries}, 0, 0)
    spec = next(spec for spec in artifacts.specs if spec.name == name)
    found = layer_difference(spec, Checkpoint(artifacts.model_dir), Checkpoint(shard.parent))
    assert found is not None
    return found.double()


def test_the_error_told_is_that_of_what_the_correction_reads(artifacts: Artifacts, tmp_path: Path) -> None:
    group = next(group for group in artifacts.groups if len(group) == 3)
    plain, beside, factors = (spec.name for spec in group)
    forms = IntegerForms({spec.name: 3 for spec in group}, {beside: 4}, 16)
    gram = GramStore(artifacts.calibration_dir).stored(plain)
    shard = tmp_path / "model-00001-of-00001.safetensors"
    factorize_group(job_of(artifacts, forms, {factors: 9}), group, gram, shard)
    matrix, errors = gram.read().double(), {}
    for spec, report in zip(group, read_reports(shard), strict=True):
        weight = Checkpoint(artifacts.model_dir).read(spec.weight_name).double()
        delta = difference(artifacts, shard, spec.name)
        error = float(((delta @ matrix @ delta.T).trace() / (weight @ matrix @ weight.T).trace()).sqrt())
        assert report.relative_error == pytest.approx(error, rel=1e-3)
        assert report.solver == ("exact" if spec.name == factors else "dense")
        errors[spec.name] = error
    assert errors[beside] < errors[plain] < 0.3
    held = {name: tensor.nbytes for name, tensor in load_file(shard).items() if name.startswith(f"{plain}.")}
    assert sum(held.values()) == integer_bytes(group[0].out_features, group[0].in_features, 3, 16)


def test_fewer_bits_under_the_gram_lose_less_than_without(artifacts: Artifacts, tmp_path: Path) -> None:
    spec = artifacts.groups[0][0]
    gram = GramStore(artifacts.calibration_dir).stored(spec.name)
    job = job_of(artifacts, IntegerForms({spec.name: 2}, {}, 16), {})
    matrix, lost = gram.read().double(), []
    for number, (changed, seen) in enumerate(((job, gram), (replace(job, by_weights=True), gram), (job, None))):
        shard = tmp_path / str(number) / "model-00001-of-00001.safetensors"
        factorize_group(changed, (spec,), seen, shard)
        delta = difference(artifacts, shard, spec.name)
        lost.append(float((delta @ matrix @ delta.T).trace()))
    assert lost[0] < 0.9 * lost[1]
    assert lost[1] == lost[2]  # by the weight alone, or for want of a Gram


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_whole_emulator_loads_with_what_each_shard_holds(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], storage: Storage
) -> None:
    model_dir = tiny_model_dir("qwen2", dtype="bfloat16")  # biases
    config = AutoConfig.from_pretrained(model_dir)
    specs = block_linears(empty_model(config))
    ranks = {spec.name: 8 for spec in specs if spec.name.endswith(("q_proj", "up_proj"))}
    beside = {spec.name: 3 for spec in specs if spec.name.endswith(("v_proj", "down_proj"))}
    # Pivoted: a mixture, of which queries are factors in floats and outputs dense.
    wide = ("q_proj", "o_proj") if storage == "pivoted" else ()
    forms = IntegerForms({spec.name: 4 for spec in specs if not spec.name.endswith(wide)}, beside, 16)
    groups = tuple((spec,) for spec in specs if spec.name in {**ranks, **forms.bits})
    job = FactorizationJob(
        model_dir, tmp_path / "emulator", tuple((spec,) for spec in specs), ranks, storage=storage, integers=forms
    )
    grams = {spec.name: Gram(torch.eye(spec.in_features), 64) for spec in specs}
    write_gram_shard(tmp_path / "grams" / "grams.safetensors", grams)
    names = [[name] for name in grams]
    write_gram_index(tmp_path / "grams", names, dict.fromkeys(grams, "grams.safetensors"), dict.fromkeys(grams, 64))
    store, rest = GramStore(tmp_path / "grams"), rest_of_shards(job)
    total = len(groups) + len(rest)
    files = [job.out_dir / f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]
    for group, file in zip(groups, files, strict=False):
        factorize_group(job, group, store.stored(group[0].name), file)
    for kept, file in zip(rest, files[len(groups) :], strict=True):
        copy_rest(kept, file)
    num_bytes = finish_emulator(files, config, model_dir, ranks, storage, None, forms)
    assert num_bytes == Checkpoint(job.out_dir).num_bytes
    model, original = load_model(job.out_dir), load_model(model_dir)
    ids = torch.arange(2, 30)[None]
    difference = (model(ids).logits - original(ids).logits).float()
    assert 0 < float(difference.norm() / original(ids).logits.float().norm()) < 0.7
    for spec in specs:
        x = torch.zeros(1, spec.in_features, dtype=torch.bfloat16)
        layers = model.get_submodule(spec.name), original.get_submodule(spec.name)
        assert torch.equal(*(layer(x) for layer in layers)), spec.name  # the bias
    kinds = {name.rsplit(".", 1)[-1]: type(model.get_submodule(name)).__name__ for name in grams}
    assert kinds["q_proj"] == ("PivotedLinear" if storage == "pivoted" else "FactorizedLinear")
    assert kinds["o_proj"] == ("Linear" if storage == "pivoted" else "IntegerLinear")
    assert (kinds["up_proj"], kinds["v_proj"]) == ("FactorizedLinear", "ResidualLinear")
    settings = adapter_config(r=4, lora_alpha=8, target_modules=list(grams))
    adapted = attach_adapter(model.float(), settings)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * len(specs)
    assert all("lora_" in name for name in trained)
