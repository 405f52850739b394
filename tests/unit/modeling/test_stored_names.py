from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import HIDDEN, make_model
from transformers import (
    CLIPVisionConfig,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter_files import LoraModule, write_adapter
from emloc_ray.modeling.architecture import StoredRows, block_linears
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.stored_names import StoredParameter, renamed_tensors, require, stored_parameters, stored_specs
from emloc_ray.stages.merge.merge import MergeJob, merge_shard

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES))


def qwen3_moe() -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **{**SIZES, "head_dim": 8})
    )


def llava() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=5)
    )


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, llava, lambda: make_model("gpt2")])
def test_every_parameter_is_read_as_transformers_would_load_it(make: Any, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    stored = stored_parameters(model, (entry.name for entry in checkpoint))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert stored.keys() == model.state_dict().keys() - tied
    for name, found in stored.items():
        assert torch.equal(found.read(checkpoint), model.state_dict()[name]), name


def test_names_that_the_checkpoint_changes_are_told_with_where_each_linear_is(tmp_path: Path) -> None:
    model = llava()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    stored = stored_parameters(model, (entry.name for entry in checkpoint))
    renamed = renamed_tensors(stored)
    assert renamed["language_model.model.layers.0.mlp.up_proj.weight"] == (
        "model.language_model.layers.0.mlp.up_proj.weight"
    )
    for spec in stored_specs(block_linears(model), stored, checkpoint):
        assert [rows.name for rows in spec.weight_rows] != [spec.weight_name]
        assert torch.equal(spec.read_weight(checkpoint), model.get_submodule(spec.name).weight), spec.name
        assert not spec.has_bias or torch.equal(
            checkpoint.read(spec.bias_rows.name), model.get_submodule(spec.name).bias
        )


def test_a_scalar_is_read(tmp_path: Path) -> None:
    """Apertus' activation has two parameters of no dimension."""
    save_file({"scale": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    assert StoredParameter((("scale",),)).read(Checkpoint(tmp_path)) == 3


def hrm() -> Any:
    """What is stored as one linear, it has as several, one below the other."""
    return HrmTextForCausalLM(HrmTextConfig(**{**SIZES, "num_layers_per_stack": 1, "head_dim": 8}))


def qwen3_vl_moe() -> Any:
    """Its fused experts are stored transposed."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 32,
    }
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 7}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config={**SIZES, **moe}, vision_config=vision))


@pytest.mark.parametrize("make", [hrm, qwen3_vl_moe])
@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_parts_of_tensors_are_read_and_merged_where_they_are(make: Any, as_on_the_hub: bool, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, save_original_format=as_on_the_hub)
    model, checkpoint = load_model(tmp_path), Checkpoint(tmp_path)
    stored = stored_parameters(model, {entry.name: entry.shape for entry in checkpoint})
    for name, found in stored.items():
        assert torch.equal(found.read(checkpoint), model.state_dict()[name]), name
    specs = stored_specs(block_linears(model), stored, checkpoint)
    for spec in specs:
        assert torch.equal(spec.read_weight(checkpoint), model.get_submodule(spec.name).weight), spec.name
    experts = [spec for spec in specs if spec.routed_share is not None and ".layers.0." in spec.name]
    adapted = [*[spec for spec in specs if spec.routed_share is None][1::3], *experts]
    modules = [
        LoraModule(spec.name, torch.randn(2, spec.in_features), torch.randn(spec.out_features, 2), 1.0)
        for spec in adapted
    ]
    updates = {module.name: module.lora_b @ module.lora_a for module in modules}
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    if experts:
        fused = experts[0].name.removesuffix(".0.gate_up")
        config["target_parameters"] = [f"{fused}.gate_up_proj", f"{fused}.down_proj"]
    write_adapter(tmp_path / "adapter", config, modules)
    (tmp_path / "merged").mkdir()
    job = MergeJob(tmp_path, tmp_path / "adapter", tmp_path / "merged", specs, 1000)
    for shard in checkpoint.shards:
        merge_shard(job, shard, tmp_path / "merged" / shard.file.name)
    for file in tmp_path.glob("*.json"):
        shutil.copy(file, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    for name, parameter in merged.state_dict().items():
        expected = model.state_dict()[name] + updates.get(name.removesuffix(".weight"), 0)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_holds_more_than_linears_is_told(tmp_path: Path) -> None:
    hrm().save_pretrained(tmp_path)
    model, checkpoint = load_model(tmp_path), Checkpoint(tmp_path)
    stored = stored_parameters(model, {entry.name: entry.shape for entry in checkpoint})
    specs = [spec for spec in block_linears(model) if not spec.name.endswith("v_proj")]
    with pytest.raises(ArtifactError, match=r"gqkv_proj\.weight in a form that only transformers can convert"):
        stored_specs(specs, stored, checkpoint)


def test_a_linear_under_its_own_name_is_left_as_it_is(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    specs = tuple(block_linears(model))
    stored = stored_parameters(model, model.state_dict())
    assert stored_specs(specs, stored, Checkpoint(tmp_path)) == specs
    assert renamed_tensors(stored) == {}
    assert specs[0].weight_rows == (StoredRows(specs[0].weight_name),)
    assert specs[0].read_weight(Checkpoint(tmp_path)).shape == (HIDDEN, HIDDEN)


def test_what_is_missing_or_of_another_kind_is_told(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    stored = stored_parameters(model, [name for name in checkpoint.entries if "q_proj" not in name])
    with pytest.raises(ArtifactError, match=r"holds no tensor model\.layers\.0\.self_attn\.q_proj\.weight"):
        require(stored, "model.layers.0.self_attn.q_proj.weight", checkpoint)
    made = {**stored, "model.norm.weight": StoredParameter(())}
    with pytest.raises(ArtifactError, match=r"holds model\.norm\.weight in a form that only transformers can convert"):
        require(made, "model.norm.weight", checkpoint)
