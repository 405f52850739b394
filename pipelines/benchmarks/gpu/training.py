"""A training step of an emulator, beside LoRA on the original in 16 and in 4 bits; and within a smaller card's memory."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig

from benchmarks.gpu.plan import R, planned_bytes
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import (
    RATIO,
    fill_randomly,
    linears_of,
    llama_config,
    random_batch,
    random_llama,
    uniform_ranks,
)
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.inputs import ModelCall, model_call
from emloc_ray.modeling.loss import call_loss

GIB = 2**30
CARD = 24 * GIB
_MARGIN = 0.08  # of a card's memory that is not planned: the context, what the allocator cannot put together
_BY_STEP = "s a micro-step (baseline: plain PEFT LoRA on the original)"


def training(session: Session) -> None:
    """The emulator with and without autocast and a mask, and in integers; LoRA on the original with our loss, with
    transformers', and on NF4."""
    cases: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        "emulator": (20, lambda: emulator_step(session)),
        "plain LoRA on the original": (25, lambda: original_step(session, plain=True)),
        "emulator, no autocast": (25, lambda: emulator_step(session, autocast=False)),
        "emulator, with a mask": (20, lambda: emulator_step(session, masked=True)),
        "inference of the original": (15, lambda: inference(session)),
        "LoRA on the original, loss in chunks": (25, lambda: original_step(session)),
        "LoRA on the original in NF4": (35, lambda: original_step(session, in_4bit=True)),
        "in 4 bits under the Grams": (20, lambda: emulator_step(session, bits=4)),
        "in 2 bits under the Grams": (20, lambda: emulator_step(session, bits=2)),
    }
    measured = {name: session.measure("training", name, *case) for name, case in cases.items()}
    ours, plain = measured["emulator"], measured["plain LoRA on the original"]
    for name, other in measured.items():
        if other is not plain:
            session.compare("training", name, other.get("micro_step_s"), plain.get("micro_step_s"), _BY_STEP)
    if "reserved_bytes" in ours:
        unit = "GiB (baseline: planned)"
        session.compare("training", "emulator, peak", ours["reserved_bytes"] / GIB, ours["planned_bytes"] / GIB, unit)
        bare = measured["inference of the original"].get("reserved_bytes", 0)
        unit = "GiB (baseline: inference of the original)"
        session.compare("training", "emulator, peak beside inference", ours["reserved_bytes"] / GIB, bare / GIB, unit)


def emulator_step(
    session: Session,
    *,
    rows: int | None = None,
    autocast: bool = True,
    masked: bool = False,
    repeats: int | None = None,
    bits: int | None = None,
) -> dict[str, Any]:
    """Of the emulator at uniform, aligned ranks, or of whole weights in so many ``bits``, with the product's own layers,
    adapter and loss; ``masked``: with the mask of a padded row, which the product leaves out."""
    config, rows = llama_config(session.shapes.model), rows or session.shapes.rows
    specs = linears_of(config)
    ranks = {} if bits else uniform_ranks(specs, RATIO, session.shapes.multiple)
    integers = {spec.name: bits for spec in specs} if bits else {}
    model = random_llama(config, session.device, ranks, bits=integers)
    model = attach_adapter(model, adapter_config(target_modules=[s.name for s in specs], r=R, lora_alpha=2 * R))
    batch = random_batch(rows, session.shapes.length, config.vocab_size, torch.device("cpu"), padded=masked)
    call = model_call(config, batch, "all")
    if masked:
        call = replace(call, inputs={**call.inputs, "attention_mask": batch["attention_mask"]})
    numbers = [s.num_parameters if bits else ranks[s.name] * (s.out_features + s.in_features) for s in specs]
    measured = _steps(session, model, call, _head(config) + sum(numbers), autocast, repeats)
    return {**measured, "planned_bytes": planned_bytes(config, ranks, rows, session.shapes.length, integers)}


def inference(session: Session) -> dict[str, Any]:
    """A pass of the original over one row, with the logits of its last token."""
    config = llama_config(session.shapes.model)
    model = random_llama(config, session.device)
    ids = random_batch(1, session.shapes.length, config.vocab_size, session.device)["input_ids"]
    with torch.no_grad():
        seconds = session.timed(lambda: model(input_ids=ids, logits_to_keep=1))
    return {"s": seconds, "tokens": ids.numel(), **session.peaks()}


