"""Solves for the settings that fit a memory budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.planning.costs import Costed, with_base
from emloc_ray.planning.holding import allowed
from emloc_ray.planning.layout import layout_under
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.prepared import Prepared
from emloc_ray.text import size_up

RATIOS = tuple(step / 20 for step in range(19, 1, -1))  # 0.95, 0.90, … 0.10


@dataclass(frozen=True)
class Solution:
    """The run with settings under which one worker's fine-tuning, and the healing before it, fits a budget; what they need,
    and what else does not fit."""

    prepared: Prepared
    budget: int
    finetune_bytes: int
    inference_bytes: int
    too_large: dict[str, int]

    @property
    def overrides(self) -> list[str]:
        """The settings as the command line takes them."""
        finetune, emulator = self.prepared.config.finetune, self.prepared.config.emulator
        healing = None if emulator.heals is None else emulator.heals.per_device_train_batch_size
        return [
            *([] if healing is None else [f"emulator.healing.per_device_train_batch_size={healing}"]),
            *([] if emulator.budget is not None else [f"emulator.compression_ratio={emulator.compression_ratio:g}"]),
            f"finetune.per_device_train_batch_size={finetune.per_device_train_batch_size}",
            f"finetune.gradient_accumulation_steps={finetune.gradient_accumulation_steps}",
            f"finetune.gradient_checkpointing={str(finetune.gradient_checkpointing).lower()}",
        ]

    @property
    def sentence(self) -> str:
        """The solution in words."""
        text = (
            f"Within {size_up(self.budget)}: fine-tuning needs {size_up(self.finetune_bytes)} a worker, inference of the"
            f" original {size_up(self.inference_bytes)}."
        )
        if self.too_large:
            stages = ", ".join(f"{name} ({size_up(held)})" for name, held in self.too_large.items())
            text += f" Above it, whatever the ratio: {stages}; lower evaluation.batch_size or data.max_seq_length."
        return text


def solve(stages: Sequence[Costed], prepared: Prepared, budget: int, lengths: Lengths) -> Solution:
    """The largest compression ratio that fine-tunes within ``budget`` bytes a worker; at this ratio the largest micro-batch,
    with the same rows a step; and no gradient checkpointing where that fits too.

    Raises:
        ConfigError: where no ratio fits; it says what the smallest one needs.
    """
    memory = fitting(prepared, budget, lengths)
    needed, config = training_bytes(memory), memory.config
    if needed > budget:
        own = config.emulator.budget
        refused = f"No compression ratio fits {size_up(budget)}: at {RATIOS[-1]:g}, "
        refused = refused if own is None else f"emulator.budget: {own} does not fit {size_up(budget)}: "
        raise ConfigError(
            f"{refused}a row at a time and"
            f" {'with' if config.finetune.gradient_checkpointing else 'without'} gradient checkpointing, fine-tuning needs"
            f" {size_up(needed)}: give that much, or lower data.max_seq_length or adapter.{_size_of(config.adapter)}."
        )
    return solution_of(stages, memory, budget)


def solution_of(stages: Sequence[Costed], memory: MemoryModel, budget: int) -> Solution:
    """The settings of ``memory``, and what does not fit ``budget`` with them."""
    too_large = {name: peak for name, peak in stage_peaks(stages, memory).items() if peak > budget}
    return Solution(memory.prepared, budget, training_bytes(memory), total(memory.inference()), too_large)


def stage_peaks(stages: Sequence[Costed], memory: MemoryModel) -> dict[str, int]:
    """Bytes of a worker of each stage that the run of ``memory`` has."""
    costs = {s.name: s.cost for s in stages if s.cost is not None and s.wanted(memory.prepared)}
    return {name: total(with_base(cost(memory).memory)) for name, cost in costs.items()}


def fitting(
    prepared: Prepared,
    budget: int,
    lengths: Lengths,
    ratios: Sequence[float] = RATIOS,
    largest_batch: int | None = None,
    needed: Callable[[MemoryModel], int] | None = None,
) -> MemoryModel:
    """With the first of ``ratios`` that fine-tunes within ``budget`` bytes a worker, the largest micro-batch there, up to
    ``largest_batch`` (by default the config's), and no gradient checkpointing where that fits too. Where nothing fits: what
    takes least. ``needed``: bytes of a worker, :func:`training_bytes` by default."""
    bounded = prepared.config.model_copy(update={"memory_budget": budget})  # by which passes of the original are held
    prepared, section = dataclasses.replace(prepared, config=bounded), bounded.finetune
    rows = section.per_device_train_batch_size * section.gradient_accumulation_steps
    # Checkpointing drops the cache that holds a prefix.
    may_checkpoint = bounded.adapter.method != "prefix_tuning"

    if bounded.emulator.budget is not None:  # which says how large the emulator is
        ratios = (bounded.emulator.compression_ratio,)

    def at(ratio: float, micro_batch: int, checkpointing: bool = True) -> MemoryModel:
        changed = with_settings(prepared, ratio, micro_batch, rows // micro_batch, checkpointing and may_checkpoint)
        return MemoryModel(changed, lengths)

    def fits(memory: MemoryModel) -> bool:
        return (needed or training_bytes)(memory) <= budget

    ratio = next((ratio for ratio in ratios if fits(at(ratio, 1))), None)
    if ratio is None:
        return at(ratios[-1], 1)
    most = largest_batch or section.per_device_train_batch_size
    micro_batch = next(size for size in range(most, 0, -1) if rows % size == 0 and fits(at(ratio, size)))
    return at(ratio, micro_batch, not fits(at(ratio, micro_batch, False)))


def training_bytes(memory: MemoryModel) -> int:
    """What a worker of the fine-tuning takes, or of the healing before it where that takes more."""
    return max(total(with_base(parts)) for parts in (memory.healing(), memory.finetune()))


def _size_of(adapter: AdapterConfig) -> str:
    return "num_virtual_tokens" if adapter.is_prompt else "r" if adapter.is_additive else "target_modules"


def check_holding(prepared: Prepared) -> None:
    """Raises ConfigError where the budget, or a worker's share of a GPU that is here, is below what any pass of the original
    takes, or where the config needs gradients and a calibration worker cannot hold what they take; a budget that was left out
    refuses nothing."""
    asks, memory = prepared.config.emulator.asks_for_gradients, MemoryModel(prepared)
    is_written, hold = not prepared.config.budget_is_default, prepared.config.model.hold
    budget = memory.budget if is_written else None
    least = BASE_BYTES + min(memory.held[held_as] for held_as in allowed(hold))
    parts = "all weights, as model.hold: resident says" if hold == "resident" else "its largest blocks"
    for section in ("calibration", "evaluation"):
        share, gpus = memory.there(section), getattr(prepared.config, section).gpus
        if gpus and not prepared.config.ray.joins and least > share:
            raise ConfigError(
                f"{section}.gpus_per_worker is {gpus:g}, of which {size_up(int(share))} of memory can be filled, and a worker"
                f" that holds {parts} takes {size_up(least)} before it reads a row: {'give more' if gpus < 1 else 'set it to 0'}."
            )
    if budget is not None and least > budget:
        raise ConfigError(
            f"memory_budget is {size_up(budget)}, and a worker that holds {parts} takes {size_up(least)} before it reads a row:"
            " give it more than that."
        )
    if asks is None or not prepared.layout.weighed:
        return
    room = memory.worker_bytes("calibration") if is_written else memory.there("calibration")
    needed = memory.least_for_gradients()
    if needed > room:
        raise ConfigError(
            f"{asks} needs gradients through the whole model, {size_up(needed)} in a worker that may hold {size_up(room)}: give"
            " it more, lower data.max_seq_length, or set allocation uniform and objective activations, which need none."
        )


def with_settings(
    prepared: Prepared, ratio: float, micro_batch: int, accumulation: int, checkpointing: bool
) -> Prepared:
    """The same run at another ratio, micro-batch and checkpointing; healing with its own batch keeps its rows a step."""
    config = prepared.config
    finetune = config.finetune.model_copy(
        update={
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": checkpointing,
        }
    )
    healing = config.emulator.healing
    if healing is not None and healing.per_device_train_batch_size is not None:
        rows = healing.per_device_train_batch_size * config.finetune.gradient_accumulation_steps
        healing = healing.model_copy(update={"per_device_train_batch_size": max(1, rows // accumulation)})
    emulator = config.emulator.model_copy(update={"compression_ratio": ratio, "healing": healing})
    return with_config(prepared, config.model_copy(update={"finetune": finetune, "emulator": emulator}))


def with_config(prepared: Prepared, config: RunConfig) -> Prepared:
    """The same run under a config whose emulator may be another."""
    return dataclasses.replace(prepared, config=config, layout=layout_under(prepared.layout, config))
