from __future__ import annotations

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
)

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.architecture import StoredRows, block_linears
from emloc_ray.modeling.stored_names import StoredParameter, renamed_tensors, require, stored_parameters, stored_specs

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


def test_tensors_that_transformers_splits_are_told(tmp_path: Path) -> None:
    """What is stored as one linear, in memory as several, is of a kind that is not known here."""
    config = HrmTextConfig(**{**SIZES, "num_layers_per_stack": 1, "head_dim": 8})
    HrmTextForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = HrmTextForCausalLM(config)
    stored = stored_parameters(model, [entry.name for entry in checkpoint])
    split = [name for name, parameter in stored.items() if not parameter.parts]
    assert {name.rpartition(".layers.0.")[2] for name in split} == {
        *(f"self_attn.{part}_proj.weight" for part in ("gate", "q", "k", "v")),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up")),
    }
    with pytest.raises(ArtifactError, match="in a form that only transformers can convert"):
        require(stored, split[0], checkpoint)


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
