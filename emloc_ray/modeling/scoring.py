"""Loss, accuracy and greedy completions of a model on rows of tokens."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import ImagesToInputs
from emloc_ray.errors import DataError, NumericsError
from emloc_ray.modeling.architecture import learned_positions
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.loss import logits_at, row_losses, token_loss

# For generate(), which takes the rest from the model's own generation_config.json: beams, penalties, a least length.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
}


@dataclass(frozen=True)
class Score:
    """Sums over predicted tokens; scores of disjoint rows add up."""

    loss_sum: float = 0.0
    num_correct: int = 0
    num_tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.loss_sum + other.loss_sum, self.num_correct + other.num_correct, self.num_tokens + other.num_tokens
        )

    def metrics(self) -> dict[str, float]:
        """``loss`` in nats a token, ``token_accuracy``, ``num_tokens``."""
        count = max(self.num_tokens, 1)
        return {
            "loss": self.loss_sum / count,
            "token_accuracy": self.num_correct / count,
            "num_tokens": self.num_tokens,
        }


@torch.no_grad()
def score_rows(
    model: Any,
    rows: Sequence[Tokens],
    *,
    batch_size: int,
    loss_on: str,
    pad_token_id: int,
    name: str,
    images: ImagesToInputs | None = None,
) -> Score:
    """The model's score on the rows; ``images`` makes its inputs of theirs. Raises NumericsError with ``name``, where its loss
    is no number."""
    batches = batches_by_length(rows, batch_size, pad_token_id, images)
    results = [token_loss(model, batch, loss_on) for _, batch in batches]
    total = Score()
    for result in results:  # read when all are asked for: a GPU is kept busy meanwhile
        total += Score(float(result.loss_sum), int(result.num_correct), result.num_tokens)
    if not math.isfinite(total.loss_sum):
        raise NumericsError(f"The loss of the {name} model is NaN or Inf: check its weights and dtype.")
    return total


class RowLosses(NamedTuple):
    """The loss of each row in nats, summed over its predicted tokens, and how many these are; both ``(rows,)``."""

    sums: torch.Tensor
    counts: torch.Tensor


@torch.no_grad()
def losses_by_row(
    model: Any,
    rows: Sequence[Tokens],
    *,
    batch_size: int,
    loss_on: str,
    pad_token_id: int,
    images: ImagesToInputs | None = None,
) -> RowLosses:
    """The summands of :func:`score_rows`, row by row in the order given; NaN and Inf are kept."""
    losses = RowLosses(torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64))
    made = [
        (numbers, *row_losses(model, batch, loss_on))
        for numbers, batch in batches_by_length(rows, batch_size, pad_token_id, images)
    ]
    for numbers, sums, counts in made:  # read last: a GPU would be waited for once a batch
        losses.sums[numbers], losses.counts[numbers] = sums.cpu().double(), counts
    return losses


def prompt_length(row: Tokens) -> int:
    """Tokens before the first completion token; half of a row that is all completion."""
    first = row.completion_mask.index(True) if True in row.completion_mask else len(row)
    return first if first > 0 else len(row) // 2


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    *,
    max_new_tokens: int,
    batch_size: int,
    images: ImagesToInputs | None = None,
) -> list[str]:
    """Greedy completions of the rows' prompts, as text, stopped at the end-of-sequence token, or with the model's last
    position. ``images`` makes the model's inputs of those that the prompts show."""
    texts: list[str] = []
    for batch in _batches(rows, batch_size, _longest_row(model) - max_new_tokens):
        prompts = [row.input_ids[: prompt_length(row)] for row in batch]
        shown = [[image.content for image in row.images if image.end <= prompt_length(row)] for row in batch]
        others = functools.partial(_other_inputs, images, shown, model.device)
        completions = continuations(model, tokenizer, prompts, max_new_tokens, others)
        texts += [tokenizer.decode(line, skip_special_tokens=True).strip() for line in completions]
    return texts


