"""Next-token loss with logits only where a label is, a chunk of them at a time: with a large vocabulary they are the
largest tensors of a training step."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# A chunk is of hidden size over this tokens: its logits, held about three times in float32 while their gradient is made,
# then stay below the head's own weights.
_CHUNK_SHARE = 8


@dataclass(frozen=True)
class TokenLoss:
    """``loss_sum`` in nats over ``num_tokens`` predicted tokens, ``num_correct`` of them by the largest logit."""

    loss_sum: Tensor
    num_correct: Tensor
    num_tokens: int


def label_mask(batch: dict[str, Tensor], loss_on: str) -> Tensor:
    """Which tokens are labels ``(rows, length)``: completion tokens, or all non-padding ones; never the first."""
    key = "completion_mask" if loss_on == "completion" else "attention_mask"
    mask = batch[key].bool().clone()
    mask[:, 0] = False
    return mask


def token_loss(model: Any, batch: dict[str, Tensor], loss_on: str, head_owner: Any = None) -> TokenLoss:
    """The loss of one batch of :func:`emloc_ray.data.token_shards.collate`, in float32.

    ``head_owner`` is the model that owns the head where ``model`` is a wrapper around it (DDP).
    """
    labels = label_mask(batch, loss_on)
    predicting = torch.zeros_like(labels)
    predicting[:, :-1] = labels[:, 1:]
    targets = batch["input_ids"][labels]
    owner = head_owner or model
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if targets.numel() > chunk_tokens(owner.get_output_embeddings().weight.shape[-1]) and _gives_its_head_output(owner):
        with _loss_in_the_head(owner, predicting, targets) as found:
            model(**inputs)
        loss, correct = found
    else:
        with _logits_at(owner, predicting):
            loss, correct = _loss_of(model(**inputs).logits[0], targets)
    return TokenLoss(loss, correct, int(targets.numel()))


def chunk_tokens(hidden_size: int) -> int:
    """How many tokens' logits are made at once."""
    return max(1, hidden_size // _CHUNK_SHARE)


def _loss_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), correct


@contextlib.contextmanager
def _logits_at(model: Any, positions: Tensor) -> Iterator[None]:
    """The head sees only ``positions (rows, length)`` of the hidden states: logits are ``(1, positions, vocabulary)``."""

    def select(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _loss_in_the_head(model: Any, positions: Tensor, targets: Tensor) -> Iterator[list[Tensor]]:
    """While it lasts the head adds up its own loss and gives no logits; ``[loss sum, number correct]`` afterwards.

    A chunk's logits are made again for its gradient, so that the logits of one chunk are all there ever are.
    """
    head = model.get_output_embeddings()
    compute, found = head.forward, []

    def chunk_loss(hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return _loss_of(compute(hidden), wanted)

    def forward(hidden: Tensor) -> Tensor:
        chosen = hidden[positions]
        step = chunk_tokens(head.weight.shape[-1])
        parts = [
            checkpoint(chunk_loss, chosen[start : start + step], targets[start : start + step], use_reentrant=False)
            for start in range(0, len(chosen), step)
        ]
        found.extend([torch.stack([loss for loss, _ in parts]).sum(), sum(correct for _, correct in parts)])
        # Empty, but of the loss's graph: DDP looks there for the parameters that this pass uses.
        return found[0].reshape(1, 1, 1)[..., :0].expand(1, len(chosen), 0)

    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield found
    finally:
        del head.forward
        if before is not None:  # another library had put its own there
            head.forward = before


_PLAIN_HEADS: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _gives_its_head_output(model: Any) -> bool:
    """Whether the model's logits are what its head gives, with nothing done to them (no capping, no scaling).

    Tried once on a single token. Heads whose weights are scattered (ZeRO-3) cannot compute again on their own: never.
    """
    if model not in _PLAIN_HEADS:
        head = model.get_output_embeddings()
        given: list[Tensor] = []
        handle = head.register_forward_hook(lambda module, args, output: given.append(output))
        try:
            with torch.random.fork_rng(), torch.no_grad():
                token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                logits = model(input_ids=token, use_cache=False).logits
        finally:
            handle.remove()
        scattered = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
        _PLAIN_HEADS[model] = not scattered and len(given) == 1 and logits is given[0]
    return _PLAIN_HEADS[model]