def original_step(session: Session, *, plain: bool = False, in_4bit: bool = False) -> dict[str, Any]:
    """Of the original; ``plain``: by PEFT and transformers alone, all logits at once."""
    config = llama_config(session.shapes.model)
    specs = linears_of(config)
    names = [spec.name for spec in specs]
    weights = _head(config) + sum(spec.num_parameters for spec in specs)
    model = _in_nf4(config, names, session.device) if in_4bit else random_llama(config, session.device)
    adapter = adapter_config(target_modules=names, r=R, lora_alpha=2 * R)
    model = get_peft_model(model, adapter) if plain or in_4bit else attach_adapter(model, adapter)
    batch = random_batch(session.shapes.rows, session.shapes.length, config.vocab_size, torch.device("cpu"))
    measured = _steps(session, model, model_call(config, batch, "all"), weights, plain=plain)
    if not in_4bit:
        measured["planned_bytes"] = planned_bytes(config, {}, session.shapes.rows, session.shapes.length)
    return measured


def _head(config: LlamaConfig) -> int:
    return int(config.vocab_size * config.hidden_size)


def _steps(
    session: Session,
    model: Any,
    call: ModelCall,
    num_weights: int,
    autocast: bool = True,
    repeats: int | None = None,
    plain: bool = False,
) -> dict[str, Any]:
    """A micro-step (forward, blocks again, backward) and a whole step (one micro-step, clipping, AdamW), warmed; the call was
    made on the CPU, as in training. ``plain``: with all logits at once, and transformers' own loss."""
    call = call.to(session.device)
    ids = call.inputs["input_ids"]

    def loss() -> torch.Tensor:
        if plain:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
        result = call_loss(model, call, model)
        return result.loss_sum / result.num_tokens

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=session.is_cuda)

    def micro_step() -> torch.Tensor:
        with torch.autocast(session.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            value = loss()
        value.backward()
        return value.detach()

    def step() -> None:
        micro_step()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    whole = session.timed(step, repeats)
    micro = session.timed(micro_step, repeats)
    tokens = ids.numel()
    return {
        "tokens": tokens,
        "micro_step_s": micro,
        "step_s": whole,
        "tokens_per_s": tokens / micro,
        # 2 a weight and token on each pass: forward, forward again, backward; attention and the adapter are left out.
        "tflop_per_s": 6 * num_weights * tokens / micro / 1e12,
        "loss": float(micro_step()),
        "masked": call.inputs["attention_mask"] is not None,
        **({"host_syncs": host_syncs(micro_step)} if session.is_cuda else {}),
        **session.peaks(),
    }


def host_syncs(action: Callable[[], Any]) -> int:
    """How often the host waits for the GPU in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def _in_nf4(config: LlamaConfig, names: list[str], device: torch.device) -> Any:
    """The original with linears as QLoRA holds them, each quantized as it is made; raises ImportError without bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    bare = random_llama(config, torch.device("meta"))
    shapes = {name: bare.get_submodule(name).weight.shape for name in names}
    for name in names:
        bare.set_submodule(name, nn.Identity())
    model = bare.to_empty(device=device)
    fill_randomly(model)
    options = {"compute_dtype": torch.bfloat16, "compress_statistics": True, "quant_type": "nf4"}
    for name, (out_features, in_features) in shapes.items():
        layer = Linear4bit(in_features, out_features, bias=False, device="meta", **options)
        weight = torch.empty(out_features, in_features, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        packed: Any = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        layer.weight = packed.to(device)
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True  # what PEFT goes by
    return model


def smaller_card(session: Session) -> None:
    """The emulator's step in 24 GiB: with the rows that the plan says fit, then with more until they do not."""
    config = llama_config(session.shapes.model)
    ranks = uniform_ranks(linears_of(config), RATIO, session.shapes.multiple)
    length, limit = session.shapes.length, CARD * (1 - _MARGIN)
    planned = max((n for n in range(1, 65) if planned_bytes(config, ranks, n, length) <= limit), default=1)
    card = CARD
    if session.is_cuda:
        free, total = torch.cuda.mem_get_info(session.device)
        card -= max(0, total - free - torch.cuda.memory_reserved(session.device))  # its context, which no limit counts
        torch.cuda.set_per_process_memory_fraction(min(1.0, card / total), session.device)
    sizes = (planned, planned * 3 // 2, planned * 2) if session.is_cuda else (1, 2)
    try:
        for rows in sorted(set(sizes)):
            case = f"{rows} rows, {'within the plan' if rows <= planned else 'beyond the plan'}"
            if not session.measure("24 GiB", case, 10 + rows, functools.partial(_on_card, session, rows, card)).get(
                "passed"
            ):
                break
    finally:
        if session.is_cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, session.device)


def _on_card(session: Session, rows: int, card: int) -> dict[str, Any]:
    """Whether the step of so many rows stays within the card's bytes, and its figures."""
    try:
        figures = emulator_step(session, rows=rows, repeats=2)
    except torch.OutOfMemoryError:
        return {"passed": False, **session.peaks()}
    return {**figures, "passed": figures.get("reserved_bytes", 0) <= card}
