"""Models on a GPU, against the CPU: a training step of an emulator, sums over blocks, padding, 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.shapes import SHAPES, linears_of, llama_config, random_batch, random_llama, uniform_ranks
from torch import Tensor

from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import call_loss, token_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
DEVICE = "cuda"
CONFIG = llama_config(SHAPES["tiny"].model)


def model_on(device: str, ranks: dict[str, int] | None = None) -> Any:
    """The same float32 weights on every device."""
    torch.manual_seed(0)
    return random_llama(CONFIG, torch.device("cpu"), ranks, torch.float32).to(device)


def emulator_on(device: str) -> Any:
    """With a LoRA on every linear, the same on every device, and blocks run again in the backward pass."""
    specs = linears_of(CONFIG)
    emulator = model_on("cpu", uniform_ranks(specs, 0.5, 8))
    model = attach_adapter(emulator, adapter_config(target_modules=[s.name for s in specs], r=4, lora_alpha=8)).to(
        device
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch_on(device: str, padded: bool = False) -> dict[str, Tensor]:
    return random_batch(2, 96, CONFIG.vocab_size, torch.device(device), padded)


def apart(there: Tensor, here: Tensor) -> float:
    return float(torch.linalg.norm(there.cpu() - here) / torch.linalg.norm(here))


def steps(device: str, count: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some optimizer steps, and the adapter afterwards."""
    model, batch = emulator_on(device), batch_on(device, padded=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=1.0), []
    for _ in range(count):
        result = token_loss(model, batch, "all")
        (result.loss_sum / result.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.loss_sum.detach()) / result.num_tokens)
    return losses, {name: p.detach().cpu() for name, p in trained.items()}


def test_an_emulator_trains_as_on_the_cpu() -> None:
    here, there = steps("cpu"), steps(DEVICE)
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert here[0][-1] < here[0][0]
    assert all(apart(there[1][name], value) < 1e-2 for name, value in here[1].items())


@pytest.mark.xfail(
    raises=RuntimeError, reason="the host asks whether a row is padded, and how many labels there are, each micro-step"
)
def test_a_warmed_micro_step_never_waits_for_the_gpu() -> None:
    model, batch = emulator_on(DEVICE), batch_on(DEVICE)

    def micro_step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            result = token_loss(model, batch, "all")
        (result.loss_sum / result.num_tokens).backward()

    micro_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_right_padding_needs_no_mask() -> None:
    model, batch = model_on(DEVICE), batch_on(DEVICE, padded=True)
    real = batch["attention_mask"].bool()
    masked = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    plain = model(batch["input_ids"]).logits[real]
    assert apart(plain, masked.cpu()) < 1e-5


def gathered(device: str, gather: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: matrix.cpu() for name, matrix in gather(model_on(device), batch_on(device, padded=True)).items()}


def grams(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    bare = empty_model(CONFIG)
    hooks = GramHooks(model, trace_inputs(bare, block_linears(bare)).groups)
    hooks.forward(batch)
    hooks.remove()
    return {name: gram.symmetric() for name, gram in hooks.grams.items()}


def gradient_sums(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    hooks = GradientHooks(model, [spec.name for spec in linears_of(CONFIG)], loss_on="all")
    hooks.forward(batch, "all", range(2))
    hooks.remove()
    return {name: gram.symmetric() for name, gram in hooks.grams.items()}


@pytest.mark.parametrize("gather", [grams, gradient_sums])
def test_sums_are_those_of_the_cpu(gather: Callable[..., dict[str, Tensor]]) -> None:
    here, there = gathered("cpu", gather), gathered(DEVICE, gather)
    assert here.keys() == there.keys()
    assert max(apart(there[name], matrix) for name, matrix in here.items()) < 1e-3


def test_grams_block_by_block_are_those_of_the_whole_model(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="replaying a checkpoint reads the data's processors")
    from emloc_ray.modeling.replay import BlockReplay

    model, batch = model_on(DEVICE), batch_on(DEVICE, padded=True)
    model.save_pretrained(tmp_path)
    whole, call = grams(model, batch), model_call(CONFIG, batch)
    replay = BlockReplay(tmp_path, device=DEVICE)
    found: dict[str, Tensor] = {}
    outputs: dict[int, Any] = {}
    for position, block in enumerate(replay.flow.order):
        replay.load_block(position)
        hooks = GramHooks(replay.model, [[name] for name in whole if name.startswith(f"{block}.")])
        with hooks.counting(call.counted):
            given = replay.forward(position, call.inputs, outputs)
        hooks.remove()
        found |= {name: gram.symmetric() for name, gram in hooks.grams.items()}
        outputs |= {} if given is None else {position: given}
    replay.drop_blocks()
    assert found.keys() == whole.keys()
    assert max(apart(found[name], matrix.cpu()) for name, matrix in whole.items()) < 1e-5


@pytest.mark.parametrize("shape", [(256, 128), (96, 72)])
def test_4_bits_are_the_same_weight_on_both(shape: tuple[int, int]) -> None:
    pytest.importorskip("bitsandbytes", reason="4 bits are bitsandbytes' own")
    from emloc_ray.modeling.quantization import dequantize, quantize

    packed = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.float32)
    there = dequantize(packed)
    here = dequantize({key: value.cpu() for key, value in packed.items()})
    assert there.device.type == DEVICE
    assert apart(there, here) < 1e-6


def test_an_offloaded_step_is_a_resident_one(tmp_path: Path) -> None:
    """Weights come over a stream of their own, the next block's while one computes; the same numbers."""
    model_on("cpu").save_pretrained(tmp_path)
    targets = [spec.name for spec in linears_of(CONFIG)]
    losses, gradients = [], []
    for hold in ("resident", "offloaded"):
        torch.manual_seed(0)
        config = adapter_config(target_modules=targets, r=4, lora_alpha=8, init_lora_weights=False)
        model = attach_adapter(open_model(tmp_path, hold, device=DEVICE), config).train()
        for _ in range(2):
            model.zero_grad()
            base: Any = model.get_base_model()
            call = model_call(base.config, batch_on(DEVICE, padded=True), "all").to(base.device)
            loss = call_loss(model, call, base).loss_sum
            loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
