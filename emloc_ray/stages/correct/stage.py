"""The correction as a step of a run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import factorize_work
from emloc_ray.planning.work import block_work, head_work, rows_selected_on
from emloc_ray.stages.calibrate.stage import CALIBRATE, SUMS
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.finetune.stage import trained_tokens
from emloc_ray.stages.stage import Stage, one_worker
from emloc_ray.text import describe_choice

if TYPE_CHECKING:
    from emloc_ray.stages.correct.correct import CorrectionJob
    from emloc_ray.stages.ray.tasks import Progress, Resources


def correction_job(context: Context) -> CorrectionJob:
    """With the candidates that the config leaves to choose among."""
    from emloc_ray.stages.correct.correct import CorrectionJob, candidates

    config, layout = context.prepared.config, context.layout
    section = config.correction
    method = section.method if layout.differs and config.adapter.is_additive else "none"
    return CorrectionJob(
        model_dir=context.model_dir,
        emulator_dir=context.emulator_dir,
        calibration_dir=context.path("calibration") if layout.differs else None,
        adapter_dir=context.path("adapter_emulator"),
        out_dir=context.path("adapter"),
        selection_dir=context.tokens("selection"),
        specs=context.specs(),
        candidates=tuple(candidates(method, section.clamp, section.strength)),
        max_tokens=None if section.max_share is None else int(section.max_share * trained_tokens(context)),
        dampening_frac=section.dampening_frac,
        update_tolerance=section.update_tolerance,
        batch_size=config.evaluation.batch_size,
        loss_on=context.loss_on(),
        pad_token_id=context.pad_token_id(),
        model_options=context.model_options,
    )


def _inputs(context: Context) -> Inputs:
    job = correction_job(context)
    return {
        "finetune": context.made["finetune"],
        "adapter": context.contents("adapter_emulator"),
        "correction": context.prepared.config.correction.model_dump(mode="json"),
        "candidates": [dataclasses.asdict(candidate) for candidate in job.candidates],
        "max_tokens": job.max_tokens,
        "data": context.split_key("selection"),
    }


def _correct(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.correct.correct import correct

    return correct(correction_job(context), granted, progress, context.note)


def _reads(context: Context) -> tuple[str, ...]:
    return (CALIBRATE.name,) if context.layout.differs else ()


def _drops(context: Context) -> tuple[str, ...]:
    return SUMS if context.prepared.config.calibration.keep == "none" else ()


def _cost(memory: MemoryModel) -> StageCost:
    tokens = memory.lengths.mean * rows_selected_on(memory.prepared)
    flops = tokens * 2 * (block_work(memory.layout) + head_work(memory.layout)) + factorize_work(memory.prepared)
    return StageCost(memory.correct(), flops=flops, disk_bytes=4 * memory.corrected_parameters, start_seconds=15)


def _summary(result: Result) -> str:
    if result.get("as_trained"):
        return "as trained: nothing to correct"
    chosen = f"chose {describe_choice(result)}"
    if result.get("note"):
        return f"{chosen}. {result['note']}"
    tried = len(result["candidates"])
    return f"{chosen}, best of {tried} on {result['selection_rows']} rows" if result.get("selection_rows") else chosen


def _sections(prepared: Prepared, results: dict[str, Result]) -> dict[str, Any]:
    left_out = ("usage", "num_workers")
    return {"correction": {key: value for key, value in results["correct"].items() if key not in left_out}}


CORRECT = Stage(
    name="correct",
    title="Correcting",
    asks=lambda config: one_worker(config.evaluation),  # it scores the original with adapters, as the evaluation does
    inputs=_inputs,
    outputs=("adapter",),
    run=_correct,
    cost=_cost,
    reads=_reads,
    drops=_drops,
    summary=_summary,
    sections=_sections,
    keys=("correction",),
)
