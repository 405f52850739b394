"""What sums cost beside the passes that they are gathered in: a block's forward pass with Grams, and its backward with
gradients' sums."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import llama_config, random_batch, random_llama
from emloc_ray.core.gram import Gram
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.packing import packs_known

_VOCABULARY = 256  # so that a block is nearly all of its model


class _WithoutSums(GradientHooks):
    """The same pass, hooks and all, that adds nothing."""

    def _add(self, name: str, tokens: Tensor, sent: Tensor | None) -> None:
        pass


def blocks(session: Session) -> None:
    """One block of the model's shape, then one of a large model's."""
    for name, values in (("the model's", session.shapes.model), ("a large model's", session.shapes.large)):
        figures = session.measure("blocks", f"{name} block", 30, functools.partial(_block, session, values))
        forward, backward = "s (baseline: the forward pass alone)", "s (baseline: forward and backward alone)"
        sides = figures.get("with_grams_s"), figures.get("forward_s")
        session.compare("blocks", f"{name} block with Grams", *sides, forward)
        sides = figures.get("with_gradient_sums_s"), figures.get("backward_s")
        session.compare("blocks", f"{name} block with sums of gradients", *sides, backward)
    if session.is_cuda:
        width = session.shapes.model["intermediate_size"]
        session.measure("blocks", f"a Gram of {width} by one product", 5, lambda: _one_product(session, width))


def _block(session: Session, values: dict[str, int]) -> dict[str, Any]:
    config = llama_config(values, num_hidden_layers=1, vocab_size=_VOCABULARY)
    bare = empty_model(config)
    specs = block_linears(bare)
    groups = trace_inputs(bare, specs).groups
    model = random_llama(config, session.device)
    batch = random_batch(session.shapes.rows, session.shapes.length, _VOCABULARY, torch.device("cpu"))
    inputs = {"input_ids": batch["input_ids"].to(session.device)}
    positions = range(session.shapes.rows)

    @torch.no_grad()
    def forward() -> None:
        with packs_known(inputs):
            model.model(**inputs, use_cache=False)

    figures: dict[str, Any] = {"tokens": session.shapes.tokens, "forward_s": session.timed(forward)}
    grams = GramHooks(model, groups)
    figures["with_grams_s"] = session.timed(lambda: grams.forward(batch))
    figures |= _peaks(session, "with_grams")
    figures["grams_bytes"] = sum(gram.matrix.nbytes for gram in grams.grams.values())
    grams.remove()
    grams.grams.clear()
    session.give_back()
    for name, kind in (("backward", _WithoutSums), ("with_gradient_sums", GradientHooks)):
        hooks = kind(model, [spec.name for spec in specs], loss_on="all")
        figures[f"{name}_s"] = session.timed(functools.partial(hooks.forward, batch, "all", positions))
        figures |= _peaks(session, name)
        hooks.remove()
        hooks.grams.clear()
        session.give_back()
    figures["grams_share"] = 1 - figures["forward_s"] / figures["with_grams_s"]
    figures["gradient_sums_share"] = 1 - figures["backward_s"] / figures["with_gradient_sums_s"]
    return figures


def _peaks(session: Session, name: str) -> dict[str, int]:
    """Of the pass that ``name`` says: read before memory is given back, which resets them."""
    return {f"{name}_{key}": value for key, value in session.peaks().items()}


def _one_product(session: Session, width: int) -> dict[str, Any]:
    """``XᵀX`` of bfloat16 tokens with float32 sums, in one product, beside the blocks of a :class:`Gram` in float32."""
    x = torch.randn(session.shapes.tokens, width, device=session.device, dtype=torch.bfloat16)
    gram = Gram.zero(width, device=session.device)
    one = torch.mm(x.T, x, out_dtype=torch.float32)
    exact = x[:, :256].double().T @ x[:, :256].double()
    gram.update(x)

    def error(matrix: Tensor) -> float:
        lower = torch.tril(matrix[:256, :256].double() - exact)
        return float(torch.linalg.vector_norm(lower) / torch.linalg.vector_norm(exact))

    figures = {"one_product_error": error(one), "in_blocks_error": error(gram.matrix)}
    figures["in_blocks_s"] = session.timed(lambda: gram.update(x))
    figures["one_product_s"] = session.timed(lambda: torch.mm(x.T, x, out_dtype=torch.float32))
    return figures
