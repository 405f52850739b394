"""Gram accumulation inside a model's own forward pass."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.gram import Gram, GramColumns, TokenSum, not_finite
from emloc_ray.errors import NumericsError, StageError
from emloc_ray.modeling.experts import UnfusedExperts, owner_of
from emloc_ray.modeling.inputs import Stream, model_call, on_device
from emloc_ray.modeling.packing import packs_known


class TokenSums:
    """Sums over the tokens of a model's batches, gathered by hooks: ``grams`` by linear, ``streams`` says which tokens it
    reads, where not those of the row. Of an expert's linears the tokens count that were sent to the expert."""

    summed = ""  # what went into the sum of a linear, for the error
    grams: Mapping[str, TokenSum]

    def __init__(self, model: Any, streams: Mapping[str, Stream] | None) -> None:
        self.model = model
        self.grams = {}
        self._streams = streams or {}
        # Which of the batch's tokens count, and their places; all of a stream that is not named.
        self._masks: dict[Stream, Tensor] = {}
        self._places: dict[Stream, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def device(self) -> torch.device:
        """Where the sums are: of a model that is held block by block the first parameter may be on the meta device."""
        return next((gram.matrix.device for gram in self.grams.values()), self.model.device)

    @contextlib.contextmanager
    def counting(self, counted: Mapping[Stream, Tensor]) -> Iterator[None]:
        """While it lasts, a pass of the model adds the tokens of each stream where ``counted`` is true."""
        # Asked once a batch, not once a Gram, and where the masks are: on the CPU.
        self._masks = {stream: mask.flatten() for stream, mask in counted.items() if not bool(mask.all())}
        self._places = {
            stream: on_device(mask.nonzero().squeeze(1), self.device) for stream, mask in self._masks.items()
        }
        try:
            yield
        finally:
            self._masks, self._places = {}, {}

    def _experts_of(self, name: str) -> UnfusedExperts | None:
        """The experts of which the linear is a part, if it is of any."""
        owner = owner_of(name)
        experts = self.model.get_submodule(owner[0]) if owner else None
        return experts if isinstance(experts, UnfusedExperts) else None

    def _add(self, name: str, tokens: Tensor, sent: Tensor | None) -> None:
        """Adds those of ``tokens (..., features)`` that count; ``sent`` are the places in the batch of those that an expert
        was sent, on the CPU, None where it runs on all."""
        tokens, stream = tokens.reshape(-1, tokens.shape[-1]), self._streams.get(name, "row")
        mask = self._masks.get(stream)
        # Beside patches an image brings others: those that its tower joins, or a resampler makes.
        if mask is None or (stream == "other" and len(mask) != len(tokens)):
            return self.grams[name].update(tokens)
        known = len(mask) if sent is None else len(sent)
        if known != len(tokens):
            raise StageError(
                f"{name} reads {len(tokens)} of a batch's {known} tokens, and which ones is not known: set"
                " calibration.batch_size to 1 and calibration.tokens to all."
            )
        if sent is None:
            return self.grams[name].update(tokens[self._places[stream]])
        places = mask[sent].nonzero().squeeze(1)
        return self.grams[name].update(tokens[on_device(places, tokens.device)])

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def check_finite(self) -> None:
        """Raises NumericsError, naming the layer, where a NaN or an Inf was summed."""
        name = not_finite(self.grams)
        if name is not None:
            raise NumericsError(
                f"{self.summed.format(name)} hold NaN or Inf: check the model's weights and dtype"
                " (float16 overflows; try bfloat16 or float32)."
            )


class _HeadReached(Exception):
    """Ends a pass at the head."""


@contextlib.contextmanager
def _ending_at(head: nn.Module | None) -> Iterator[None]:
    """While it lasts, a pass ends before the head runs, at its first call."""
    if head is None:
        yield
        return

    def end(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _HeadReached

    handle = head.register_forward_pre_hook(end)
    try:
        with contextlib.suppress(_HeadReached):
            yield
    finally:
        handle.remove()


class ForwardSums(TokenSums):
    """Sums of what linears read, by :meth:`forward` alone: it runs a batch through the model without its head."""

    summed = "Activations that {} reads"

    def __init__(self, model: Any, streams: Mapping[str, Stream] | None) -> None:
        super().__init__(model, streams)
        self.body = getattr(model, model.base_model_prefix, model)
        # The prefix may name nothing (T5, Llama 4): then the body is the model, with a head to stop at.
        self._head = model.get_output_embeddings() if self.body is model else None

    def _hook(self, name: str, reread: bool) -> Any:
        experts, owner = self._experts_of(name), owner_of(name)
        if reread and experts is not None and owner is not None:
            experts.reread |= {owner[1]}

        def accumulate(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if experts is None or experts.rereading == reread:
                self._add(name, args[0], None if experts is None else experts.rows)

        return accumulate

    @torch.no_grad()
    def forward(self, batch: dict[str, Tensor], tokens: str = "all") -> None:
        """Adds the tokens of a batch that count: ``all`` but padding, or those of the ``completion``."""
        call = model_call(self.model.config, batch, tokens=tokens)
        with self.counting(call.counted), packs_known(call.inputs), _ending_at(self._head):
            self.body(**call.to(self.device).inputs, use_cache=False)

    def remove(self) -> None:
        """Takes the hooks off the model, and has no expert read all tokens any more."""
        super().remove()
        for module in self.model.modules():
            if isinstance(module, UnfusedExperts):
                module.reread = frozenset()


class GramHooks(ForwardSums):
    """One Gram per group of linears that read the same tensor, gathered at the group's first linear. With ``reread`` all tokens
    are run through the experts too, and these count."""

    grams: dict[str, Gram]

    def __init__(
        self,
        model: Any,
        groups: Sequence[Sequence[str]],
        streams: Mapping[str, Stream] | None = None,
        reread: bool = False,
    ) -> None:
        super().__init__(model, streams)
        for name, *_ in groups:
            module = model.get_submodule(name)
            in_features = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
            self.grams[name] = Gram.zero(in_features, device=module.weight.device)
            self._handles.append(module.register_forward_pre_hook(self._hook(name, reread)))


class ColumnHooks(ForwardSums):
    """``G Q`` of linears, each with directions ``Q`` of its own ``(in, k)``, in a model that may have an adapter."""

    grams: dict[str, GramColumns]

    def __init__(
        self, model: Any, directions: Mapping[str, Tensor], streams: Mapping[str, Stream] | None = None
    ) -> None:
        super().__init__(model, streams)
        for name, q in directions.items():
            self.grams[name] = GramColumns(q, model.device)
            self._handles.append(model.get_submodule(name).register_forward_pre_hook(self._hook(name, reread=False)))
