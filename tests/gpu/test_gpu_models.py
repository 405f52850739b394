"""Models on a GPU, against the CPU: a training step of an emulator, sums over blocks, padding, 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.shapes import SHAPES, linears_of, random_batch
from gpu_device import ASKS_CUDA, DEVICE, ON_GPU
from method_on_device import CONFIG, emulator, original, padded_batch, trained_alone, trained_by_group, whole_method
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from emloc_ray.core.integer_forms import BITS, group_size_of, num_groups
from emloc_ray.core.integers import IntegerWeight, dense_weight
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.experts import experts_of, unfuse
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.grouped_experts import has_kernel
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import call_loss, token_loss

pytestmark = ON_GPU


def model_on(device: str) -> Any:
    """The same float32 weights on every device."""
    return original().to(device)


def batch_on(device: str) -> dict[str, Tensor]:
    return random_batch(2, 96, CONFIG.vocab_size, torch.device(device), padded=True)


def apart(there: Tensor, here: Tensor) -> float:
    return float(torch.linalg.norm(there.cpu() - here) / torch.linalg.norm(here))


def steps(device: str, count: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some optimizer steps, and the adapter afterwards."""
    model, batch = emulator().to(device), batch_on(device)
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


@ASKS_CUDA
def test_a_warmed_micro_step_never_waits_for_the_gpu() -> None:
    model = emulator().to(DEVICE)
    made = model_call(CONFIG, padded_batch(), "all")  # on the CPU, as in training

    def micro_step() -> None:
        call = made.to(model.device)
        with torch.autocast(DEVICE, torch.bfloat16):
            result = call_loss(model, call, model)
        (result.loss_sum / result.num_tokens).backward()

    micro_step()
    try:
        torch.cuda.set_sync_debug_mode("error")  # which warns the first time
        micro_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_whole_method_gives_what_the_cpu_does() -> None:
    here, there = whole_method(lambda module: module), whole_method(lambda module: module.to(DEVICE))
    assert here["merged"] < here["original"]
    assert there == pytest.approx(here, rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no GPU here beside one")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    alone, together = trained_alone(DEVICE), trained_by_group(["cuda:0", "cuda:1"], tmp_path)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-2, atol=1e-4)


@ASKS_CUDA
def test_experts_run_by_grouped_products_as_one_by_one() -> None:
    """In bfloat16, which the kernels take, and without a wait for how many tokens each expert was sent."""
    if not has_kernel(torch.device(DEVICE)):
        pytest.skip("torch has kernels for grouped products on NVIDIA's compute capabilities 9 and 10 alone")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SHAPES["tiny"].model, "num_local_experts": 4}
    fused: Any = MixtralForCausalLM(MixtralConfig(**sizes))
    model = unfuse(fused.to(DEVICE, torch.bfloat16).eval().requires_grad_(False))
    ids = padded_batch()["input_ids"].to(DEVICE)
    found = []
    for together in (True, False):
        for experts in experts_of(model).values():
            experts.together = together
        found.append(model(ids).logits.float())
    assert apart(found[0], found[1].cpu()) < 2e-2
    [experts, *_] = experts_of(model).values()
    experts.together = True
    hidden = torch.randn(64, sizes["hidden_size"], device=DEVICE, dtype=torch.bfloat16)
    chosen = torch.randint(4, (64, 2), device=DEVICE)
    experts(hidden, chosen, torch.ones(64, 2, device=DEVICE, dtype=torch.bfloat16))
    try:
        torch.cuda.set_sync_debug_mode("error")  # which warns the first time
        experts(hidden, chosen, torch.ones(64, 2, device=DEVICE, dtype=torch.bfloat16))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_right_padding_needs_no_mask() -> None:
    model, batch = model_on(DEVICE), batch_on(DEVICE)
    real = batch["attention_mask"].bool()
    masked = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    plain = model(batch["input_ids"]).logits[real]
    assert apart(plain, masked.cpu()) < 1e-5


def gathered(device: str, gather: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: matrix.cpu() for name, matrix in gather(model_on(device), batch_on(device)).items()}


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
    for name in ("obstore", "pyarrow"):
        pytest.importorskip(name, reason="replaying a checkpoint reads the data's processors")
    from emloc_ray.modeling.replay import BlockReplay

    model, batch = model_on(DEVICE), batch_on(DEVICE)
    model.save_pretrained(tmp_path)
    whole, call = grams(model, batch), model_call(CONFIG, batch)
    replay = BlockReplay(tmp_path, device=DEVICE, dtype="float32")  # as the whole model: a GPU would take bfloat16
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
    from emloc_ray.modeling.nf4 import dequantize_nf4, quantize_nf4

    packed = quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE), torch.float32)
    there = dequantize_nf4(packed)
    here = dequantize_nf4({key: value.cpu() for key, value in packed.items()})
    assert there.device.type == DEVICE
    assert apart(there, here) < 1e-6


@pytest.mark.parametrize("columns", [576, 100])
@pytest.mark.parametrize("bits", BITS)
def test_integers_are_the_same_weight_on_both(bits: int, columns: int) -> None:
    """Compiled there to one kernel, here step by step."""
    generator, groups = torch.Generator().manual_seed(0), num_groups(columns, 64)
    codes = torch.randint(0, 2**bits, (96, columns), dtype=torch.uint8, generator=generator)
    scales, zeros = (torch.randint(0, 256, (96, groups), dtype=torch.uint8, generator=generator) for _ in range(2))
    size = group_size_of(columns, groups)
    tensors = IntegerWeight(codes, scales, zeros, -24, bits, size).tensors(torch.bfloat16)
    there = dense_weight({key: value.to(DEVICE) for key, value in tensors.items()}, columns)
    assert there.device.type == DEVICE
    here = dense_weight(tensors, columns)
    # Scales, powers of two, and zero points, quotients, are each computed to a last bit of their own: where a code is its zero
    # point, one weight is zero and the other what rounding left.
    nothing = 2**-20 * float(here.abs().max())
    torch.testing.assert_close(there.cpu(), here, rtol=2**-7, atol=nothing)
    assert torch.isclose(there.cpu(), here, rtol=0, atol=nothing).float().mean() > 0.999


def test_an_offloaded_step_is_a_resident_one(tmp_path: Path) -> None:
    """Weights come over a stream of their own, the next block's while one computes; the same numbers."""
    pytest.importorskip("ruamel.yaml", reason="opening a directory reads YAML")
    from emloc_ray.modeling.holding import open_model

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
            call = model_call(base.config, batch_on(DEVICE), "all").to(base.device)
            loss = call_loss(model, call, base).loss_sum
            loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
