"""NF4 against its definition, and against what transformers and bitsandbytes write and load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from dense_weights import dense_weight
from safetensors.torch import load_file
from tiny import FAMILIES, VOCABULARY, make_model, save_quantized_emulator
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.emulator_weights import emulator_weight, num_elements
from emloc_ray.modeling.four_bit_linear import ExactLinear4bit
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.nf4 import dequantize_nf4, nf4_bytes, quantize_nf4, replaceable_linears

IDS = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def nf4_levels() -> np.ndarray:
    """The QLoRA paper's: quantiles of a normal distribution, eight above zero and seven below, and zero itself."""
    quantile = NormalDist().inv_cdf
    above = [quantile(share) for share in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(share) for share in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*above, 0.0, *below]))
    return levels / levels.max()


def nearest_levels(weight: np.ndarray) -> np.ndarray:
    """Every element at the nearest level times the largest magnitude among its 64."""
    flat = weight.reshape(-1).astype(np.float64)
    levels, found = nf4_levels(), np.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = np.abs(block).max() or 1.0
        found[start : start + 64] = scale * levels[np.abs(block[:, None] / scale - levels).argmin(axis=1)]
    return found.reshape(weight.shape)


# Inner sizes that are multiples of a block and not, even and odd, above and below it; one element in the last byte.
@pytest.mark.parametrize("shape", [(64, 64), (96, 144), (40, 209), (100, 30), (7, 3), (5, 1), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_comes_back_is_the_nearest_level(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape)
    found = dequantize_nf4(quantize_nf4(weight, dtype))
    assert (found.shape, found.dtype) == (shape, dtype)
    expected = nearest_levels(weight.numpy())
    # Scales are in 8 bits: within 1 % of the largest.
    np.testing.assert_allclose(found.double().numpy(), expected, atol=0.01 * float(weight.abs().max()) + 1e-6)


def test_the_error_is_that_of_nf4_whatever_the_scale() -> None:
    for scale in (1e-6, 1.0, 1e4):
        weight = scale * random(128, 192)
        found = dequantize_nf4(quantize_nf4(weight, torch.float32))
        assert 0.08 < float((found - weight).norm() / weight.norm()) < 0.1


def test_zeros_stay_zeros_and_what_is_no_number_is_refused_by_name() -> None:
    assert torch.equal(
        dequantize_nf4(quantize_nf4(torch.zeros(64, 96), torch.bfloat16)), torch.zeros(64, 96).bfloat16()
    )
    for value in (torch.nan, torch.inf):
        weight = random(8, 8)
        weight[3, 5] = value
        with pytest.raises(NumericsError, match=r"The weight of blocks\.3\.up holds a NaN or an Inf\."):
            quantize_nf4(weight, torch.float32, "blocks.3.up")


def test_16_bit_weights_are_rounded_once() -> None:
    weight = random(64, 128)
    narrow = {k: v for k, v in quantize_nf4(weight, torch.bfloat16).items() if "quant_state" not in k}
    assert all(torch.equal(quantize_nf4(weight, torch.float32)[key], tensor) for key, tensor in narrow.items())


@pytest.mark.parametrize("shape", [(64, 64), (576, 209), (1024, 1024), (3, 5)])
def test_bytes_are_counted(shape: tuple[int, int]) -> None:
    tensors = quantize_nf4(random(*shape), torch.bfloat16)
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert held == pytest.approx(nf4_bytes(*shape), abs=20)
    counted = sum(num_elements(f"x.{key}", tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items())
    assert counted == shape[0] * shape[1] + shape[0] * shape[1] % 2


def test_the_layout_is_what_transformers_writes(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("llama")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=options)
    theirs.save_pretrained(tmp_path / "theirs")
    written, original = load_file(tmp_path / "theirs" / "model.safetensors"), Checkpoint(model_dir)
    for spec in block_linears(make_model("llama")):
        ours = quantize_nf4(original.read(spec.weight_name), torch.float32)
        held = {k.removeprefix(f"{spec.name}."): v for k, v in written.items() if k.startswith(f"{spec.name}.")}
        assert held.keys() == ours.keys()
        assert all(torch.equal(held[key], ours[key]) for key in ours)


RANKED = {"llama": ("q_proj", "down_proj"), "qwen2": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


@pytest.fixture(params=[(family, "float32") for family in FAMILIES] + [("llama", "bfloat16"), ("gpt2", "float16")])
def emulator(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Path:
    """Factors of odd and even ranks, and dense linears, biases and all."""
    family, dtype = request.param
    model_dir = tiny_model_dir(family, dtype=dtype)
    chosen = [spec.name for spec in block_linears(make_model(family)) if spec.name.endswith(RANKED[family])]
    ranks = {name: 9 + number for number, name in enumerate(chosen)}
    return save_quantized_emulator(model_dir, tmp_path / "emulator", ranks)


def layers(model: Any) -> dict[str, Any]:
    kinds = (FactorizedLinear, ExactLinear4bit)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: module for name, module in found.items() if not name.endswith((".up", ".down"))}


def test_it_loads_through_the_auto_class_with_the_weights_that_are_stored(emulator: Path) -> None:
    model, told = AutoModelForCausalLM.from_pretrained(emulator, output_loading_info=True)
    assert not any(told.values())
    checkpoint = Checkpoint(emulator)
    found = layers(model)
    assert len(found) == len(block_linears(make_model(model.config.model_type)))
    assert type(model.get_output_embeddings()) is nn.Linear
    for name, module in found.items():
        weight = emulator_weight(checkpoint, name, module.in_features)
        assert weight is not None
        assert torch.equal(dense_weight(module), weight.rows())


@torch.no_grad()
def test_it_computes_with_the_weights_that_are_stored(emulator: Path) -> None:
    model = load_model(emulator)
    wide = make_model(model.config.model_type, dtype=str(model.dtype).removeprefix("torch."))
    for name, module in layers(model).items():
        plain = wide.get_submodule(name)
        weight = dense_weight(module, torch.float64).to(plain.weight.dtype)
        plain.weight.copy_(weight if type(plain) is nn.Linear else weight.T)
    expected = wide(IDS).logits.float()
    difference = float((model(IDS).logits.float() - expected).abs().max() / expected.abs().max())
    assert difference < (1e-5 if model.dtype == torch.float32 else 3e-2)


def test_it_saves_as_it_was_loaded_though_it_was_evaluated(emulator: Path, tmp_path: Path) -> None:
    model = load_model(emulator)
    with torch.no_grad():
        before = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    ours, theirs = Checkpoint(tmp_path / "again"), Checkpoint(emulator)
    assert {entry.name for entry in ours} >= {entry.name for entry in theirs} - {"lm_head.weight"}
    assert all(torch.equal(entry.read_rows(), theirs.read(entry.name)) for entry in ours)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(IDS).logits, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_unpacked_model(emulator: Path, checkpointing: bool) -> None:
    model = load_model(emulator)
    family = model.config.model_type
    names = [spec.name for spec in block_linears(make_model(family))]
    config = adapter_config(target_modules=names, r=4, lora_alpha=8, fan_in_fan_out=family == "gpt2")
    torch.manual_seed(0)
    adapted = attach_adapter(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * random(*parameter.shape))
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    # The slope along the gradient, by differences.
    held = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    gradients = {n: p.grad.clone() for n, p in held.items()}
    slope = sum(float(g.double().square().sum()) for g in gradients.values())
    if model.dtype != torch.float32:
        assert slope > 0
        return
    step = 1e-3 / slope**0.5
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.add_(sign * step * gradients[name] * (1 if sign > 0 else 2))
            losses.append(float(adapted(IDS, labels=IDS).loss))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_no_unpacked_weight_is_kept_for_the_backward_pass(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(save_quantized_emulator(tiny_model_dir("llama"), tmp_path / "emulator", {}))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    kept: list[torch.Tensor] = []
    x = random(3, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert sum(tensor.numel() for tensor in kept) == 0
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense_weight(layer).sum(0).expand(3, 64))


def test_linears_that_transformers_keeps_in_float32_are_none_of_them() -> None:
    class Careful(LlamaForCausalLM):
        _keep_in_fp32_modules = ["o_proj"]  # noqa: RUF012

    found = replaceable_linears(Careful(make_model("llama").config))
    assert "lm_head" in found
    assert not [name for name in found if name.endswith("o_proj")]
    assert len(found) == 2 * 6 + 1
