"""Grams gathered in the model's forward pass, against products of inputs that plain hooks captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from other_vlms import PADDING, row_with_images
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from stage_artifacts import random_rows
from tiny import FAMILIES, PAD, VOCABULARY, make_model, random_model
from transformers import Llama4TextConfig
from vlms import build_vlm

from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import ImageInputs, example
from emloc_ray.data.token_shards import collate
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import ColumnHooks, GramHooks
from emloc_ray.modeling.inputs import model_call

EVERY_FAMILY = [*FAMILIES, "opt"]


def groups_of(family: str) -> list[list[str]]:
    model = empty_model(make_model(family).config)
    return trace_inputs(model, block_linears(model)).groups


@torch.no_grad()
def captured(model: Any, many: list[Tokens], only_completion: bool = False) -> dict[str, torch.Tensor]:
    """What every linear reads, row by row with no padding at all: ``(tokens, in)``, float64."""
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [spec.name for spec in block_linears(model)]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.setdefault(name, []).append(
                args[0].reshape(-1, args[0].shape[-1]).double()
            )
        )
        for name in names
    ]
    for row in many:
        model(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    keep = torch.tensor([completion or not only_completion for row in many for completion in row.completion_mask])
    return {name: torch.cat(parts)[keep] for name, parts in inputs.items()}


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_grams_equal_brute_force_and_padding_never_counts(family: str, tokens: str) -> None:
    model, many = make_model(family), random_rows()
    expected = captured(model, many, only_completion=tokens == "completion")
    groups = groups_of(family)
    hooks = GramHooks(model, groups)
    for part in (many[:3], many[3:]):
        hooks.forward(collate(part, PAD), tokens)
    assert set(hooks.grams) == {group[0] for group in groups}
    for group in groups:
        gram = hooks.grams[group[0]]
        for name in group:  # one sum stands for every linear of its group
            x = expected[name]
            assert gram.num_tokens == len(x)
            torch.testing.assert_close(
                gram.symmetric().double(), x.T @ x, rtol=1e-3, atol=1e-4 * float(x.square().sum(0).max())
            )
    hooks.check_finite()


def test_the_dtype_s_rounding_is_not_accumulated() -> None:
    model = make_model("llama", dtype="bfloat16")
    groups = groups_of("llama")
    hooks = GramHooks(model, groups)
    seen: list[torch.Tensor] = []
    module = model.get_submodule(groups[0][0])
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 64).double()))
    batch = collate(random_rows(), PAD)
    batch["attention_mask"].fill_(1)
    for _ in range(4):
        hooks.forward(batch)
    x = torch.cat(seen)
    gram = hooks.grams[groups[0][0]]
    assert gram.matrix.dtype == torch.float32
    torch.testing.assert_close(gram.symmetric().double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_the_head_is_not_run() -> None:
    model = make_model("llama")
    ran: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: ran.append("head"))
    model.model.norm.register_forward_pre_hook(lambda module, args: ran.append("body"))
    GramHooks(model, groups_of("llama")).forward(collate(random_rows(), PAD))
    assert ran == ["body"]


def t5() -> Any:
    return build("T5")


def llama4() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "head_dim": 16}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return random_model(
        Llama4TextConfig(vocab_size=VOCABULARY, num_local_experts=4, pad_token_id=PAD, **sizes, **heads)
    )


@pytest.mark.parametrize("make", [t5, llama4])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_head_of_a_model_whose_prefix_names_no_body_is_not_run(
    make: Callable[[], Any], known: bool, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(), collate(random_rows(), PAD)
    assert not hasattr(model, model.base_model_prefix)
    specs = block_linears(model)
    names = [spec.name for spec in specs]
    bare = empty_model(model.config)
    streams = trace_inputs(bare, block_linears(bare)).streams
    if adapted:
        lora = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        model = get_peft_model(model, lora).eval().get_base_model()
        q = {spec.name: torch.linalg.qr(torch.randn(spec.in_features, 2)).Q for spec in specs}
    ran: list[str] = []
    model.lm_head.register_forward_hook(lambda module, args, output: ran.append("head"))
    if not known:
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    call = model_call(model.config, batch)
    sums = []
    for whole in (False, True):
        hooks: Any = (
            ColumnHooks(model, q, streams) if adapted else GramHooks(model, [[name] for name in names], streams)
        )
        if whole:
            with torch.no_grad(), hooks.counting(call.counted):
                model(**call.inputs, use_cache=False)
        else:
            hooks.forward(batch)
            assert ran == ([] if known else ["head"])
        hooks.remove()
        sums.append(hooks.grams)
    for name in names:
        one, other = (gram[name] for gram in sums)
        assert one.num_tokens == other.num_tokens > 0
        assert torch.equal(one.matrix, other.matrix)
    ran.clear()
    model(**call.inputs)
    assert ran == ["head"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_layer(bad: float) -> None:
    model = make_model("llama")
    model.get_submodule("model.layers.1.input_layernorm").weight.data[3] = bad
    hooks = GramHooks(model, groups_of("llama"))
    hooks.forward(collate(random_rows(), PAD))
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.self_attn\.q_proj reads hold NaN or Inf"):
        hooks.check_finite()


@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_columns_are_of_what_linears_with_an_adapter_read(tokens: str) -> None:
    model = make_model("llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).base_model.model
    layers: dict[str, Any] = {n: module for n, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    q = {name: torch.linalg.qr(torch.randn(layer.in_features, 2)).Q for name, layer in layers.items()}
    read: dict[str, list[torch.Tensor]] = {name: [] for name in q}
    handles = [
        adapted.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: read[name].append(x[0][0]))
        for name in q
    ]
    many = random_rows()
    with torch.no_grad():
        for row in many:
            adapted(input_ids=torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    hooks = ColumnHooks(adapted, q)
    hooks.forward(collate(many, PAD), tokens)
    counts = torch.cat([torch.tensor(row.completion_mask) | (tokens == "all") for row in many])
    for name in q:
        x = torch.cat(read[name])[counts]
        assert hooks.grams[name].num_tokens == len(x)
        torch.testing.assert_close(hooks.grams[name].matrix, x.T @ (x @ q[name]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", PADDING)
def test_patches_that_are_padding_never_count(family: str, tmp_path: Path) -> None:
    """Those of a tower are summed in a batch as they are of each image alone."""
    model, processor = build_vlm(family, PADDING)
    processor.save_pretrained(tmp_path)
    bare, images = empty_model(model.config), ImageInputs(tmp_path)
    streams = trace_inputs(bare, block_linears(bare), example(tmp_path)).streams
    tower = [name for name, stream in streams.items() if stream == "other" and "vision" in name]
    assert len(tower) > 10
    rows = [row_with_images(processor, sizes) for sizes in ([(24, 24)], [(90, 40)], [(30, 60), (24, 24)])]
    # Idefics2 makes these images 28 × 28, 70 × 31, 30 × 60 and 28 × 28; of four patches the others make a token.
    token = processor.image_token_id
    patches = 16 + 40 + 32 + 16 if family == "Idefics2" else 4 * sum(row.input_ids.count(token) for row in rows)
    alone = GramHooks(model, [[name] for name in tower], streams)
    for row in rows:
        alone.forward(collate([row], PAD, images))
    alone.remove()
    batched = GramHooks(model, [[name] for name in tower], streams)
    batched.forward(collate(rows, PAD, images))
    batched.remove()
    gradients = GradientHooks(model.requires_grad_(False), tower, streams)
    gradients.forward(collate(rows, PAD, images), "all", range(3))
    for name in tower:
        one, other = alone.grams[name], batched.grams[name]
        assert one.num_tokens == other.num_tokens == gradients.grams[name].num_tokens == patches
        scale = float(one.matrix.diagonal().max())
        torch.testing.assert_close(other.symmetric(), one.symmetric(), rtol=1e-3, atol=1e-4 * scale)
