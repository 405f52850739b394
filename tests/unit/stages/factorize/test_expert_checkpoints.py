"""Checkpoints that hold experts apart or fused: merged and copied without a whole parameter in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard
from emloc_ray.modeling.adapter_files import LoraModule, write_adapter
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model
from emloc_ray.modeling.experts import PARTS, owner_of
from emloc_ray.modeling.stored_names import renamed_tensors, stored_parameters, stored_specs
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.merge.merge import MergeJob, merge_shard

R, ALPHA = 2, 6
FAMILIES = ["mixtral", "qwen2_moe"]


def save(directory: Path, family: str, as_on_the_hub: bool) -> tuple[Path, tuple[LinearSpec, ...], dict[str, str]]:
    """A checkpoint in many shards, the model's linears in it, and what has another name there."""
    model = make_model(family)
    model.save_pretrained(directory, max_shard_size="60KB", save_original_format=as_on_the_hub)
    checkpoint = Checkpoint(directory)
    empty = empty_model(AutoConfig.from_pretrained(directory))
    stored = stored_parameters(empty, (entry.name for entry in checkpoint))
    return directory, stored_specs(block_linears(empty), stored, checkpoint), renamed_tensors(stored)


def weight_of(model: Any, spec: LinearSpec) -> torch.Tensor:
    """Of a fused model."""
    owner = owner_of(spec.name) if spec.routed_share is not None else None
    if owner is None:
        return model.get_submodule(spec.name).weight
    return getattr(model.get_submodule(owner[0]), PARTS[owner[2]])[owner[1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("as_on_the_hub", [True, False])
@pytest.mark.parametrize("chunk_bytes", [4096, 2**25])
def test_each_experts_update_is_merged_where_its_rows_are(
    family: str, as_on_the_hub: bool, chunk_bytes: int, tmp_path: Path
) -> None:
    model_dir, specs, _ = save(tmp_path / "model", family, as_on_the_hub)
    generator = torch.Generator().manual_seed(2)
    adapted = [s for s in specs if s.name.endswith(("o_proj", "gate_up", "down")) and "layers.0" in s.name]
    modules = [
        LoraModule(
            spec.name,
            torch.randn(R, spec.in_features, generator=generator),
            torch.randn(spec.out_features, R, generator=generator),
            ALPHA / R,
        )
        for spec in adapted
    ]
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": ["o_proj"],
        "target_parameters": [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")],
    }
    write_adapter(tmp_path / "adapter", config, modules)
    job = MergeJob(model_dir, tmp_path / "adapter", tmp_path / "merged", specs, chunk_bytes)
    changed = sum(
        merge_shard(job, shard, tmp_path / "merged" / shard.file.name) for shard in Checkpoint(model_dir).shards
    )
    assert changed == sum(len(spec.weight_rows) for spec in adapted)
    for file in model_dir.glob("*.json"):
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_dir, tmp_path / "merged"))
    updates = {module.name: module.scale * module.lora_b @ module.lora_a for module in modules}
    for spec in specs:
        expected = weight_of(before, spec) + updates.get(spec.name, 0)
        torch.testing.assert_close(weight_of(after, spec), expected, rtol=1e-5, atol=1e-6)
        assert spec.name in updates or torch.equal(weight_of(after, spec), weight_of(before, spec))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_an_emulator_with_every_expert_dense_is_the_model(family: str, as_on_the_hub: bool, tmp_path: Path) -> None:
    model_dir, specs, renamed = save(tmp_path / "model", family, as_on_the_hub)
    job = FactorizationJob(model_dir, tmp_path / "emulator", tuple((spec,) for spec in specs), {}, renamed=renamed)
    files = []
    for number, kept in enumerate(rest_of_shards(job)):
        files.append(tmp_path / "emulator" / f"model-{number}.safetensors")
        copy_rest(kept, files[-1])
        assert all(entry.num_bytes > 0 for entry in read_shard(files[-1]).entries)
    finish_emulator(files, AutoConfig.from_pretrained(model_dir), model_dir, {}, "factors", None)
    original = AutoModelForCausalLM.from_pretrained(model_dir)
    original.set_experts_implementation("eager")
    emulator, said = AutoModelForCausalLM.from_pretrained(job.out_dir, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(emulator(ids).logits, original(ids).logits)
