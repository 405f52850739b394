"""How much a run reads and computes: its rows, their tokens, and the multiply-adds of a token."""

from __future__ import annotations

import math
from typing import Any

from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.first_rows import sequences_a_row
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.lengths import PACKED_SHARE, Lengths
from emloc_ray.planning.memory import Held, MemoryModel
from emloc_ray.planning.prepared import UNKNOWN_ROWS, Prepared

WITH_BACKWARD = 2  # times that offloaded weights come where a pass is run back: a block is run again there
_CANDIDATES = 4  # corrections that auto scores at most
SEARCH_TRANSFERS = 2 / _CANDIDATES  # of offloaded weights, a candidate: the first three go through them together


def num_steps(config: Any, num_rows: int) -> int:
    """Optimizer steps of a run: ``max_steps``, or what ``num_train_epochs`` of the rows make."""
    finetune = config.finetune
    if finetune.max_steps > 0:
        return int(finetune.max_steps)
    return max(1, round(finetune.num_train_epochs * num_rows / rows_a_step(finetune)))


def rows_a_step(finetune: Any) -> int:
    """Rows of all workers' passes of an optimizer step."""
    return int(finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers)


def num_train_rows(prepared: Prepared) -> int:
    """Rows to train on, estimated where they are made or downloaded later."""
    return sum(source.num_rows for source in prepared.files.get("train", ())) or UNKNOWN_ROWS


def num_train_sequences(prepared: Prepared) -> int:
    """What these rows become: more where a chat template rewrites earlier turns, by as many as the first rows tell."""
    return round(num_train_rows(prepared) * sequences_a_row(prepared))


def rows_trained(prepared: Prepared) -> int:
    """Rows, or packs of rows, that all steps of the fine-tuning read together."""
    return rows_a_step(prepared.config.finetune) * steps_trained(prepared)


def steps_trained(prepared: Prepared) -> int:
    """Optimizer steps of the fine-tuning, estimated from the rows that are known."""
    count = float(num_train_sequences(prepared))
    if prepared.config.finetune.packing:
        count *= prepared.lengths.mean / (PACKED_SHARE * prepared.config.data.max_seq_length)
    return num_steps(prepared.config, math.ceil(count))


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


def passes(again: bool) -> int:
    """Floating-point operations of a training step for each multiply-add of a forward pass: frozen weights have no gradients
    of their own, and what is run again, as under gradient checkpointing, goes forward twice."""
    return 6 if again else 4


def steps_cost(memory: MemoryModel, steps: float, held: Held, work: float, again: bool, parameters: float) -> StageCost:
    """Optimizer steps with an adapter of so many ``parameters``, of a model whose blocks' linears take ``work`` multiply-adds
    a token; ``again``: blocks are run again in the backward pass."""
    finetune = memory.config.finetune
    rows = steps * rows_a_step(finetune)
    return StageCost(
        held.parts,
        flops=rows * memory.trained_lengths.mean * passes(again) * (work + head_work(memory.layout)),
        disk_bytes=int(4 * 4 * parameters),
        moved_bytes=WITH_BACKWARD * memory.moved(held.hold, rows, finetune.per_device_train_batch_size),
        efficiency=0.2,
        start_seconds=20,
        steps=steps,
    )


def training_cost(memory: MemoryModel, steps: float) -> StageCost:
    """Steps of the fine-tuning."""
    held = Held(memory.finetune_hold(), memory.finetune())
    again = memory.config.finetune.gradient_checkpointing or held.hold != "resident"
    return steps_cost(memory, steps, held, emulator_work(memory.layout), again, memory.adapter_parameters)
