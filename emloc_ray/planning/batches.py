"""A run whose batches are as small as its ``memory_budget`` asks for."""

import dataclasses
from collections.abc import Callable

from emloc_ray.config.schema import WORKER_SECTIONS, RunConfig
from emloc_ray.planning.budget import solve_for_budget
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.memory import MemoryModel, Parts, total
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import longest_lengths


def shrink_batches(prepared: Prepared) -> Prepared:
    """The run with batches as small as fit its ``memory_budget`` (:meth:`MemoryModel.budget_bytes`): those of calibration and
    evaluation, and the fine-tuning's micro-batch, whose rows a step are kept by accumulation. Figures change in rounding alone.

    Blocks are run again in the backward pass where what they computed cannot be kept. A batch of one row that does not fit stays.
    """
    if prepared.config.memory_budget is None:
        return prepared
    prepared = _trained_within(prepared)
    prepared = _smaller(prepared, "calibration", lambda memory: [memory.calibration_parts()])
    return _smaller(prepared, "evaluation", lambda memory: [memory.evaluation_parts(), memory.correction_parts()])


def _trained_within(prepared: Prepared) -> Prepared:
    """Takes the micro-batch and the checkpointing that fit, unless the config's own do, or DeepSpeed's JSON names them."""
    if prepared.config.finetune.deepspeed is not None:
        return prepared
    lengths = longest_lengths(prepared)
    own = MemoryModel(prepared, lengths)
    budget = own.budget_bytes("finetune") or 0.0

    def needed(memory: MemoryModel) -> int:
        # Smaller steps make no room for what has no batch of theirs: the scores between them, and the rounding of grown factors.
        parts = [
            memory.healing_steps_parts(),
            memory.training_step_parts(),
            *([memory.finishing_plan().parts] if memory.prepared.finishes else []),
        ]
        return max(total(with_base(part)) for part in parts)

    if needed(own) <= budget:
        return prepared
    ratio = prepared.config.emulator.compression_ratio
    fit = solve_for_budget(prepared, int(budget), lengths, (ratio,), needed=needed).config
    sections = {"finetune": fit.finetune, "emulator": fit.emulator}
    return dataclasses.replace(prepared, config=prepared.config.model_copy(update=sections))


def _smaller(prepared: Prepared, section: str, parts_of: Callable[[MemoryModel], list[Parts]]) -> Prepared:
    """Halves a section's batch until it fits, or is a row."""

    def fits(memory: MemoryModel) -> bool:
        return max(total(with_base(parts)) for parts in parts_of(memory)) <= (memory.budget_bytes(section) or 0.0)

    while not fits(MemoryModel(prepared)) and (rows := getattr(prepared.config, section).batch_size) > 1:
        smaller = getattr(prepared.config, section).model_copy(update={"batch_size": rows // 2})
        prepared = dataclasses.replace(prepared, config=prepared.config.model_copy(update={section: smaller}))
    return prepared


def without_budget(prepared: Prepared) -> Prepared:
    """The same run, its batches as written and nothing that bounds them."""
    written, sections = prepared.written_config or prepared.config, {}
    for name in WORKER_SECTIONS:
        gpus = getattr(prepared.config, name).gpus_per_worker
        sections[name] = getattr(written, name).model_copy(update={"gpus_per_worker": gpus})
    return dataclasses.replace(prepared, config=written.model_copy(update={**sections, "memory_budget": None}))


def keeps_small(config: RunConfig) -> bool:
    """Whether workers give freed memory back at once: where a budget bounds what they hold of their node's memory."""
    on_gpus = config.budget_is_default and config.finetune.gpus > 0
    return config.memory_budget is not None and not on_gpus
