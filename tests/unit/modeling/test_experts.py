"""Unfused experts: transformers' own function, as views, and every pass that must tell experts apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from tiny import EXPERT_FAMILIES, VOCABULARY, make_config, make_model
from torch import nn
from transformers import Gemma4TextConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.emulator import factorize_modules
from emloc_ray.modeling.experts import UnfusedExperts, experts_of, is_fused, owner_of, unfuse
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.replay import BlockReplay
from emloc_ray.modeling.stored_names import stored_parameters, stored_specs

IDS = torch.randint(2, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))


MAKERS: dict[str, Callable[[], Any]] = {
    **{family: (lambda family=family: make_model(family)) for family in EXPERT_FAMILIES},
    "gpt_oss": lambda: build("gpt-oss"),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("family", MAKERS)
def test_unfused_experts_compute_what_fused_ones_do(family: str) -> None:
    model = MAKERS[family]()
    unfused = unfuse(copy.deepcopy(model))
    assert experts_of(unfused)
    found = logits(unfused)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(found, logits(model), rtol=0, atol=0 if family != "gpt_oss" else 1e-6)
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    assert not any(is_fused(module) for module in unfused.modules())
    assert torch.equal(logits(copy.deepcopy(unfused)), found)


def test_experts_of_a_transformers_that_knows_of_no_norm_behind_them_are_unfused() -> None:
    """As 5.17, by which the GPU benchmark's tests may run."""
    model = make_model("mixtral")
    expected = logits(model)
    for module in filter(is_fused, model.modules()):
        del module.has_post_expert_norm
    torch.testing.assert_close(logits(unfuse(model)), expected, rtol=1e-5, atol=1e-5)


def test_experts_without_a_gate_are_up_and_down() -> None:
    config = make_config("mixtral")
    for name, value in {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_latent_size": None}.items():
        setattr(config, name, value)
    config.mlp_hidden_act = "relu2"
    config._experts_implementation = "eager"
    fused = NemotronHExperts(config)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_(std=0.1)
    x, chosen = torch.randn(9, 64), torch.randint(0, 4, (9, 1))
    weights = torch.rand(9, 1)
    expected = fused(x, chosen, weights)
    unfused = UnfusedExperts(fused)
    assert unfused.parts == ("up", "down")
    torch.testing.assert_close(unfused(x, chosen, weights), expected)


def test_nothing_is_copied() -> None:
    model = make_model("mixtral")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    experts = experts_of(unfuse(model))["model.layers.0.mlp.experts"]
    linear = experts.get_submodule("2.gate_up")
    assert isinstance(linear, nn.Linear)
    assert linear.weight.untyped_storage()._cdata == fused.untyped_storage()._cdata
    assert torch.equal(linear.weight, fused[2])


def test_of_a_parameter_that_deepspeed_has_scattered_new_linears_are_made() -> None:
    fused = make_model("mixtral").model.layers[0].mlp.experts
    for parameter in fused.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    experts = UnfusedExperts(fused)
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    assert shapes["1.gate_up.weight"] == (256, 64)
    assert shapes["3.down.weight"] == (64, 128)


@pytest.mark.parametrize("family", MAKERS)
def test_each_expert_has_linears_of_its_own_and_the_others_are_grouped_as_ever(family: str) -> None:
    model = empty_model(MAKERS[family]().config)
    specs = block_linears(model)
    routed = [spec for spec in specs if spec.routed_share is not None]
    layers = 1 if family == "qwen3_moe" else 2
    assert len(routed) == layers * 4 * 2
    assert {spec.routed_share for spec in routed} == {0.5}
    assert not any("gate." in spec.name or spec.name.endswith(("gate", "router")) for spec in specs)
    groups = trace_inputs(model, specs).groups
    assert all([spec.name] in groups for spec in routed)
    assert ["q_proj", "k_proj", "v_proj"] in [[name.rsplit(".", 1)[-1] for name in group] for group in groups]
    if family == "qwen2_moe":
        assert [f"model.layers.0.mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj")] in groups


def test_a_router_may_read_its_number_of_experts_from_the_config() -> None:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "vocab_size": VOCABULARY,
    }
    heads: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma4TextConfig(
        **sizes,
        **heads,
        layer_types=["full_attention"],
        vocab_size_per_layer_input=VOCABULARY,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=1,
    )
    specs = block_linears(empty_model(config))
    assert {spec.routed_share for spec in specs if spec.routed_share is not None} == {0.25}


def test_names_of_experts_are_told_from_others() -> None:
    assert owner_of("model.layers.0.mlp.experts.12.gate_up") == ("model.layers.0.mlp.experts", 12, "gate_up")
    assert owner_of("model.layers.0.mlp.experts.12.down_proj") is None
    assert owner_of("model.layers.0.mlp.down") is None
    assert owner_of("down") is None


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_an_expert_is_found_where_the_checkpoint_holds_it(family: str, as_on_the_hub: bool, tmp_path: Path) -> None:
    MAKERS[family]().save_pretrained(tmp_path, save_original_format=as_on_the_hub)
    model, checkpoint = load_model(tmp_path), Checkpoint(tmp_path)
    stored = stored_parameters(model, (entry.name for entry in checkpoint))
    assert stored.keys() == model.state_dict().keys()
    for name, found in stored.items():
        assert torch.equal(found.read(checkpoint), model.state_dict()[name]), name
    for spec in stored_specs(block_linears(model), stored, checkpoint):
        weight = model.get_submodule(spec.name).weight
        assert torch.equal(spec.read_weight(checkpoint), weight), spec.name
        if spec.has_bias:
            assert torch.equal(spec.bias_rows.entry(checkpoint).read_rows(), model.get_submodule(spec.name).bias)


@pytest.mark.parametrize("family", MAKERS)
def test_a_block_alone_has_the_weights_of_the_whole(family: str, tmp_path: Path) -> None:
    MAKERS[family]().save_pretrained(tmp_path)
    whole, replay = load_model(tmp_path), BlockReplay(tmp_path)
    replay.load_block(1)
    for name, parameter in replay.model.get_submodule("model.layers.1").named_parameters():
        assert torch.equal(parameter, whole.get_submodule("model.layers.1").get_parameter(name)), name


def test_in_training_every_adapter_of_an_expert_has_a_gradient() -> None:
    model = unfuse(make_model("mixtral"))
    names = [spec.name for spec in block_linears(model) if spec.routed_share is not None]
    factorize_modules(model, {name: 4 for name in names if ".down" not in name})
    adapted = attach_adapter(model, adapter_config(target_modules=names, r=2, lora_alpha=4)).train()
    adapted(IDS[:1, :1]).logits.sum().backward()  # one token: two of four experts
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in trained.values())
    used = {name.split(".experts.")[1][0] for name, g in trained.items() if g is not None and bool(g.any())}
    assert len(used) <= 4
    assert any(
        not bool(gradient.any()) for name, gradient in trained.items() if "lora_B" in name and gradient is not None
    )
