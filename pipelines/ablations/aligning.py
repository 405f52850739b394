"""Trains a pruned model on before adapters are trained on it: the alignment of LoRAM (arXiv 2502.13533)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablations.pruning import KEPT_NAME
from emloc_ray.io.store.atomic import atomic_directory, copy_file
from emloc_ray.modeling.loading import copy_tokenizer, load_model

RATE = 1e-4
BATCH = 8


def align(model_dir: Path, rows: Path, out_dir: Path, max_length: int, rate: float = RATE) -> list[float]:
    """Writes the pruned model with all its weights trained once on ``rows``, as ``out_dir``, atomically.

    One pass of AdamW over the rows in their order, ``BATCH`` a step, on the mean loss of the next token in nats, prompts
    counted too, in float32; the rate falls linearly from ``rate`` to none. LoRAM's publisher does so once on a general corpus.
    On rows of the task it takes away what the adapter should learn.

    Args:
        model_dir: of :func:`~ablations.pruning.prune`.
        rows: JSON lines, ``text`` or ``prompt`` and ``completion``.
        out_dir: is replaced.
        max_length: tokens of a row; what is longer is cut.
        rate: AdamW's.

    Returns:
        The loss of each step.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [_text(json.loads(line)) for line in rows.read_text().splitlines()]
    model = load_model(model_dir, device="cpu")
    dtype, model = model.dtype, model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    steps, losses = math.ceil(len(texts) / BATCH), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps - 1 or 1)
    for tokens in _batches(tokenizer, texts, max_length):
        loss = model(**tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with atomic_directory(out_dir) as temporary:
        model.to(dtype).save_pretrained(temporary)
        copy_tokenizer(model_dir, temporary)
        copy_file(model_dir / KEPT_NAME, temporary / KEPT_NAME)
    return losses


def _text(row: dict[str, str]) -> str:
    return row.get("text") or row["prompt"] + row["completion"]


def _batches(tokenizer: Any, texts: Sequence[str], max_length: int) -> Iterator[dict[str, Tensor]]:
    """Rows padded on the right; padding is no label."""
    for first in range(0, len(texts), BATCH):
        ids = [
            [*tokenizer(text)["input_ids"][: max_length - 1], tokenizer.eos_token_id]
            for text in texts[first : first + BATCH]
        ]
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in ids], batch_first=True, padding_value=-100
        )
        mask = padded != -100
        yield {"input_ids": padded.where(mask, torch.tensor(0)), "attention_mask": mask.long(), "labels": padded}
