"""How much a run reads and computes: its rows, their tokens, and the multiply-adds of a token."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

from emloc_ray.core.correction import ADAPTED_ROWS
from emloc_ray.data.tokenizing import ROWS_PER_SHARD
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.data_checks import rows_taken
from emloc_ray.planning.first_rows import sequences_a_row
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.lengths import PACKED_SHARE, Lengths
from emloc_ray.planning.memory import CANDIDATES, HoldPlan, MemoryModel
from emloc_ray.planning.prepared import Prepared, splits_of
from emloc_ray.planning.training import changed_after_factorizing

WITH_BACKWARD = 2  # times that offloaded weights come where a pass is run back: a block is run again there


def num_steps(finetune: Any, num_rows: int) -> int:
    """Optimizer steps of a training: ``max_steps``, or what reads ``num_train_epochs`` of the rows. The last is as full as the
    others: rows of the next epoch fill it."""
    if finetune.max_steps > 0:
        return int(finetune.max_steps)
    epochs = Fraction(str(finetune.num_train_epochs))  # as it is written: 0.1 of 30 rows are 3
    return max(1, math.ceil(epochs * num_rows / rows_a_step(finetune)))


def rows_a_step(finetune: Any) -> int:
    """Rows of all workers' passes of an optimizer step."""
    return int(finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers)


def difference_work(memory: MemoryModel) -> float:
    """Floating-point operations of ``Δ G``, ``2 out · in²``, for the adapted linears whose error after factorizing no longer
    holds."""
    changed = changed_after_factorizing(memory.config.emulator, memory.layout)
    return sum(2.0 * s.num_parameters * s.in_features for s in memory.adapted if s.name in changed)


def num_slots(prepared: Prepared) -> int:
    """The workers of a calibration pass that have a shard of rows: all, where it is not known yet how many rows there are. Rows
    that a number of tokens leaves out count, as how many these are is known once they are read."""
    section, known = prepared.config.calibration, prepared.knows_rows("calibration")
    rows = prepared.num_rows("calibration") if known else section.num_calibration_samples
    shards = section.num_workers if rows is None else math.ceil(rows / section.rows_per_shard)
    return max(1, min(section.num_workers, shards))


def num_sequences(prepared: Prepared, split: str = "train", rows: int | None = None) -> int:
    """What ``rows`` of a split become, by default all that are read: more where a chat template rewrites earlier turns, by as
    many as the first rows tell; fewer where ``data.packing`` joins those of a shard, in order: of each sequence half a row's
    length is left over."""
    rows = prepared.num_rows(split) if rows is None else rows
    if not prepared.config.data.packing:
        return round(rows * sequences_a_row(prepared, split))
    mean = _of_rows(prepared, split).mean
    joined = max(mean, prepared.config.data.max_seq_length - mean / 2)
    shard = min(rows, prepared.config.calibration.rows_per_shard if split == "calibration" else ROWS_PER_SHARD)
    return round(rows / max(1, shard) * math.ceil(shard * mean / joined))


def _of_rows(prepared: Prepared, split: str) -> Lengths:
    return prepared.lengths_of(prepared.rows_of(split), packed=False)


def tokens_stored(prepared: Prepared) -> tuple[float, float]:
    """Tokens of all splits' shards, and the bytes of images beside them."""
    tokens, images, bound = 0.0, 0.0, prepared.config.calibration.num_calibration_tokens
    for split in splits_of(prepared.config):
        lengths = _of_rows(prepared, split)
        rows = prepared.num_rows(split) * sequences_a_row(prepared, split)
        if split == "calibration":
            rows = min(rows, (bound or math.inf) / lengths.mean)
        tokens, images = tokens + rows * lengths.mean, images + rows * lengths.image_bytes
    return tokens, images


def packed(prepared: Prepared, rows: float) -> float:
    """Sequences that training reads these rows as: packs of them with ``finetune.packing``."""
    if not prepared.config.finetune.packing:
        return rows
    return rows * prepared.lengths.mean / (PACKED_SHARE * prepared.config.data.max_seq_length)


def rows_trained(prepared: Prepared) -> int:
    """Rows, or packs of rows, that all steps of the fine-tuning read together."""
    return rows_a_step(prepared.config.finetune) * steps_trained(prepared)


def steps_trained(prepared: Prepared) -> int:
    """Optimizer steps of the fine-tuning, estimated from the rows that are known."""
    return num_steps(prepared.config.finetune, math.ceil(packed(prepared, num_sequences(prepared))))


def rows_selected_on(prepared: Prepared) -> float:
    """Rows that all candidates of the correction read together; none where there is nothing to choose."""
    section = prepared.config.correction
    if section.method != "auto" or not prepared.layout.differs:
        return 0
    rows = float(num_sequences(prepared, "selection") * CANDIDATES)
    if section.max_share is None:
        return rows
    return min(rows, section.max_share * rows_trained(prepared) / packed(prepared, 1))


