"""Sums ``S = Σ g gᵀ`` of the gradients of a linear's outputs, gathered in the model's own backward pass.

The loss is that of labels drawn from the model's own predictions (:func:`emloc_ray.modeling.loss.sampled_loss`), so that
``S`` is a factor of their Fisher matrix: see :mod:`emloc_ray.core.two_sided`. No weight has a gradient, and blocks are run
again in the backward pass rather than kept, so that it needs little more memory than a forward pass.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from emloc_ray.core.gram import Gram
from emloc_ray.modeling.architecture import block_names
from emloc_ray.modeling.gram_hooks import TokenSums
from emloc_ray.modeling.inputs import Stream, model_call
from emloc_ray.modeling.loss import sampled_loss

_FLOAT16_SCALE = 2.0**10  # of the loss: gradients of a single token's logits would often be zero there
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that rows' seeds differ (Steele, Lea and Flood 2014)


class GradientHooks(TokenSums):
    """One sum of ``g gᵀ (out, out)`` for each linear, over the tokens that its Gram counts.

    ``loss_on`` are the tokens whose predictions matter; ``seed`` is that of the labels that are drawn for them. An
    offloaded model runs its blocks again by itself: without ``checkpointing``.
    """

    grams: dict[str, Gram]
    summed = "Gradients of what {} gives"

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
        super().__init__(model, streams)
        self.loss_on, self.seed = loss_on, seed
        self._scale = _FLOAT16_SCALE if model.dtype == torch.float16 else 1.0
        for name in names:
            module = model.get_submodule(name)
            out_features = module.out_features if isinstance(module, nn.Linear) else module.weight.shape[1]
            self.grams[name] = Gram.zero(out_features, device=module.weight.device)
            self._handles.append(module.register_forward_hook(self._hook(name)))
        self._blocks = [model.get_submodule(name) for name in block_names(model)] if checkpointing else []
        for block in self._blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def _hook(self, name: str) -> Any:
        experts = self._experts_of(name)

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # What the model reads has no gradient: the first linears' outputs are where the backward pass ends.
            watched = output if output.requires_grad else output.detach().requires_grad_().clone()
            sent = None if experts is None else experts.rows
            watched.register_hook(functools.partial(self._add_gradient, name, sent))
            return None if watched is output else watched

        return watch

    def _add_gradient(self, name: str, sent: Tensor | None, gradient: Tensor) -> None:
        if self._scale != 1.0:
            gradient = gradient.to(self.grams[name].matrix.dtype) / self._scale
        self._add(name, gradient, sent)

    def forward(self, batch: dict[str, Tensor], tokens: str, positions: Sequence[int]) -> None:
        """Adds the tokens of a batch that count: ``all`` but padding, or those of the ``completion``. ``positions`` are its
        rows' places in the whole sample, which their labels' seeds are made of."""
        # Different for every row and seed, whatever batch or worker a row is in.
        draws = [Generator().manual_seed((self.seed * _SEED_STEP + p + 1) % 2**63) for p in positions]
        with self.counting(model_call(self.model.config, batch, tokens=tokens).counted), torch.enable_grad():
            (sampled_loss(self.model, batch, self.loss_on, draws).loss_sum * self._scale).backward()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        super().remove()
        for block in self._blocks:
            del block.forward
