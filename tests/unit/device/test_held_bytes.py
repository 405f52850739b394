"""What an offloaded model holds of a device: what is outside its blocks, one block, and between passes with gradients the one
that comes next."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import Meter
from tiny import PAD, VOCABULARY, save_model

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import collate
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import call_loss

LAYERS = 6
BATCH = collate([Tokens([5, 6, 7, 8], [False, False, True, True])], PAD)
ACTIVATIONS = 50_000  # of four tokens: far below a block's 147,968 bytes


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("held") / "llama", "llama", num_hidden_layers=LAYERS)


def sizes(directory: Path) -> tuple[int, int]:
    """Bytes outside the blocks, and of one block."""
    parameters = dict(open_model(directory).named_parameters())
    inside = sum(4 * p.numel() for name, p in parameters.items() if ".layers." in name)
    return sum(4 * p.numel() for p in parameters.values()) - inside, inside // LAYERS


def held(directory: Path, device: torch.device, hold: str = "offloaded") -> Any:
    return open_model(directory, hold, device=str(device))


def loss_of(model: Any) -> torch.Tensor:
    base = model.get_base_model()
    return call_loss(model, model_call(base.config, BATCH, "all").to(base.device), base).loss_sum


@pytest.mark.parametrize("ends", [False, True])
def test_a_pass_forward_and_back(ends: bool, directory: Path, device: torch.device, meter: Meter) -> None:
    outside, block = sizes(directory)
    gc.collect()
    before = meter.current
    model = held(directory, device, "all_offloaded" if ends else "offloaded")
    kept = outside if not ends else outside - 2 * 4 * VOCABULARY * 64
    assert kept <= meter.current - before < kept + 2000
    targets = [spec.name for spec in block_linears(empty_model(model.config))]
    torch.manual_seed(0)
    model = attach_adapter(model, adapter_config(r=1, lora_alpha=1, target_modules=targets, init_lora_weights=False))
    own = meter.current - before
    loss_of(model).backward()
    meter.restart()
    loss = loss_of(model)
    forward = meter.peak - before - own
    loss.backward()
    largest = max(block, 4 * VOCABULARY * 64 if ends else 0)
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert largest < forward < largest + gradients + ACTIVATIONS
    assert meter.peak - before - own < largest + gradients + 2 * ACTIVATIONS
    del loss
    assert meter.current - before <= own + gradients + 100 + (0 if ends else block)


def test_sums_of_gradients_beside_one_block(directory: Path, device: torch.device, meter: Meter) -> None:
    outside, block = sizes(directory)
    gc.collect()
    before = meter.current
    model = held(directory, device)
    name = "model.layers.4.mlp.down_proj"
    hooks = GradientHooks(model, [name], checkpointing=False)
    hooks.forward(BATCH, "all", [0])
    meter.restart()
    runs: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, number=number: runs.append(number))
    hooks.forward(BATCH, "all", [0])
    assert meter.peak - before - outside < block + 4 * 64 * 64 + 2 * ACTIVATIONS
    assert runs == [0, 1, 2, 3, 4, 5, 5]  # nothing up to what is summed is run again
    assert float(hooks.grams[name].matrix.cpu().diagonal().sum()) > 0
