"""The trainings of a run: the fine-tuning, and the healing before it."""

import math
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.config.emulator import EmulatorConfig, HealingConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.core.healing import healed_layers, ranks_before_healing
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.prepared import Prepared, Training


def factor_ranks(prepared: Prepared) -> dict[str, int]:
    """The ranks that layers are factorized to: the emulator's own, less what healing gives back."""
    healing = prepared.config.emulator.heals
    return prepared.layout.ranks if healing is None else ranks_before_healing(prepared.layout.ranks, healing.r)


def quantized_late(layout: Layout, healing: HealingConfig | None) -> tuple[str, ...]:
    """The linears that are put into few bits after healing: in NF4 all, in integers those that it grows. Grown factors have
    other groups of weights with a common scale, so that to quantize them before would round weights twice."""
    if healing is None:
        return ()
    grown = {*layout.in_4bit, *healed_layers(layout.ranks, healing.r)}
    return tuple(name for name in layout.quantized_linears if name in grown)


def rounded_late(layout: Layout, healing: HealingConfig | None) -> tuple[str, ...]:
    """Those of :func:`quantized_late` that are stored in integers, rounded under their Grams."""
    return tuple(name for name in quantized_late(layout, healing) if name in layout.bits)


def changed_after_factorizing(emulator: EmulatorConfig, layout: Layout) -> set[str]:
    """The linears whose stored weights refinement or healing changes otherwise than by ranks added, so that the error that
    factorizing measured no longer holds: what is refined, and what is put into few bits or pivoted after healing."""
    healing, refined = emulator.heals, {*layout.ranks, *layout.bits}
    changed = (refined if emulator.refines is not None else set()) | {*quantized_late(layout, healing)}
    if healing is not None and layout.storage == "pivoted":
        changed |= {*healed_layers(layout.ranks, healing.r)}
    return changed


def healing_split(config: RunConfig) -> str:
    """The split with the rows to heal on."""
    return "train" if config.data.healing is None else "healing"


def healing_training(config: RunConfig, healing: HealingConfig, layout: Layout) -> Training:
    """A LoRA on the healed layers of the factorized emulator, trained on the rows to heal on."""
    finetune = config.finetune
    learned = {
        "max_steps": healing.steps,
        "eval_strategy": "no",
        "loraplus_lr_ratio": None,
        "packing": False,  # the teacher's logits are of rows
        "loss_on": healing.loss_on,
        "learning_rate": healing.learning_rate or finetune.learning_rate,
        "per_device_train_batch_size": healing.per_device_train_batch_size or finetune.per_device_train_batch_size,
        "gradient_accumulation_steps": healing.gradient_accumulation_steps or finetune.gradient_accumulation_steps,
        **_shorter_schedule(finetune, healing.steps),
    }
    healed, late = healed_layers(layout.ranks, healing.r), set(quantized_late(layout, healing))
    return Training(
        finetune.model_copy(update=learned),
        AdapterConfig(r=healing.r, lora_alpha=healing.lora_alpha),
        replace(
            layout,
            ranks=ranks_before_healing(layout.ranks, healing.r),
            adapted=healed,
            portable_targets=healed,
            adapter_parameters=None,
            quantization="none",
            bits={name: bits for name, bits in layout.bits.items() if name not in late},
            budget=None,
        ),
        healing_split(config),
    )


def _shorter_schedule(finetune: FinetuneConfig, steps: int) -> dict[str, Any]:
    """What a training of ``steps`` has instead of the fine-tuning's schedule. A warm-up that would outlast it is in proportion,
    where ``max_steps`` says to what; a schedule whose own settings count steps gives way to a linear one."""
    given, shorter = finetune.model_extra or {}, dict[str, Any]()
    if finetune.max_steps > 0 and (warmup := warmup_in_steps(finetune)) >= steps:
        shorter["warmup_steps"] = math.ceil(warmup * steps / finetune.max_steps)
    if "_steps" in str(given.get("lr_scheduler_kwargs")):
        shorter |= {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": None}
    return shorter


def warmup_in_steps(section: FinetuneConfig) -> float:
    """The warm-up where it is given as a number of steps, not as a share of them; else 0."""
    warmup = (section.model_extra or {}).get("warmup_steps", 0)
    return float(warmup) if isinstance(warmup, int | float) and warmup >= 1 else 0.0


def longest_lengths(prepared: Prepared) -> Lengths:
    """The lengths of the rows to train on, or of those to heal on where the longest is longer."""
    if prepared.config.emulator.heals is None:
        return prepared.lengths
    return max(prepared.lengths, prepared.lengths_of(healing_split(prepared.config)), key=lambda rows: rows.longest)


def factorize_work(prepared: Prepared) -> float:
    """Floating-point operations of products with Grams, for all linears that are factorized, or rounded with them."""
    layout, ranks = prepared.layout, factor_ranks(prepared)
    specs = [spec for spec in layout.specs if spec.name in ranks]
    # Under a budget most forms are integers.
    names = set(layout.bits if layout.budget is None else layout.compressed)
    rounding = rounding_work(layout, ranks, names.difference(rounded_late(layout, prepared.config.emulator.heals)))
    return rounding + sum(2.0 * s.num_parameters * max(s.in_features, 2 * ranks[s.name]) for s in specs)


def rounding_work(layout: Layout, ranks: Mapping[str, int], names: Set[str]) -> float:
    """Floating-point operations of putting linears into integers under their Grams, as factors where they have ``ranks``: of a
    weight ``9 out · in²``, of which two energies of its error are 4, the nearest planes 1 and two passes of the descent 4."""
    flops = 0.0
    for spec in (spec for spec in layout.specs if spec.name in names):
        rank = ranks.get(spec.name, layout.residual_ranks.get(spec.name, 0))
        flops += 9.0 * rank * (spec.in_features**2 + spec.out_features * rank)
        flops += 0.0 if spec.name in ranks else 9.0 * spec.num_parameters * spec.in_features
    return flops
