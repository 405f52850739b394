"""Gram accumulation inside a model's own forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.gram import Gram
from emloc_ray.errors import NumericsError, StageError
from emloc_ray.modeling.experts import UnfusedExperts, owner_of


def model_inputs(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """A batch as a model takes it: no mask where nothing is padding, so that attention takes its fastest path."""
    return {"input_ids": input_ids, "attention_mask": None if bool(attention_mask.all()) else attention_mask}


class GramHooks:
    """One Gram per group of linears that read the same tensor, gathered at the group's first linear.

    ``grams`` maps that linear's name to its sum; :meth:`forward` runs a batch through the model without its head. Of an
    expert's linears the tokens count that were sent to the expert, or with ``reread`` all tokens, run through it as well.
    """

    def __init__(
        self, model: Any, groups: Sequence[Sequence[str]], dtype: torch.dtype = torch.float32, reread: bool = False
    ) -> None:
        self.model = model
        self.body = getattr(model, model.base_model_prefix, model)
        self.grams: dict[str, Gram] = {}
        self._counts: Tensor | None = None  # whether each of the batch's tokens does; None: all do
        self._counted: Tensor | None = None  # their positions
        self._handles: list[Any] = []
        for group in groups:
            module = model.get_submodule(group[0])
            in_features = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            self.grams[group[0]] = Gram.zero(in_features, dtype, module.weight.device)
            owner = owner_of(group[0])
            experts = model.get_submodule(owner[0]) if owner else None
            if owner is not None and isinstance(experts, UnfusedExperts):
                experts.reread |= {owner[1]} if reread else set()
                hook = self._expert_hook(group[0], experts, reread)
            else:
                hook = self._hook(group[0])
            self._handles.append(module.register_forward_pre_hook(hook))

    def _hook(self, name: str) -> Any:
        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            if self._counts is not None and len(tokens) != len(self._counts):
                raise StageError(
                    f"{name} reads {len(tokens)} of a batch's {len(self._counts)} tokens, which ones is not known: set"
                    " calibration.batch_size to 1 and calibration.tokens to all."
                )
            self.grams[name].update(tokens if self._counted is None else tokens[self._counted])

        return accumulate

    def _expert_hook(self, name: str, experts: UnfusedExperts, reread: bool) -> Any:
        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if experts.rereading != reread:
                return
            tokens, rows = args[0], experts.rows
            if self._counts is not None:
                tokens = tokens[self._counted] if rows is None else tokens[self._counts[rows]]
            self.grams[name].update(tokens)

        return accumulate

    @contextlib.contextmanager
    def counting(self, counted: Tensor) -> Iterator[None]:
        """While it lasts, a pass of the model adds the tokens where ``counted (rows, length)`` is true."""
        # Found once a batch, not once a Gram.
        if not bool(counted.all()):
            self._counts = counted.flatten()
            self._counted = self._counts.nonzero().squeeze(1)
        try:
            yield
        finally:
            self._counts = self._counted = None

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, counted: Tensor) -> None:
        """Adds the tokens of a batch where ``counted (rows, length)`` is true."""
        with self.counting(counted):
            self.body(**model_inputs(input_ids, attention_mask), use_cache=False)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            if isinstance(module, UnfusedExperts):
                module.reread = frozenset()

    def check_finite(self) -> None:
        """Raises NumericsError, naming the layer, where an activation was NaN or Inf."""
        for name, gram in self.grams.items():
            if not bool(torch.isfinite(gram.matrix.diagonal()).all()):
                raise NumericsError(
                    f"Activations that {name} reads hold NaN or Inf: check the model's weights and dtype"
                    " (float16 overflows; try bfloat16 or float32)."
                )
