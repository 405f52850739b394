"""What a reader should know of a run though nothing is wrong, each a sentence; None where there is nothing to say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emloc_ray.config.schema import CorrectionConfig, RunConfig
from emloc_ray.data.processors import IMAGE_SIDE
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.machine import cpu_capabilities, has_bfloat16
from emloc_ray.planning.plan import row_lengths
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.results import bound_scores
from emloc_ray.text import listed, size

_STAGES = ("calibration", "emulator", "finetune", "merge", "evaluation")


def over_budget(config: RunConfig, planned: Mapping[str, int]) -> str | None:
    """Which stages are ``planned`` to hold more bytes than ``memory_budget``: it bounds calibration alone, and informs of
    the rest."""
    budget = config.memory_budget
    if budget is None:
        return None
    above = [f"{name} {size(held)}" for name, held in planned.items() if name != "inference" and held > budget]
    if not above:
        return None
    return (
        f"memory_budget is {size(budget)} a worker, but the plan says {', '.join(above)}:"
        " see emloc-ray plan --memory-budget for settings that fit."
    )


def idle_gpus(configs: Iterable[RunConfig], gpus: float) -> str | None:
    """Where a cluster has ``gpus``, and all work would go on CPUs."""
    if not gpus or any(getattr(config, section).gpus_per_worker for config in configs for section in _STAGES):
        return None
    return (
        f"The cluster has {gpus:g} GPUs, and no stage asks for one: set gpus_per_worker: 1 in calibration, finetune and"
        " evaluation."
    )


def idle_cpus(configs: Iterable[RunConfig], cpus: float) -> str | None:
    """Where a cluster has ``cpus``, and its only run leaves all but one of them idle."""
    run, *others = configs
    if others or cpus < 2:
        return None
    stages = (getattr(run, section) for section in _STAGES)
    if any(stage.gpus_per_worker or stage.num_workers * stage.cpus_per_worker > 1 for stage in stages):
        return None
    return (
        f"The cluster has {cpus:g} CPUs, and no stage asks for more than one: set cpus_per_worker in calibration, finetune and"
        " evaluation, and num_workers in emulator."
    )


def emulated_bfloat16(configs: Iterable[RunConfig], capabilities: Mapping[str, Any]) -> str | None:
    """Where CPUs train in bfloat16, and this machine's has no instructions for it: on one without, the forward product of 256
    rows and 2048 × 2048 weights took 4 times as long as in float32, and the backward one 200 times."""
    if has_bfloat16(capabilities) or not any(
        config.finetune.gpus_per_worker == 0 and getattr(config.finetune, "bf16", False) for config in configs
    ):
        return None
    return (
        "finetune.bf16 is set, and this machine's CPU has no bfloat16 instructions: on workers like it training takes many"
        " times as long as in float32, without it."
    )


def of_machines(configs: Iterable[RunConfig]) -> list[str]:
    """What the cluster, and this machine's CPU, have that the runs leave unused or lack; needs a connection to Ray."""
    from emloc_ray.stages.ray.tasks import total

    configs = list(configs)
    found = (
        idle_gpus(configs, total("GPU")),
        idle_cpus(configs, total("CPU")),
        emulated_bfloat16(configs, cpu_capabilities()),
    )
    return [remark for remark in found if remark is not None]


def unread_correction(section: CorrectionConfig) -> str | None:
    """Which settings of the correction its ``auto`` does not look at."""
    told = [key for key in ("clamp", "strength") if getattr(section, key) != type(section).model_fields[key].default]
    if section.method != "auto" or not told:
        return None
    names = " and ".join(f"correction.{key}" for key in told)
    return f"{names} {'are' if told[1:] else 'is'} not read: auto tries its own; set correction.method to use what you gave."


def other_bound(evaluation: Mapping[str, Any], upper_bound: str | None) -> str | None:
    """Where a run is to be held against another one that was scored on something else."""
    if upper_bound is None or bound_scores(evaluation, upper_bound) is not None:
        return None
    return (
        f"evaluation.upper_bound {upper_bound} was not scored on the same held-out tokens of the same original, so that no gap"
        " can be told: run it anew with this run's data, seed and evaluation.num_samples."
    )


def left_dense(layout: Layout) -> str | None:
    """Which modules a pattern names that cannot be factored."""
    if not layout.left_dense:
        return None
    named = listed([f"{name} ({kind})" for name, kind in layout.left_dense.items()], 1)
    return f"Only linears can be factored or adapted: {named}, which a pattern names, stays as it is."


