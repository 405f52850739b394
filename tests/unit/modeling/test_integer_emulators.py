"""Emulators in integers: as factors, dense, and dense with factors beside them; loaded, adapted, trained on, saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integer_emulators import FILE, save_integer_emulator
from safetensors.torch import load_file
from tiny import FAMILIES, VOCABULARY, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from emloc_ray.core.quantization import quantize
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear, ResidualLinear
from emloc_ray.modeling.emulator_weights import emulator_weight, num_elements
from emloc_ray.modeling.integer_linear import IntegerLinear

IDS = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[(family, "float32") for family in FAMILIES] + [("llama", "bfloat16")])
def made(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Any:
    family, dtype = request.param
    model_dir = tiny_model_dir(family, dtype=dtype)
    return model_dir, *save_integer_emulator(model_dir, tmp_path / "emulator")


def test_it_loads_and_computes_with_the_weights_that_are_stored(made: Any) -> None:
    model_dir, directory, kinds = made
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values())
    checkpoint, original = Checkpoint(directory), Checkpoint(model_dir)
    wanted: dict[str, type[nn.Module]] = {"factors": FactorizedLinear, "beside": ResidualLinear, "dense": nn.Module}
    for spec in block_linears(make_model(model.config.model_type)):
        layer: Any = model.get_submodule(spec.name)
        assert isinstance(layer, wanted.get(kinds[spec.name], IntegerLinear))
        stored = emulator_weight(checkpoint, spec.name, spec.in_features)
        assert (stored is None) == (kinds[spec.name] == "dense")
        if stored is None:
            continue
        weight = stored.rows()
        wide = spec.read_weight(original).float()
        assert torch.linalg.vector_norm(weight - wide) < 0.9 * torch.linalg.vector_norm(wide)
        x = torch.eye(spec.in_features, dtype=model.dtype)
        bias = layer(torch.zeros(1, spec.in_features, dtype=model.dtype))
        exact = model.dtype == torch.float32
        assert torch.allclose((layer(x) - bias).float(), weight.T, atol=1e-6 if exact else 0.02)
        assert layer.weight.dtype == model.dtype


def test_everything_is_counted(made: Any) -> None:
    _, directory, _ = made
    counted = 0
    for entry in Checkpoint(directory):
        elements = num_elements(entry.name, entry.dtype, entry.shape)
        counted += elements
        assert elements >= 0
    model = AutoModelForCausalLM.from_pretrained(directory)
    floats = sum(p.numel() for p in model.parameters())
    packed = [m for m in model.modules() if isinstance(m, IntegerLinear)]
    wanted = floats + sum(m.in_features * m.out_features for m in packed)
    assert wanted <= counted < 1.01 * wanted  # rows of codes end with a byte


def test_lora_trains_on_it_and_nothing_else_does(made: Any, tmp_path: Path) -> None:
    _, directory, kinds = made
    model = AutoModelForCausalLM.from_pretrained(directory).requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    transposed = any(spec.transposed for spec in block_linears(make_model(model.config.model_type)))
    plain = model(IDS).logits
    adapted = attach_adapter(
        model, adapter_config(r=4, lora_alpha=8, target_modules=list(kinds), fan_in_fan_out=transposed)
    )
    assert torch.equal(adapted(IDS).logits, plain)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * len(kinds)
    assert all("lora_" in name for name in trained)
    assert all(float(p.grad.abs().max()) > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
    after = dict(adapted.base_model.model.named_buffers())
    assert all(
        torch.equal(after[name.replace(".int", ".base_layer.int")], b) for name, b in before.items() if name in after
    )


def test_gradients_of_inputs_are_those_of_the_dense_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 40)
    stored = quantize(weight, Whitening.identity(40), 3, 16)
    layer = IntegerLinear(40, 12, 3, 16, bias=True)
    layer.load_state_dict({**stored.tensors(torch.float32), "bias": torch.randn(12)})
    x = torch.randn(5, 40, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    dense = nn.functional.linear(x.detach().requires_grad_(), stored.dense(), layer.bias)
    assert torch.allclose(y, dense, atol=1e-6)
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * dense.detach() @ stored.dense(), atol=1e-4)
    assert all(p.grad is None for p in layer.parameters())


def test_it_is_saved_as_it_was(made: Any, tmp_path: Path) -> None:
    _, directory, _ = made
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "again")
    one, other = load_file(directory / FILE), load_file(tmp_path / "again" / "model.safetensors")
    packed = [name for name in one if name.endswith(("int2", "int3", "int4", "int8", "scales", "zeros", "exponent"))]
    assert packed
    assert all(torch.equal(one[name], other[name]) for name in packed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_it_computes_in_the_dtype_that_is_asked_for(made: Any) -> None:
    _, directory, _ = made
    wide = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    narrow = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert {m.weight.dtype for m in narrow.modules() if isinstance(m, IntegerLinear)} == {torch.bfloat16}
    assert torch.allclose(narrow(IDS).logits.float(), wide(IDS).logits, atol=0.1)
