"""Next-token loss with logits only where a label is, a chunk of them at a time: with a large vocabulary they are the
largest tensors of a training step."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from emloc_ray.core.distillation import divergence, top_log_probs
from emloc_ray.core.precision import without_autocast
from emloc_ray.errors import ArtifactError
from emloc_ray.modeling.inputs import ModelCall, model_call, on_device
from emloc_ray.modeling.packing import packs_known

# A chunk is of hidden size over this tokens: its logits, held about three times in float32 while their gradient is made,
# then stay below the head's own weights.
CHUNK_SHARE = 8

# (logits (n, vocabulary), *targets (n, …)) → tensors; the first is a loss, or what a loss is made of.
LogitsReader = Callable[..., tuple[Tensor, ...]]
Head = Callable[[Tensor], Tensor]  # hidden states (n, hidden) to logits (n, vocabulary)


@dataclass(frozen=True)
class TokenLoss:
    """``loss_sum`` in nats over ``num_tokens`` predicted tokens, ``num_correct`` of them by the largest logit."""

    loss_sum: Tensor
    num_correct: Tensor
    num_tokens: int


@dataclass(frozen=True)
class TopLogProbs:
    """A teacher's likeliest tokens at label positions, ``ids (N, k)``, and their ``log_probs (N, k)``, likeliest first."""

    ids: Tensor
    log_probs: Tensor

    def to(self, device: torch.device) -> TopLogProbs:
        """The same on a device."""
        return TopLogProbs(on_device(self.ids, device), on_device(self.log_probs, device))


def token_loss(model: Any, batch: dict[str, Tensor], loss_on: str, teacher: TopLogProbs | None = None) -> TokenLoss:
    """The loss of one batch of :func:`emloc_ray.data.token_shards.collate`, in float32: the cross-entropy of its labels, or the
    divergence from what a ``teacher`` says at their positions, in the labels' order. The batch is read on the CPU, where it
    costs nothing, and then taken to the model's device. Raises ArtifactError where the teacher speaks of another number of
    labels."""
    return call_loss(model, model_call(model.config, batch, loss_on).to(model.device), model, teacher)


def call_loss(model: Any, call: ModelCall, owner: Any, teacher: TopLogProbs | None = None) -> TokenLoss:
    """:func:`token_loss` of a call that is on the model's device, as the teacher's logits are. ``owner`` has the head, where
    ``model`` is a wrapper around it (DDP)."""
    if teacher is None:
        return _loss_of_labels(model, owner, call, label_loss, call.targets)
    if len(teacher.ids) != call.targets.numel():
        raise ArtifactError(
            f"The teacher's logits are of {len(teacher.ids)} labels, the batch has {call.targets.numel()}: remove healing/ of"
            " the run directory and run again."
        )
    return _loss_of_labels(model, owner, call, _divergence_of, call.targets, teacher.ids, teacher.log_probs)


def sampled_loss(model: Any, batch: dict[str, Tensor], loss_on: str, draws: Sequence[Generator]) -> TokenLoss:
    """:func:`token_loss` of labels that are drawn from the model's own predictions, at the same positions.

    Its gradients' products are, on average, those of the Fisher matrix of the predictions. Each row's labels come from its
    own of the generators ``draws``, whatever else is in the batch.
    """
    call = model_call(model.config, batch, loss_on).to(model.device)
    numbers = [
        torch.rand(count, generator=generator, dtype=torch.float64)
        for count, generator in zip(call.counts, draws, strict=True)
    ]
    return _loss_of_labels(model, model, call, _loss_of_drawn, on_device(torch.cat(numbers), call.targets.device))


def _loss_of_labels(model: Any, owner: Any, call: ModelCall, criterion: LogitsReader, *targets: Tensor) -> TokenLoss:
    """``criterion(logits, *targets)`` at the positions of the call's labels."""
    parts, loss = _read_label_logits(model, owner, call, criterion, *targets)
    correct = torch.stack([correct for _, correct in parts]).sum()
    return TokenLoss(parts[0][0] if loss is None else loss, correct, len(targets[0]))


def _read_label_logits(
    model: Any, owner: Any, call: ModelCall, read: LogitsReader, *targets: Tensor
) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """``read(logits, *targets)`` of the call's labels, at once, and None.

    Where the logits are many, of each chunk of them, and the sum of the first tensors: the model's own output, with its gradient.
    """
    inputs = {**call.inputs, "use_cache": False}
    if not _in_chunks(owner, len(call.targets)):
        with logits_at(owner, call.predicting), packs_known(inputs):
            return [read(model(**inputs).logits[0], *targets)], None
    chunks: list[tuple[Tensor, ...]] = []
    forward = functools.partial(_chunked_head, read, targets, chunks)
    with _head_replaced(owner, call.predicting, forward), packs_known(inputs):
        return chunks, model(**inputs).logits.sum()


def _chunked_head(
    read: LogitsReader, targets: Sequence[Tensor], chunks: list[tuple[Tensor, ...]], compute: Head, hidden: Tensor
) -> Tensor:
    """Appends ``read(compute(hidden), *targets)`` of each chunk to ``chunks``; gives the sum of the first tensors ``(1, 1, 1)``.

    A chunk's logits are made again for its gradient, so that no more than one chunk's logits are ever held. The loss has to
    be the head's output, and thereby the model's: so DDP finds the parameters that it uses, and ZeRO-3 gathers the head's
    weight before its gradient is made.
    """

    step = chunk_tokens(hidden.shape[-1])
    for chunk in zip(hidden.split(step), *(target.split(step) for target in targets), strict=True):
        chunks.append(checkpoint(lambda part, *of: read(compute(part), *of), *chunk, use_reentrant=False))
    return torch.stack([first.sum() for first, *_ in chunks]).sum().reshape(1, 1, 1)