OtherInputs = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # beside the token ids that it is given


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    others: OtherInputs = lambda ids: {},
) -> list[Any]:
    """Greedy continuations of a batch of prompts, as token ids, stopped as :func:`complete` says; through an adapter's virtual
    tokens too, which PEFT's own ``generate`` puts in wrongly. Raises DataError where a prompt leaves no position for one."""
    longest, length = _longest_row(model), max(map(len, prompts))
    if length >= longest:
        raise DataError(
            f"A prompt of {length} tokens, with what was said before it, leaves none of the model's {longest} positions for an"
            " answer: shorten it, or begin anew."
        )
    write = _generated if _virtual_tokens(model) is None else _whole_rows
    most = min(max_new_tokens, longest - length)
    return write(model, prompts, others, most, _padding_token(model, tokenizer))


def _padding_token(model: Any, tokenizer: Any) -> int:
    """The tokenizer's own, where the model embeds it: one that was added to the tokenizer alone it does not."""
    embedded = len(model.get_input_embeddings().weight)
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if token is not None and token < embedded), 0)


def _longest_row(model: Any) -> int:
    """The tokens of a row, completion included, that the model has positions for."""
    from peft import PeftModel  # as below

    # The wrapper is no model of transformers', whose embedding of tokens says which positions are the text's.
    positions = learned_positions(model.get_base_model() if isinstance(model, PeftModel) else model)
    if positions is None or has_encoder(model.config):
        return sys.maxsize
    return positions - (_virtual_tokens(model) or 0)


def _virtual_tokens(model: Any) -> int | None:
    """How many virtual tokens a prompt puts before a row; None where the adapter is no prompt."""
    from peft import PeftModel  # here, for who only reads scores need not wait for it

    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    return int(model.active_peft_config.num_virtual_tokens)


def _batches(rows: Sequence[Tokens], batch_size: int, longest: int) -> Iterator[Sequence[Tokens]]:
    """The rows in their order; those whose prompt is above ``longest`` alone, so that they cut no other one short."""
    for is_long, neighbours in itertools.groupby(rows, key=lambda row: prompt_length(row) > longest):
        run, size = list(neighbours), 1 if is_long else batch_size
        yield from (run[start : start + size] for start in range(0, len(run), size))


def _other_inputs(
    images: ImagesToInputs | None,
    shown: Sequence[Sequence[bytes | memoryview]],
    device: torch.device,
    ids: torch.Tensor,
) -> dict[str, torch.Tensor]:
    inputs = {} if images is None else images(shown, ids.cpu())
    return {key: value.to(device) for key, value in inputs.items()}


def _generated(
    model: Any, prompts: Sequence[list[int]], others: OtherInputs, max_new_tokens: int, pad: int
) -> list[Any]:
    apart = has_encoder(model.config)
    longest = max(map(len, prompts))
    # A decoder continues its prompt: padding on the left lets it start at once.
    padding = [([], [pad] * (longest - len(p))) if apart else ([pad] * (longest - len(p)), []) for p in prompts]
    padded = list(zip(padding, prompts, strict=True))
    ids = torch.tensor([left + p + right for (left, right), p in padded], device=model.device)
    mask = torch.tensor([[0] * len(left) + [1] * len(p) + [0] * len(right) for (left, right), p in padded])
    output = model.generate(
        **others(ids),
        input_ids=ids,
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **GREEDY,
    )
    return list(output if apart else output[:, longest:])


def _whole_rows(
    model: Any, prompts: Sequence[list[int]], others: OtherInputs, max_new_tokens: int, pad: int
) -> list[list[int]]:
    """Greedy, each step a pass over whole rows, as in training: what virtual tokens need. ``generate`` of PEFT 0.21 on
    transformers 5 puts them in anew at every step, and padding on the left would move a row away from them."""
    rows = [list(prompt) for prompt in prompts]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    going = set(range(len(rows)))
    for _ in range(max_new_tokens):
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        with logits_at(model, (torch.arange(len(rows), device=model.device), lengths - 1 - longest)):
            mask = (torch.arange(longest, device=model.device) < lengths.unsqueeze(1)).long()
            logits = model(**others(ids), input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        for number, token in enumerate(logits.argmax(dim=-1).tolist()):
            if number in going:
                rows[number].append(token)
        going = {number for number in going if rows[number][-1] not in ends}
        if not going:
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
