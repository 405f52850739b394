"""Refinement as a step of a run: the emulator's blocks are fitted to the original's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emloc_ray.config.schema import CalibrationConfig, RunConfig
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_both_unless
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.work import block_work, emulator_work, tokens_calibrated
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.stage import Stage, metrics_of, one_worker

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Progress, Resources
    from emloc_ray.stages.refine.refine import RefinementJob

_PLACE = "refinement"


def refinement_job(context: Context, inputs: str = "") -> RefinementJob:
    """``inputs``: the fingerprint of what it is made from."""
    from emloc_ray.stages.refine.refine import RefinementJob

    config = context.prepared.config
    refinement = config.emulator.refines
    assert refinement is not None
    return RefinementJob(
        context.model_dir,
        context.path("emulator"),
        context.tokens("calibration"),
        context.path(_PLACE),
        context.path("emulator_refined"),
        refinement.steps,
        refinement.learning_rate,
        config.calibration.tokens,
        _rows_a_step(context.prepared),
        _rows_at_once(context),
        context.pad_token_id(),
        config.seed,
        inputs,
        tuple(context.model_options.items()),
        context.images,
        tuple(dict.fromkeys(spec.block for spec in context.layout.specs if spec.stream == "decoder")),
    )


def _rows_a_step(prepared: Prepared) -> int:
    """Calibration's batch, however few of its rows a worker's memory reads at once."""
    return prepared.for_fingerprints.config.calibration.batch_size


def _rows_at_once(context: Context) -> int:
    """As many rows as a worker's memory holds beside the forms that a budget was spent on."""
    made = replace(context.layout_made, budget=None)
    return MemoryModel(replace(context.prepared, layout=made)).refinement_rows()


def _inputs(context: Context) -> Inputs:
    config, rows = context.prepared.config, _rows_a_step(context.prepared)
    assert config.emulator.refines is not None
    made = context.layout_made
    allocated = {"ranks": made.ranks, "bits": made.bits, "residual_ranks": made.residual_ranks}
    return {
        **(allocated if context.layout.allocated else {}),  # sums that rounded otherwise may have given others
        **({"rows": rows} if rows != CalibrationConfig().batch_size else {}),  # of a step
        "factorize": context.made["factorize"],
        "data": context.split_key("calibration"),
        "options": context.model_options,
        "refinement": config.emulator.refines.model_dump(mode="json"),
        "tokens": config.calibration.tokens,
        "seed": config.seed,
    }


def _refine(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.refine.refine import refine

    discard_both_unless(context.path(_PLACE), context.path("emulator_refined"), inputs)
    blocks = {spec.block for spec in context.layout.specs if not spec.between}
    return refine(refinement_job(context, fingerprint(inputs)), len(blocks), granted, progress, context.note)


def _cost(memory: MemoryModel) -> StageCost:
    """Two passes of the emulator and one of the original over the calibration rows, and steps of 6 operations a parameter."""
    refinement, layout = memory.config.emulator.refines, memory.layout
    assert refinement is not None
    tokens, rows = tokens_calibrated(memory.prepared, memory.lengths), memory.refinement_rows()
    steps = 6 * refinement.steps * _rows_a_step(memory.prepared) * memory.lengths.mean * emulator_work(layout)
    return StageCost(
        memory.refinement_parts(),
        flops=steps + 2 * tokens * (block_work(layout) + 2 * emulator_work(layout)),
        moved_bytes=2 * memory.moved("block_by_block", rows, rows),
        disk_bytes=2 * memory.emulator_files + 2 * memory.hidden_state_disk_bytes(),
        efficiency=0.3,
        start_seconds=15,
    )


def no_refinement(config: RunConfig) -> str | None:
    """Says where refinement is asked for and there is nothing to refine."""
    if config.emulator.refinement is None or config.emulator.refines is not None:
        return None
    return "refine: at compression_ratio 1.0 nothing is factorized or in integers, so there is nothing to refine."


def _steps(prepared: Prepared) -> tuple[int, str]:
    refinement = prepared.config.emulator.refines
    assert refinement is not None
    return refinement.steps, "of refinement a block"


def _summary(result: Result) -> str:
    return f"{result['blocks_refined']} of {result['blocks']} blocks, whose error is {result['error_left']:.0%} of what it was"


REFINE = Stage(
    name="refine",
    title="Refining",
    verb="factorize",
    wanted=lambda prepared: prepared.config.emulator.refines is not None,
    workers=lambda config: one_worker(config.emulator),
    inputs=_inputs,
    outputs=("emulator_refined",),
    scratch=(_PLACE,),
    run=_refine,
    cost=_cost,
    steps=_steps,
    is_shared=lambda context: True,
    resumes=True,
    summary=_summary,
    note_if_left_out=no_refinement,
    metrics=metrics_of("refinement", "refine", "blocks", "blocks_refined", "error_left", "errors"),
    metrics_keys=("refinement",),
)
