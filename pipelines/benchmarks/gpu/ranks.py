"""Ranks as the formula gives them against multiples of 8 and 64: single products, and a block's step."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.plan import R
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import linears_of, llama_config, random_batch, random_llama, uniform_ranks
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config

_RATIO = 0.47  # of which no rank of these shapes is a multiple of 8 by chance
_VOCABULARY = 256  # so that a block is nearly all of its model


def ranks(session: Session) -> None:
    """The products of some linears, then a step of one block with ranks of a kind each."""
    part, multiples = "ranks", dict.fromkeys((1, 8, session.shapes.multiple))
    for shape in session.shapes.linears[:3]:
        name = f"{shape[0]} × {shape[1]}"
        products = session.measure(part, f"products of {name}", 5, functools.partial(_products, session, *shape))
        odd, even = (products.get(f"multiple of {multiple}") for multiple in (1, session.shapes.multiple))
        if odd and even:
            unit = "ns a rank and token (baseline: the formula's rank)"
            session.compare(part, f"products of {name}", even["ns"], odd["ns"], unit)
    steps = {}
    for multiple in multiples:
        case = f"a block's step, ranks multiples of {multiple}"
        steps[multiple] = session.measure(part, case, 8, functools.partial(_block_step, session, multiple))
    even, odd = (steps[multiple].get("step_s") for multiple in (session.shapes.multiple, 1))
    session.compare(part, "a block's step, ranks aligned", even, odd, "s (baseline: the formula's ranks)")


def _products(session: Session, out_features: int, in_features: int) -> dict[str, Any]:
    """``up (down x)`` in bfloat16, at the formula's rank and below it at multiples."""
    rank = rank_for_ratio(out_features, in_features, _RATIO) or 1
    tokens = session.shapes.tokens
    options: Any = {"device": session.device, "dtype": torch.bfloat16}
    x = torch.randn(tokens, in_features, **options)
    figures: dict[str, Any] = {}
    for multiple in dict.fromkeys((1, 8, session.shapes.multiple)):
        r = max(rank // multiple, 1) * multiple
        down, up = torch.randn(r, in_features, **options), torch.randn(out_features, r, **options)
        both = functools.partial(_both, x, down, up)
        seconds = session.timed(both, 4 * session.shapes.repeats)
        rate = 2 * tokens * r * (out_features + in_features) / seconds / 1e12
        figures[f"multiple of {multiple}"] = {
            "rank": r,
            "s": seconds,
            "ns": seconds / r / tokens * 1e9,
            "tflop_per_s": rate,
        }
    return figures


def _both(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, down), up)


def _block_step(session: Session, multiple: int) -> dict[str, Any]:
    config = llama_config(session.shapes.model, num_hidden_layers=1, vocab_size=_VOCABULARY)
    specs = linears_of(config)
    ranks = uniform_ranks(specs, _RATIO, multiple)
    model = random_llama(config, session.device, ranks)
    targets = [spec.name for spec in specs]
    adapted = attach_adapter(model, adapter_config(target_modules=targets, r=R, lora_alpha=2 * R)).train()
    inner: Any = adapted.get_base_model().model
    batch = random_batch(session.shapes.rows, session.shapes.length, _VOCABULARY, session.device)

    def step() -> None:
        with torch.autocast(session.device.type, torch.bfloat16):
            hidden = inner(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()

    return {"ranks": sorted(set(ranks.values())), "step_s": session.timed(step), **session.peaks()}