@torch.no_grad()
def teacher_logits(model: Any, batch: dict[str, Tensor], loss_on: str, k: int) -> list[TopLogProbs]:
    """The top ``k`` log-probabilities at the label positions of each row of a batch, on the CPU; logits are made in chunks."""
    call = model_call(model.config, batch, loss_on).to(model.device)
    parts, _ = _read_label_logits(model, model, call, lambda logits: top_log_probs(logits, k))
    ids, log_probs = (torch.cat(tensors).cpu().split(call.counts) for tensors in zip(*parts, strict=True))
    return [TopLogProbs(*row) for row in zip(ids, log_probs, strict=True)]


@torch.no_grad()
def row_losses(model: Any, batch: dict[str, Tensor], loss_on: str) -> tuple[Tensor, Tensor]:
    """The loss of each row of a batch in nats, summed over its labels, and how many labels it has: both ``(rows,)``. In
    float32, with logits made in chunks; the rows' losses add up to :func:`token_loss`. The counts are on the CPU."""
    call = model_call(model.config, batch, loss_on).to(model.device)

    def of_each(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(logits.float(), targets, reduction="none"),)

    parts, _ = _read_label_logits(model, model, call, of_each, call.targets)
    losses = torch.cat([loss for (loss,) in parts]).split(call.counts)
    return torch.stack([loss.sum() for loss in losses]), torch.tensor(call.counts)


def chunk_tokens(hidden_size: int) -> int:
    """How many tokens' logits are made at once."""
    return max(1, hidden_size // CHUNK_SHARE)


def _in_chunks(owner: Any, num_tokens: int) -> bool:
    head = owner.get_output_embeddings()
    many = num_tokens > chunk_tokens(_hidden_size(head))
    # Where weights are scattered over ranks a forward pass is a joint one: all ranks try the head, or none.
    return (many or hasattr(head.weight, "ds_id")) and _gives_its_head_output(owner) and many


def _hidden_size(head: Any) -> int:
    """The head's input size; ZeRO-3 empties a scattered weight between uses, but keeps its whole shape."""
    return int(getattr(head.weight, "ds_shape", head.weight.shape)[-1])


def label_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of labels: summed cross-entropy in nats, and how many of the largest logits are the targets ``(n,)``."""
    logits = logits.float()
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return F.cross_entropy(logits, targets, reduction="sum"), correct


def _loss_of_drawn(logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of labels drawn by inverse transform sampling: ``numbers (n,)`` are uniform in ``[0, 1)``."""
    cumulated = logits.detach().float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulated, numbers.unsqueeze(1) * cumulated[:, -1:], right=True).squeeze(1)
    return label_loss(logits, drawn.clamp_max(logits.shape[-1] - 1))


def _divergence_of(logits: Tensor, targets: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence from a teacher; what is correct is judged by the labels."""
    logits = logits.float()
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return divergence(logits, ids, log_probs), correct


@contextlib.contextmanager
def logits_at(model: Any, positions: tuple[Tensor, Tensor]) -> Iterator[None]:
    """The head sees only these rows and places of the hidden states: logits are ``(1, positions, vocabulary)``."""

    def select(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _head_replaced(
    model: Any, positions: tuple[Tensor, Tensor], forward: Callable[[Head, Tensor], Tensor]
) -> Iterator[None]:
    """While it lasts the head gives ``forward(its own forward, the hidden states at the positions)``."""
    head = model.get_output_embeddings()
    compute, before = head.forward, vars(head).get("forward")
    head.forward = lambda hidden: forward(compute, hidden[positions])
    try:
        yield
    finally:
        del head.forward
        if before is not None:  # another library had put its own there
            head.forward = before


_PLAIN_HEADS: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _gives_its_head_output(model: Any) -> bool:
    """Whether the model's logits are what its head gives, with nothing done to them (no capping, no scaling, no masking): tried
    once on two tokens, of the model below what gives logits of another dtype, as mixed precision does."""
    from peft import PeftModel  # here, for who only reads losses need not wait for it

    if model not in _PLAIN_HEADS:
        is_wrapped = isinstance(model, PeftModel) and "forward" in vars(model)
        tried, head = model.get_base_model() if is_wrapped else model, model.get_output_embeddings()
        given: list[tuple[Tensor, int]] = []
        handle = head.register_forward_hook(lambda module, args, output: given.append((output, output._version)))
        try:
            # Of the model's GPU alone: where a node has several, torch would warn that it asks them all.
            own = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(own), torch.no_grad(), without_autocast(model.device):
                token = torch.zeros(1, 2, dtype=torch.long)
                row = {
                    "input_ids": token,
                    "attention_mask": token + 1,
                    "completion_mask": token.new_tensor([[0, 1]]).bool(),
                }
                logits = tried(**model_call(model.config, row).to(model.device).inputs, use_cache=False).logits
        finally:
            handle.remove()
        # The same memory, not written since: DeepSpeed's hooks may have put another tensor around it.
        _PLAIN_HEADS[model] = len(given) == 1 and all(
            logits.data_ptr() == output.data_ptr() and output._version == version for output, version in given
        )
    return _PLAIN_HEADS[model]
