"""Gram accumulation inside a model's own forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.gram import Gram, not_finite
from emloc_ray.errors import NumericsError, StageError
from emloc_ray.modeling.experts import UnfusedExperts, owner_of
from emloc_ray.modeling.inputs import Stream, model_call


class GramHooks:
    """One Gram per group of linears that read the same tensor, gathered at the group's first linear.

    ``grams`` maps that linear's name to its sum; ``streams`` says which tokens it reads, where not those of the row.
    :meth:`forward` runs a batch through the model without its head. Of an expert's linears the tokens count that were sent
    to the expert, or with ``reread`` all tokens, which are run through it as well.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[Sequence[str]],
        streams: Mapping[str, Stream] | None = None,
        reread: bool = False,
    ) -> None:
        self.model = model
        self.body = getattr(model, model.base_model_prefix, model)
        self.grams: dict[str, Gram] = {}
        self.streams = streams or {}
        # Which of the batch's tokens count, and their positions; all of a stream that is not named.
        self._masks: dict[Stream, Tensor] = {}
        self._counted: dict[Stream, Tensor] = {}
        self._handles: list[Any] = []
        for group in groups:
            module = model.get_submodule(group[0])
            in_features = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            self.grams[group[0]] = Gram.zero(in_features, device=module.weight.device)
            self._handles.append(module.register_forward_pre_hook(self._hook_of(group[0], reread)))
        # Of a model that is held block by block the first parameter may be on the meta device.
        self.device = next((gram.matrix.device for gram in self.grams.values()), model.device)

    def _hook_of(self, name: str, reread: bool) -> Any:
        owner = owner_of(name)
        experts = self.model.get_submodule(owner[0]) if owner else None
        if owner is None or not isinstance(experts, UnfusedExperts):
            return self._hook(name)
        if reread:
            experts.reread |= {owner[1]}
        return self._expert_hook(name, experts, reread)

    def _hook(self, name: str) -> Any:
        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            stream = self.streams.get(name, "row")
            if stream in self._masks and len(tokens) != len(self._masks[stream]):
                raise StageError(
                    f"{name} reads {len(tokens)} of a batch's {len(self._masks[stream])} tokens, which ones is not known: set"
                    " calibration.batch_size to 1 and calibration.tokens to all."
                )
            counted = self._counted.get(stream)
            self.grams[name].update(tokens if counted is None else tokens[counted])

        return accumulate

    def _expert_hook(self, name: str, experts: UnfusedExperts, reread: bool) -> Any:
        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if experts.rereading != reread:
                return
            tokens, stream = args[0], self.streams.get(name, "row")
            if stream in self._masks:
                read = self._counted[stream] if experts.rows is None else self._masks[stream][experts.rows]
                tokens = tokens[read]
            self.grams[name].update(tokens)

        return accumulate

    @contextlib.contextmanager
    def counting(self, counted: Mapping[Stream, Tensor]) -> Iterator[None]:
        """While it lasts, a pass of the model adds the tokens of each stream where ``counted (rows, length)`` is true."""
        # Found once a batch, not once a Gram, and where the masks are: on the CPU.
        masks = {stream: mask.flatten() for stream, mask in counted.items() if not bool(mask.all())}
        self._masks = {stream: mask.to(self.device) for stream, mask in masks.items()}
        self._counted = {stream: mask.nonzero().squeeze(1).to(self.device) for stream, mask in masks.items()}
        try:
            yield
        finally:
            self._masks, self._counted = {}, {}

    @torch.no_grad()
    def forward(self, batch: dict[str, Tensor], tokens: str = "all") -> None:
        """Adds the tokens of a batch that count: ``all`` but padding, or those of the ``completion``."""
        call = model_call(self.model.config, batch, tokens=tokens)
        with self.counting(call.counted):
            self.body(**call.to(self.device).inputs, use_cache=False)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            if isinstance(module, UnfusedExperts):
                module.reread = frozenset()

    def check_finite(self) -> None:
        """Raises NumericsError, naming the layer, where an activation was NaN or Inf."""
        name = not_finite(self.grams)
        if name is not None:
            raise NumericsError(
                f"Activations that {name} reads hold NaN or Inf: check the model's weights and dtype"
                " (float16 overflows; try bfloat16 or float32)."
            )