def tokens_adapted(prepared: Prepared, lengths: Lengths) -> float:
    """Tokens of the calibration's rows that the emulator with the adapter reads for the correction."""
    if not prepared.config.correction.reads_adapted:
        return 0.0
    return min(ADAPTED_ROWS * lengths.mean, tokens_calibrated(prepared, lengths))


def tokens_calibrated(prepared: Prepared, lengths: Lengths) -> float:
    """Tokens of a calibration pass; none where the emulator is the original."""
    return prepared.calibration_tokens(lengths.mean) if prepared.layout.differs else 0.0


def block_work(layout: Layout) -> float:
    """Multiply-adds of a token in the blocks' linears of the original."""
    return sum(spec.token_share * spec.num_parameters for spec in layout.specs)


def emulator_work(layout: Layout) -> float:
    """Multiply-adds of a token in the blocks' linears of the emulator."""
    return sum(spec.token_share * layout.kept(spec) for spec in layout.specs)


def unpacked_weights(layout: Layout) -> int:
    """Weights of few bits of the emulator, all of which a pass unpacks, whatever it reads."""
    in_few_bits = {*layout.quantized_linears}
    return sum(layout.kept(spec) for spec in layout.specs if spec.name in in_few_bits)


def unpacked_in_training(layout: Layout, rows: float, micro_batch: int, again: bool) -> float:
    """Weights of few bits that training on so many ``rows`` unpacks: on the way forward and back, and where blocks are run
    again once more."""
    return math.ceil(rows / micro_batch) * (2 + again) * unpacked_weights(layout)


def head_work(layout: Layout) -> float:
    """Multiply-adds of a token in the head, where a quarter of the tokens are labels."""
    return layout.head_parameters * 0.25


def passes(again: bool) -> int:
    """Floating-point operations of a training step for each multiply-add of a forward pass: frozen weights have no gradients
    of their own, and what is run again, as under gradient checkpointing, goes forward twice."""
    return 6 if again else 4


def steps_cost(
    memory: MemoryModel, steps: float, plan: HoldPlan, micro_batch: int, work: float, again: bool, parameters: float
) -> StageCost:
    """Optimizer steps with an adapter of so many ``parameters``, of a model whose blocks' linears take ``work`` multiply-adds
    a token; ``again``: blocks are run again in the backward pass."""
    rows = steps * rows_a_step(memory.config.finetune)
    return StageCost(
        plan.parts,
        flops=rows * memory.trained_lengths.mean * passes(again) * (work + head_work(memory.layout)),
        disk_bytes=int(4 * 4 * parameters),
        moved_bytes=WITH_BACKWARD * memory.moved(plan.hold, rows, micro_batch),
        efficiency=0.2,
        start_seconds=20,
        steps=steps,
    )


def rows_validated(prepared: Prepared) -> int:
    """Sequences that a score while training reads, at most."""
    given = rows_taken(prepared.config.data.validation, prepared.files.get("validation", ()))
    return num_sequences(prepared, "validation", given or prepared.config.finetune.num_validation_samples)


def num_scores(prepared: Prepared) -> tuple[int, int]:
    """How often the fine-tuning scores the emulator, and the original beside it: after the last step too."""
    section = prepared.config.finetune
    if not section.validates:
        return 0, 0
    scores = math.ceil(steps_trained(prepared) / section.scores_every)
    every = section.eval_original_every if prepared.layout.differs else None
    return scores, 0 if every is None else math.ceil(scores / every)


def validation_cost(memory: MemoryModel) -> StageCost:
    """The scores between the steps of the fine-tuning; the original is opened anew for each of its own."""
    layout, plan, rows = memory.layout, memory.validation_plan(), rows_validated(memory.prepared)
    scores, beside = num_scores(memory.prepared)
    head, transfers = head_work(layout), beside if layout.differs else scores
    opened = beside * memory.weights * memory.config.finetune.num_workers if plan.hold == "resident" else 0
    return StageCost(
        plan.parts,
        flops=2
        * rows
        * memory.lengths.mean
        * (scores * (emulator_work(layout) + head) + beside * (block_work(layout) + head)),
        unpacked=scores * math.ceil(rows / memory.validation_rows()) * unpacked_weights(layout),
        moved_bytes=opened + transfers * memory.moved(plan.hold, rows, memory.validation_rows()),
        efficiency=0.45,
    )


def training_cost(memory: MemoryModel, steps: float) -> StageCost:
    """Steps of the fine-tuning."""
    plan, section = HoldPlan(memory.finetuning_hold(), memory.finetuning_parts()), memory.config.finetune
    again, rows = section.gradient_checkpointing or plan.hold != "resident", section.per_device_train_batch_size
    cost = steps_cost(memory, steps, plan, rows, emulator_work(memory.layout), again, memory.adapter_parameters)
    return replace(cost, unpacked=unpacked_in_training(memory.layout, steps * rows_a_step(section), rows, again))
