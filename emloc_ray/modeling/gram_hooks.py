"""Gram accumulation inside a model's own forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.gram import Gram
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.inputs import Stream, model_call


class GramHooks:
    """One Gram per group of linears that read the same tensor, gathered at the group's first linear.

    ``grams`` maps that linear's name to its sum; ``streams`` says which tokens it reads, where not those of the row.
    :meth:`forward` runs a batch through the model without its head.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[Sequence[str]],
        streams: Mapping[str, Stream] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.body = getattr(model, model.base_model_prefix, model)
        self.grams: dict[str, Gram] = {}
        self.streams = streams or {}
        self._counted: dict[
            Stream, Tensor
        ] = {}  # positions among the batch's tokens; all of a stream that is not named
        self._handles: list[Any] = []
        for group in groups:
            module = model.get_submodule(group[0])
            in_features = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            self.grams[group[0]] = Gram.zero(in_features, dtype, module.weight.device)
            self._handles.append(module.register_forward_pre_hook(self._hook(group[0])))

    def _hook(self, name: str) -> Any:
        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            counted = self._counted.get(self.streams.get(name, "row"))
            self.grams[name].update(tokens if counted is None else tokens[counted])

        return accumulate

    @contextlib.contextmanager
    def counting(self, counted: Mapping[Stream, Tensor]) -> Iterator[None]:
        """While it lasts, a pass of the model adds the tokens of each stream where ``counted (rows, length)`` is true."""
        # Found once a batch, not once a Gram.
        self._counted = {
            stream: mask.flatten().nonzero().squeeze(1) for stream, mask in counted.items() if not bool(mask.all())
        }
        try:
            yield
        finally:
            self._counted = {}

    @torch.no_grad()
    def forward(self, batch: dict[str, Tensor], tokens: str = "all") -> None:
        """Adds the tokens of a batch that count: ``all`` but padding, or those of the ``completion``."""
        call = model_call(self.model.config, batch, tokens=tokens)
        with self.counting(call.counted):
            self.body(**call.inputs, use_cache=False)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def check_finite(self) -> None:
        """Raises NumericsError, naming the layer, where an activation was NaN or Inf."""
        for name, gram in self.grams.items():
            if not bool(torch.isfinite(gram.matrix.diagonal()).all()):
                raise NumericsError(
                    f"Activations that {name} reads hold NaN or Inf: check the model's weights and dtype"
                    " (float16 overflows; try bfloat16 or float32)."
                )
