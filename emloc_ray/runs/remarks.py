"""Remarks on a run where nothing is wrong: each function gives a sentence, or None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from emloc_ray.config.schema import WORKER_SECTIONS, CorrectionConfig, RunConfig
from emloc_ray.data.processors import IMAGE_SIDE
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.machine import cpu_capabilities, has_bfloat16
from emloc_ray.planning.prepared import Prepared
from emloc_ray.text import listed, size


def over_budget(config: RunConfig, planned: Mapping[str, int]) -> str | None:
    """Names the stages that are ``planned`` to hold more bytes than ``memory_budget``, which bounds calibration alone."""
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


def idle_cpus(configs: Iterable[RunConfig], cpus: float) -> str | None:
    """Says so where a cluster has ``cpus``, and its only run leaves all but one idle."""
    run, *others = configs
    if others or cpus < 2:
        return None
    stages = (getattr(run, section) for section in WORKER_SECTIONS)
    if any(stage.gpus or stage.num_workers * stage.cpus_per_worker > 1 for stage in stages):
        return None
    return (
        f"The cluster has {cpus:g} CPUs, and no stage asks for more than one: set cpus_per_worker in calibration, finetune and"
        " evaluation, and num_workers in emulator."
    )


def emulated_bfloat16(configs: Iterable[RunConfig], capabilities: Mapping[str, Any]) -> str | None:
    """Says so where CPUs train in bfloat16 and this machine's has no instructions for it. On such a CPU the forward product
    of 256 rows and 2048 × 2048 weights took 4 times as long as in float32, the backward one 200 times."""
    if has_bfloat16(capabilities) or not any(
        config.finetune.gpus == 0 and config.finetune.bf16 is True for config in configs
    ):
        return None
    return (
        "finetune.bf16 is set, and this machine's CPU has no bfloat16 instructions: on such workers training takes many times"
        " as long as in float32; leave it out."
    )


def of_machines(configs: Iterable[RunConfig]) -> list[str]:
    """The remarks on the cluster and this machine's CPU; needs a connection to Ray."""
    from emloc_ray.stages.ray.session import total

    configs = list(configs)
    remarks = (
        idle_cpus(configs, total("CPU")),
        emulated_bfloat16(configs, cpu_capabilities()),
    )
    return [remark for remark in remarks if remark is not None]


def unread_correction(section: CorrectionConfig) -> str | None:
    """Names the settings of the correction that ``auto`` does not read."""
    unread = [key for key in ("clamp", "strength") if getattr(section, key) != type(section).model_fields[key].default]
    if section.method != "auto" or not unread:
        return None
    names = " and ".join(f"correction.{key}" for key in unread)
    return f"{names} {'are' if unread[1:] else 'is'} not read: auto tries its own; set correction.method to use yours."


def left_dense(layout: Layout) -> str | None:
    """Names the modules that a pattern names and that cannot be factored."""
    if not layout.left_dense:
        return None
    named = listed([f"{name} ({kind})" for name, kind in layout.left_dense.items()], 1)
    return f"Only linears can be factored or adapted: {named}, which a pattern names, stays as it is."


def long_images(prepared: Prepared) -> str | None:
    """Says so where rows show images, and one of ordinary size is longer than a row may be."""
    limit, tokens = prepared.config.data.max_seq_length, prepared.layout.image.row_tokens
    if tokens < limit or not prepared.lengths.images:
        return None
    return (
        f"An image of {IMAGE_SIDE} × {IMAGE_SIDE} pixels takes {tokens} tokens of this model, data.max_seq_length is {limit}:"
        " rows whose images do not fit are dropped; raise it."
    )
