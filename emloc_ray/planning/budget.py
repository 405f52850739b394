"""Solves for the settings that fit a memory budget."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from emloc_ray.config.schema import RunConfig
from emloc_ray.core.healing import healed_layers
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.compiling import check_compiling, is_compiled
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.holding import allowed
from emloc_ray.planning.layout import layout_under
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.prepared import Prepared, worker_rows
from emloc_ray.text import size_up

_FEWER = 4
RATIOS = tuple(step / 20 for step in range(19, 1, -1))  # 0.95, 0.90, … 0.10


def solve_for_budget(
    prepared: Prepared,
    budget: int,
    lengths: Lengths,
    ratios: Sequence[float] = RATIOS,
    largest_batch: int | None = None,
    needed: Callable[[MemoryModel], int] | None = None,
) -> MemoryModel:
    """Solves for the first of ``ratios`` that fine-tunes within ``budget`` bytes a worker, of those at which healing has factors
    to grow, then for the largest micro-batch up to ``largest_batch`` (by default the config's). Blocks are run again in the
    backward pass, a third of a step's work, only where more than :data:`_FEWER` times as many rows fit so. Where nothing fits:
    what takes least. ``needed``: bytes of a worker, :func:`training_bytes` by default.
    """
    bounded = prepared.config.model_copy(update={"memory_budget": budget})  # by which passes of the original are held
    prepared, section = dataclasses.replace(prepared, config=bounded), bounded.finetune
    rows = section.per_device_train_batch_size * section.gradient_accumulation_steps
    # Checkpointing drops the cache that holds a prefix.
    may_checkpoint = bounded.adapter.method != "prefix_tuning"
    if bounded.emulator.budget is not None:  # which says how large the emulator is
        ratios = (bounded.emulator.compression_ratio,)

    def run_with(ratio: float, micro_batch: int, checkpointing: bool = True) -> MemoryModel:
        changed = with_settings(prepared, ratio, micro_batch, rows // micro_batch, checkpointing and may_checkpoint)
        return MemoryModel(changed, lengths)

    def healing_has_factors(ratio: float) -> bool:
        healing = bounded.emulator.healing
        return healing is None or ratio == 1 or bool(healed_layers(run_with(ratio, 1).layout.ranks, healing.r))

    def fits(memory: MemoryModel) -> bool:
        return (needed or training_bytes)(memory) <= budget

    ratios = [ratio for ratio in ratios if healing_has_factors(ratio)] or ratios
    ratio = next((ratio for ratio in ratios if fits(run_with(ratio, 1))), None)
    if ratio is None:
        return run_with(ratios[-1], 1)
    largest = largest_batch or section.per_device_train_batch_size
    sizes = [size for size in range(largest, 0, -1) if rows % size == 0]
    return _largest_batch(functools.partial(run_with, ratio), sizes, fits)


def _largest_batch(
    run_with: Callable[[int, bool], MemoryModel],
    sizes: Sequence[int],
    fits: Callable[[MemoryModel], bool],
) -> MemoryModel:
    """The run with the first of ``sizes`` that fits with checkpointing, or without it with one that is not much smaller."""
    with_checkpointing = next(memory for memory in (run_with(size, True) for size in sizes) if fits(memory))
    checkpointed = with_checkpointing.config.finetune.per_device_train_batch_size
    without = (run_with(size, False) for size in sizes if checkpointed >= size >= checkpointed / _FEWER)
    return next((memory for memory in without if fits(memory)), with_checkpointing)


def training_bytes(memory: MemoryModel) -> int:
    """Bytes of a fine-tuning worker, or of a healing worker where that is more."""
    return max(total(with_base(parts)) for parts in (memory.healing_training_parts(), memory.finetuning_parts()))


def check_gpus(prepared: Prepared) -> None:
    """Raises ConfigError where a worker's share of a GPU is below what any pass of the original takes. The GPU's whole memory
    counts, not what is free now."""
    memory = MemoryModel(prepared)
    least, parts = _least_held(memory)
    for section in ("calibration", "evaluation"):
        share, gpus = memory.usable_bytes(section), getattr(prepared.config, section).gpus
        if gpus and least > share:
            raise ConfigError(
                f"{section}.gpus_per_worker is {gpus:g}, of which {size_up(int(share))} of memory can be filled, and a worker"
                f" that holds {parts} takes {size_up(least)} before it reads a row: {'give more' if gpus < 1 else 'set it to 0'}."
            )


def _least_held(memory: MemoryModel) -> tuple[int, str]:
    """The fewest bytes that any pass of the original takes, and what they hold."""
    hold = memory.config.model.hold
    least = BASE_BYTES + min(memory.held[held_as] for held_as in allowed(hold))
    return least, "all weights, as model.hold: resident says" if hold == "resident" else "its largest blocks"


def check_holding(prepared: Prepared) -> None:
    """Raises ConfigError where any of these holds:

    - The budget, where it is written, or a worker's share of a GPU of this machine (:func:`check_gpus`), is below what any pass
      of the original takes.
    - The config needs gradients, and a calibration worker cannot hold what they take.
    - Blocks that cannot be compiled are to be.

    A budget that was left out refuses nothing else.
    """
    emulator, memory = prepared.config.emulator, MemoryModel(prepared)
    asks = emulator.asks_for_gradients
    if is_compiled((training := prepared.config.finetune).model_extra or {}):
        experts = any(spec.routed_share is not None for spec in prepared.layout.specs)
        holds = {memory.finetuning_hold(), *([memory.finishing_plan().hold] if prepared.finishes else [])}
        check_compiling(experts, training.deepspeed is not None, holds != {"resident"})
    check_gpus(prepared)
    is_written = not prepared.config.budget_is_default
    budget = memory.budget if is_written else None
    least, parts = _least_held(memory)
    if budget is not None and least > budget:
        raise ConfigError(
            f"memory_budget is {size_up(budget)}, and a worker that holds {parts} takes {size_up(least)} before it reads a row:"
            " give it more than that."
        )
    if asks is None or not prepared.layout.gradient_linears:
        return
    limit = memory.worker_bytes("calibration") if is_written else memory.usable_bytes("calibration")
    needed = memory.least_for_gradients()
    if needed > limit:
        without = (
            "allocation uniform and objective activations"
            if emulator.budget is None
            else "budget null, compression_ratio 1.0 and quantization int4"
        )
        raise ConfigError(
            f"{asks} needs gradients through the whole model, {size_up(needed)} in a worker that may hold {size_up(limit)}: give"
            f" it more, lower data.max_seq_length, or set {without}, which need none."
        )


def with_settings(
    prepared: Prepared, ratio: float, micro_batch: int, accumulation: int, checkpointing: bool
) -> Prepared:
    """The same run at another ratio, micro-batch and checkpointing. Healing with its own batch keeps its rows a step, in
    micro-batches that are as large as its own at most."""
    config = prepared.config
    finetune = config.finetune.model_copy(
        update={
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": checkpointing,
        }
    )
    healing = config.emulator.healing
    if healing is not None and (healing.per_device_train_batch_size or healing.gradient_accumulation_steps):
        rows = worker_rows(healing, config.finetune)
        most = min(micro_batch, healing.per_device_train_batch_size or config.finetune.per_device_train_batch_size)
        size = next(size for size in range(most, 0, -1) if rows % size == 0)
        own = {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}
        healing = healing.model_copy(update=own)
    emulator = config.emulator.model_copy(update={"compression_ratio": ratio, "healing": healing})
    return with_config(prepared, config.model_copy(update={"finetune": finetune, "emulator": emulator}))


def with_config(prepared: Prepared, config: RunConfig) -> Prepared:
    """The same run under a config whose emulator may be another."""
    return dataclasses.replace(prepared, config=config, layout=layout_under(prepared.layout, config))
