"""The whole method on one tiny model, wherever its weights are: calibrate, factorize, train, correct, merge, score.

By ``core`` and ``modeling`` alone, so that a machine with a GPU needs neither Ray nor pydantic for it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.shapes import SHAPES, linears_of, llama_config, random_batch, random_llama, uniform_ranks
from torch import Tensor, nn

from emloc_ray.core.correction import apply_correction, canonical_form, clamp_columns, correction, difference
from emloc_ray.core.factorization import factorize
from emloc_ray.core.merging import merged_rows
from emloc_ray.core.products import product_by_rows
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.updates import LowRankUpdate
from emloc_ray.core.whitening import Whitening
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.emulator import factorize_modules
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import call_loss, token_loss

CONFIG = llama_config(SHAPES["tiny"].model)
R, ALPHA = 4, 8
STEPS = 4


def original() -> Any:
    """The same float32 weights every time, on the CPU."""
    torch.manual_seed(0)
    return random_llama(CONFIG, torch.device("cpu"), None, torch.float32)


def emulator() -> Any:
    """With a LoRA on every linear, the same every time, on the CPU, and blocks run again in the backward pass."""
    torch.manual_seed(0)
    specs = linears_of(CONFIG)
    model = random_llama(CONFIG, torch.device("cpu"), uniform_ranks(specs, 0.5, 8), torch.float32)
    return with_adapter(model).train()


def with_adapter(model: Any) -> Any:
    """A fresh LoRA on every linear in the blocks."""
    names = [spec.name for spec in linears_of(CONFIG)]
    model = attach_adapter(model, adapter_config(target_modules=names, r=R, lora_alpha=ALPHA))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def padded_batch(rows: int = 2) -> dict[str, Tensor]:
    """Of which the last row ends in padding; on the CPU, as batches are made."""
    return random_batch(rows, 96, CONFIG.vocab_size, torch.device("cpu"), padded=True)


def whole_method(move: Callable[[Any], Any]) -> dict[str, float]:
    """The loss of each variant, a label and in nats, and how far the adapters' update was corrected; ``move`` takes a module
    to where all of it is computed."""
    torch.manual_seed(0)
    model, batch = move(original()), padded_batch()
    grams, weights = _grams(model, batch), {}
    emulated = copy.deepcopy(original())
    ranks = uniform_ranks(linears_of(CONFIG), 0.5, 8)
    factorize_modules(emulated, ranks)
    emulated = move(emulated).requires_grad_(False)
    for name, rank in ranks.items():
        weight, layer = model.get_submodule(name).weight.detach(), emulated.get_submodule(name)
        factors = factorize(weight, Whitening(grams[name]), rank).factors
        layer.up.weight, layer.down.weight = (nn.Parameter(factor, requires_grad=False) for factor in factors)
        weights[name] = weight, StoredWeight(*factors)
    losses = {"original": loss_of(model, batch), "emulator": loss_of(emulated, batch)}
    torch.manual_seed(0)
    trained = move(with_adapter(emulated)).train()
    _train(trained, batch)
    losses["emulator_adapter"] = loss_of(trained.eval(), batch)
    change = 0.0
    for name, (weight, stored) in weights.items():
        layer = trained.get_base_model().get_submodule(name)
        lora_a, lora_b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        form, scale = canonical_form(lora_a, lora_b), ALPHA / R
        seen = difference(weight, stored, form.q, product_by_rows(grams[name], form.q))
        taken = clamp_columns(correction(seen, "covariance", scale), form.b, 3.0)
        corrected = apply_correction(form, taken, R)
        change += float(torch.linalg.norm(taken))
        merged = merged_rows(weight, LowRankUpdate(*corrected, scale))
        model.get_submodule(name).weight = nn.Parameter(merged, requires_grad=False)
    return {**losses, "merged": loss_of(model, batch), "correction": change}


@torch.no_grad()
def loss_of(model: Any, batch: dict[str, Tensor]) -> float:
    """In nats a label."""
    result = token_loss(model, batch, "all")
    return float(result.loss_sum) / result.num_tokens


def _grams(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Gram of each linear."""
    bare = empty_model(CONFIG)
    groups = trace_inputs(bare, block_linears(bare)).groups
    hooks = GramHooks(model, groups)
    hooks.forward(batch)
    hooks.remove()
    return {name: hooks.grams[group[0]].symmetric() for group in groups for name in group}


def _train(model: Any, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(STEPS):
        result = token_loss(model, batch, "all")
        (result.loss_sum / result.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_alone(device: str) -> dict[str, Tensor]:
    """The emulator's adapter after some steps on one batch."""
    model = emulator().to(device)
    return _steps(model, model, padded_batch(rows=4), 0, 1)


def trained_by_group(devices: Sequence[str], root: Path) -> dict[str, Tensor]:
    """The same by a process a device, which share out the batch's rows, as DDP."""
    context: Any = torch.multiprocessing.get_context("spawn")  # one that has used CUDA or autograd cannot be forked
    ranks = [context.Process(target=_train_rank, args=(rank, devices, root)) for rank in range(len(devices))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * len(ranks)
    return torch.load(root / "adapter.pt")


def _train_rank(rank: int, devices: Sequence[str], root: Path) -> None:
    torch.set_num_threads(1)
    device, world = torch.device(devices[rank]), len(devices)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if is_cuda else "gloo", init_method=f"file://{root / 'group'}", rank=rank, world_size=world
    )
    model = emulator().to(device)
    wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[device] if is_cuda else None)
    adapter = _steps(model, wrapped, padded_batch(rows=4), rank, world)
    if rank == 0:
        torch.save(adapter, root / "adapter.pt")
    torch.distributed.barrier()
    # Without destructors: that of DDP's reducer may hold the GIL while it joins a thread of gloo that waits for the GIL.
    os._exit(0)


def _steps(model: Any, wrapped: Any, batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    total = len(model_call(CONFIG, batch, "all").targets)
    call = model_call(CONFIG, {key: value[rank::world] for key, value in batch.items()}, "all").to(model.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(STEPS):
        (call_loss(wrapped, call, model).loss_sum * world / total).backward()  # DDP takes the mean over ranks
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().cpu() for name, p in trained.items()}
