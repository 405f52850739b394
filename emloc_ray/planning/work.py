"""How much a run reads and computes: its rows, their tokens, and the multiply-adds of a token."""

from __future__ import annotations

import math
from typing import Any

from emloc_ray.planning.layout import Layout
from emloc_ray.planning.lengths import PACKED_SHARE, Lengths
from emloc_ray.planning.prepared import UNKNOWN_ROWS, Prepared

_CANDIDATES = 7  # corrections that auto tries at most


def num_steps(config: Any, num_rows: int) -> int:
    """Optimizer steps of a run: ``max_steps``, or what ``num_train_epochs`` of the rows make."""
    finetune = config.finetune
    if finetune.max_steps > 0:
        return int(finetune.max_steps)
    rows_per_step = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    return max(1, round(finetune.num_train_epochs * num_rows / rows_per_step))


def num_train_rows(prepared: Prepared) -> int:
    """Rows to train on, estimated where they are made or downloaded later."""
    return sum(source.num_rows for source in prepared.files.get("train", ())) or UNKNOWN_ROWS


def rows_trained(prepared: Prepared) -> int:
    """Rows, or packs of rows, that all steps of the fine-tuning read together."""
    finetune = prepared.config.finetune
    rows = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    count = float(num_train_rows(prepared))
    if finetune.packing:
        count *= prepared.lengths.mean / (PACKED_SHARE * prepared.config.data.max_seq_length)
    return rows * num_steps(prepared.config, math.ceil(count))


def rows_selected_on(prepared: Prepared) -> float:
    """Rows that all candidates of the correction read together; none where there is nothing to choose."""
    section = prepared.config.correction
    if section.method != "auto" or not prepared.layout.differs:
        return 0
    rows: float = section.num_selection_samples * _CANDIDATES
    return rows if section.max_share is None else min(rows, section.max_share * rows_trained(prepared))


def tokens_calibrated(prepared: Prepared, lengths: Lengths) -> float:
    """Tokens of a calibration pass; none where the emulator is the original."""
    return prepared.calibration_tokens(lengths.mean) if prepared.layout.differs else 0.0


def block_work(layout: Layout) -> float:
    """Multiply-adds of a token in the blocks' linears of the original."""
    return sum(spec.token_share * spec.num_parameters for spec in layout.specs)


def emulator_work(layout: Layout) -> float:
    """Multiply-adds of a token in the blocks' linears of the emulator."""
    return sum(spec.token_share * layout.kept(spec) for spec in layout.specs)


def head_work(layout: Layout) -> float:
    """Multiply-adds of a token in the head, where a quarter of the tokens are labels."""
    return layout.head_parameters * 0.25
