"""Next-token loss with logits only where a label is: the head is a large part of a small model's work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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


def token_loss(model: Any, batch: dict[str, Tensor], loss_on: str, head_owner: Any = None) -> TokenLoss:
    """The loss of one batch of :func:`emloc_ray.data.token_shards.collate`, in float32.

    ``head_owner`` is the model that owns the head where ``model`` is a wrapper around it (DDP).
    """
    labels = label_mask(batch, loss_on)
    predicting = torch.zeros_like(labels)
    predicting[:, :-1] = labels[:, 1:]
    with _logits_at(head_owner or model, predicting):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits = output.logits[0].float()
    targets = batch["input_ids"][labels]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return TokenLoss(loss, correct, int(targets.numel()))