def long_images(prepared: Prepared) -> str | None:
    """Where rows show images, and one of ordinary size is longer than a row may be."""
    limit, tokens = prepared.config.data.max_seq_length, prepared.layout.image.row_tokens
    if tokens < limit or not row_lengths(prepared).images:
        return None
    return (
        f"An image of {IMAGE_SIDE} × {IMAGE_SIDE} pixels takes {tokens} tokens of this model, data.max_seq_length is {limit}:"
        " rows whose images do not fit are dropped; raise it."
    )


def cut_rows(config: RunConfig, split: str, count: dict[str, int]) -> str | None:
    """How many rows of a split were longer than ``max_seq_length``."""
    if not count["truncated_rows"]:
        return None
    return (
        f"data.{split}: {count['truncated_rows']} rows cut to {config.data.max_seq_length} tokens"
        f" ({count['truncated_tokens']} tokens left out), {count['dropped_rows']} dropped with no completion"
        " or not all of an image left."
    )


def skipped_rows(split: str, count: dict[str, int]) -> str | None:
    """How many bad rows ``data.on_error: skip`` left out of a split."""
    skipped = count.get("skipped_rows", 0)
    return f"data.{split}: {skipped} bad rows skipped; data.on_error: fail names the first." if skipped else None


def shortfall(config: RunConfig, split: str, count: dict[str, int]) -> str | None:
    """Where a split holds less than was asked for."""
    calibration = config.calibration
    asked = {
        "calibration": calibration.num_calibration_samples,
        "selection": config.correction.num_selection_samples,
        "eval": config.evaluation.num_samples,
    }.get(split)
    tokens = calibration.num_calibration_tokens if split == "calibration" else None
    if tokens is not None and count["tokens"] >= tokens:
        return None
    seen = count["rows"] + count["dropped_rows"] + count.get("skipped_rows", 0)
    few = asked is not None and seen < asked and not config.data.packing
    if few:
        return f"data.{split}: {count['rows']} rows instead of the {asked} asked for: there are no more."
    if asked is None and tokens is not None:
        return f"data.{split}: {count['tokens']} tokens instead of the {tokens} asked for: there are no more rows."
    return None


def thin_calibration(config: RunConfig, fewest_tokens: int | None, layout: Layout) -> str | None:
    """Where a Gram has fewer tokens than a rank that is taken from it."""
    highest = max(layout.ranks.values(), default=0)
    if fewest_tokens is None or fewest_tokens >= highest or layout.objective == "weights":
        return None
    section = config.calibration
    key = "num_calibration_samples" if section.num_calibration_tokens is None else "num_calibration_tokens"
    who = "An expert" if any(spec.routed_share is not None for spec in layout.specs) else "Calibration"
    return f"{who} saw {fewest_tokens} tokens, fewer than the highest rank {highest}: raise calibration.{key}."


def unseen_linears(unseen: Sequence[str], layout: Layout) -> str | None:
    """Where no token came to linears whose factors follow from tokens: of experts the calibration tells itself."""
    ranked = {spec.name for spec in layout.specs if spec.routed_share is None and spec.name in layout.ranks}
    found = [name for name in unseen if name in ranked]
    if not found or layout.objective == "weights":
        return None
    return (
        f"Calibration brought no token to {len(found)} linears, {found[0]} among them (a vision tower without images?): they"
        " are factorized by their weights alone."
    )


def no_healing(config: RunConfig) -> str | None:
    """Where healing is asked for and there is nothing to heal."""
    if config.emulator.healing is None or config.emulator.heals is not None:
        return None
    return "heal: at compression_ratio 1.0 the emulator is the original, so it is not healed."


def no_merge(config: RunConfig) -> str:
    """Where there is no merged model: what there is instead."""
    return f"merge: {config.adapter.method} changes no weight, so there is no merged/: the original is served with adapter/."


def thin_experts(calibration: dict[str, Any]) -> str | None:
    """How many experts were sent too few tokens, and what was done for them, from the calibration's result."""
    found = calibration.get("experts") or {}
    if not found.get("too_few"):
        return None
    reread = found["too_few"] - found["plain_svd"]
    done = [f"{reread} have their statistics from {found['reread_tokens']} tokens run through them"] if reread else []
    done += [f"{found['plain_svd']} are cut by a plain SVD, for want of tokens"] if found["plain_svd"] else []
    return (
        f"The router sent {found['too_few']} of {found['number']} experts fewer than {found['min_expert_tokens']} tokens"
        f" ({found['never_routed']} none, the fewest {found['fewest_routed_tokens']}): {' and '.join(done)}."
    )
