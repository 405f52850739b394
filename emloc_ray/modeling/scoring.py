"""Loss, accuracy and greedy completions of a model on rows of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import ImagesToInputs, collate, length_batches
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.loss import token_loss


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
    """The model's score on the rows; ``images`` makes its inputs of theirs.

    Raises:
        NumericsError: with ``name``, where its loss is no number.
    """
    total = Score()
    for part in length_batches(rows, batch_size):
        batch = {key: value.to(model.device) for key, value in collate(part, pad_token_id, images).items()}
        result = token_loss(model, batch, loss_on)
        total += Score(float(result.loss_sum), int(result.num_correct), result.num_tokens)
    if not math.isfinite(total.loss_sum):
        raise NumericsError(f"The loss of the {name} model is NaN or Inf: check its weights and dtype.")
    return total


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
    """Greedy completions of the rows' prompts, as text, stopped at the end-of-sequence token.

    ``images`` makes the model's inputs of those that the prompts show.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    apart = has_encoder(model.config)
    texts: list[str] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        prompts = [row.input_ids[: prompt_length(row)] for row in some]
        longest = max(map(len, prompts))
        # What goes on from its prompt is padded on the left, so that it begins at once.
        padding = [([], [pad] * (longest - len(p))) if apart else ([pad] * (longest - len(p)), []) for p in prompts]
        ids = torch.tensor([left + p + right for p, (left, right) in zip(prompts, padding, strict=True)])
        mask = torch.tensor(
            [
                [0] * len(left) + [1] * len(p) + [0] * len(right)
                for p, (left, right) in zip(prompts, padding, strict=True)
            ]
        )
        shown = [[image.content for image in row.images if image.end <= prompt_length(row)] for row in some]
        others = {} if images is None else images(shown, ids)
        output = model.generate(
            **{key: value.to(model.device) for key, value in others.items()},
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        made = output if apart else output[:, longest:]
        texts += [tokenizer.decode(line, skip_special_tokens=True).strip() for line in made]
    return texts
