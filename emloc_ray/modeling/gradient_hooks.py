"""Sums ``S = Σ g gᵀ`` of the gradients of a linear's outputs, gathered in the model's own backward pass.

The loss is that of labels drawn from the model's own predictions (:func:`emloc_ray.modeling.loss.sampled_loss`), so that
``S`` is a factor of their Fisher matrix: see :mod:`emloc_ray.core.two_sided`. No weight has a gradient, and blocks are run
again in the backward pass rather than kept, so that it needs little more memory than a forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from emloc_ray.core.gram import Gram, not_finite
from emloc_ray.errors import NumericsError, StageError
from emloc_ray.modeling.architecture import block_names
from emloc_ray.modeling.experts import UnfusedExperts, owner_of
from emloc_ray.modeling.inputs import Stream, model_call
from emloc_ray.modeling.loss import sampled_loss

_FLOAT16_SCALE = 2.0**10  # of the loss: gradients of a single token's logits would often be zero there
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that rows' seeds differ (Steele, Lea and Flood 2014)


class GradientHooks:
    """One sum of ``g gᵀ (out, out)`` for each linear, over the tokens that its Gram counts.

    ``grams`` maps a linear's name to its sum, with the number of tokens that it ran on; ``streams`` says which tokens it
    reads, where not those of the row. Of an expert's linears the tokens count that were sent to the expert.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        streams: Mapping[str, Stream] | None = None,
        *,
        loss_on: str = "completion",
        seed: int = 0,
        checkpointing: bool = True,
    ) -> None:
        """``loss_on`` are the tokens whose predictions matter; ``seed`` is that of the labels that are drawn for them.

        An offloaded model runs its blocks again by itself: without ``checkpointing``.
        """
        self.model, self.loss_on, self.seed = model, loss_on, seed
        self.grams: dict[str, Gram] = {}
        self.streams = streams or {}
        self._scale = _FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
        # Which of the batch's tokens count, and their places; all of a stream that is not named.
        self._masks: dict[Stream, Tensor] = {}
        self._places: dict[Stream, Tensor] = {}
        self._handles: list[Any] = []
        for name in names:
            module = model.get_submodule(name)
            out_features = module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1]
            self.grams[name] = Gram.zero(out_features, device=module.weight.device)
            self._handles.append(module.register_forward_hook(self._hook(name)))
        self._blocks = [model.get_submodule(name) for name in block_names(model)] if checkpointing else []
        for block in self._blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def _hook(self, name: str) -> Any:
        owner = owner_of(name)
        experts = self.model.get_submodule(owner[0]) if owner else None
        stream = self.streams.get(name, "row")

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # What the model reads has no gradient: the first linears' outputs are where the backward pass ends.
            watched = output if output.requires_grad else output.detach().requires_grad_().clone()
            rows = experts.rows if isinstance(experts, UnfusedExperts) else None
            counted = self._counted(name, stream, rows, output[..., 0].numel())
            watched.register_hook(functools.partial(self._add, name, counted))
            return None if watched is output else watched

        return watch

    def _counted(self, name: str, stream: Stream, rows: Tensor | None, num_tokens: int) -> Tensor | None:
        """The places of a linear's tokens that count; None: all."""
        mask = self._masks.get(stream)
        if mask is None:
            return None
        known = len(mask) if rows is None else len(rows)
        if known != num_tokens:
            raise StageError(
                f"{name} reads {num_tokens} of a batch's {known} tokens, which ones is not known: set"
                " calibration.batch_size to 1 and calibration.tokens to all."
            )
        return self._places[stream] if rows is None else mask[rows].nonzero().squeeze(1)

    def _add(self, name: str, counted: Tensor | None, gradient: Tensor) -> None:
        tokens = gradient.reshape(-1, gradient.shape[-1])
        tokens = tokens if counted is None else tokens[counted]
        if self._scale != 1.0:
            tokens = tokens.to(self.grams[name].matrix.dtype) / self._scale
        self.grams[name].update(tokens)

    def forward(self, batch: dict[str, Tensor], tokens: str, positions: Sequence[int]) -> None:
        """Adds the tokens of a batch that count: ``all`` but padding, or those of the ``completion``.

        ``positions`` are its rows' places in the whole sample, which their labels' seeds are made of.
        """
        counted, device = model_call(self.model.config, batch, tokens=tokens).counted, self.model.device
        masks = {stream: mask.flatten() for stream, mask in counted.items() if not bool(mask.all())}
        self._masks = {stream: mask.to(device) for stream, mask in masks.items()}
        self._places = {stream: mask.nonzero().squeeze(1).to(device) for stream, mask in masks.items()}
        draws = [Generator().manual_seed(_row_seed(self.seed, position)) for position in positions]
        try:
            with torch.enable_grad():
                (sampled_loss(self.model, batch, self.loss_on, draws).loss_sum * self._scale).backward()
        finally:
            self._masks, self._places = {}, {}

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            del block.forward

    def check_finite(self) -> None:
        """Raises NumericsError, naming the layer, where a gradient was NaN or Inf."""
        name = not_finite(self.grams)
        if name is not None:
            raise NumericsError(
                f"Gradients of what {name} gives hold NaN or Inf: check the model's weights and dtype"
                " (float16 overflows; try bfloat16 or float32)."
            )


def _row_seed(seed: int, position: int) -> int:
    """Different for every row and seed, whatever batch or worker a row is in."""
    return (seed * _SEED_STEP + position + 1) % 2**63
