"""The correction as a step of a run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from emloc_ray.config.schema import CorrectionConfig
from emloc_ray.core.healing import healed_layers
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import CANDIDATES, MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import changed_after_factorizing
from emloc_ray.planning.work import (
    block_work,
    difference_work,
    emulator_work,
    head_work,
    rows_selected_on,
    tokens_adapted,
)
from emloc_ray.stages.calibrate.stage import CALIBRATE, SUMS
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.finetune.stage import trained_tokens
from emloc_ray.stages.stage import Stage
from emloc_ray.text import counted, describe_choice, whole_percent

if TYPE_CHECKING:
    from emloc_ray.stages.correct.job import CorrectionJob
    from emloc_ray.stages.ray.tasks import Progress, Resources


def correction_job(context: Context) -> CorrectionJob:
    """The job, with the candidates that the config leaves to choose among."""
    from emloc_ray.stages.correct.correct import candidates
    from emloc_ray.stages.correct.job import CorrectionJob

    config, layout = context.prepared.config, context.layout
    section = _read(config.correction)
    method = section.method if layout.differs and config.adapter.is_additive else "none"
    return CorrectionJob(
        model_dir=context.model_dir,
        emulator_dir=context.emulator_dir,
        calibration_dir=context.path("calibration") if layout.differs else None,
        adapter_dir=context.path("adapter_emulator"),
        out_dir=context.path("adapter"),
        selection_dir=context.tokens("selection"),
        tokens_dir=context.tokens("calibration"),
        specs=context.specs(),
        candidates=tuple(candidates(method, section.clamp, section.strength)),
        max_tokens=None if section.max_share is None else int(section.max_share * trained_tokens(context)),
        dampening_frac=section.dampening_frac,
        gram_dampening_frac=config.emulator.dampening_frac,
        **_residuals(context),
        update_tolerance=section.update_tolerance,
        batch_size=config.evaluation.batch_size,
        rows_on_original=context.memory.selection_rows(),
        loss_on=context.loss_on(),
        calibration_tokens=config.calibration.tokens,
        streams=tuple((s.name, s.stream) for s in layout.specs if s.stream != "row"),
        pad_token_id=context.pad_token_id(),
        model_options=context.model_options,
        hold=context.memory.selection_plan().hold,
        images=context.images,
    )


def _residuals(context: Context) -> dict[str, Any]:
    """What the factorization measured, for linears whose stored weights have not changed since, except for ranks that healing
    added."""
    emulator, layout = context.prepared.config.emulator, context.layout_made
    layers = context.results.get("factorize", {}).get("layers", {})
    known = layers.keys() - changed_after_factorizing(emulator, layout)
    residuals = {name: layer.get("residual_energy") for name, layer in layers.items() if name in known}
    healing = emulator.heals
    healed = () if healing is None else healed_layers(layout.ranks, healing.r)
    return {
        "residuals": {name: energy for name, energy in residuals.items() if energy is not None},
        "healed": {name: healing.r for name in healed if name in known} if healing is not None else {},
    }


def _inputs(context: Context) -> Inputs:
    job = correction_job(context)
    return {
        "finetune": context.made["finetune"],
        "adapter": context.contents("adapter_emulator"),
        "correction": _read(context.prepared.config.correction).model_dump(mode="json"),
        "candidates": [dataclasses.asdict(candidate) for candidate in job.candidates],
        "max_tokens": job.max_tokens,
        "data": context.split_key("selection"),
        **({"calibration data": context.split_key("calibration")} if job.reads_adapted else {}),
    }


def _read(section: CorrectionConfig) -> CorrectionConfig:
    """The section, with the defaults of what its method ignores."""
    return section.model_copy(update={key: CorrectionConfig.model_fields[key].default for key in section.unread})


def _correct(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.correct.correct import correct

    job = correction_job(context)
    discard_unless(job.state_dir, inputs)
    assert context.final_actor is not None
    return context.final_actor.work("correct", correct, job, granted, progress, context.note)


def _cost(memory: MemoryModel) -> StageCost:
    rows, workers = rows_selected_on(memory.prepared), memory.config.evaluation.num_workers
    scoring = rows * memory.lengths.mean * 2 * (block_work(memory.layout) + head_work(memory.layout))
    seeing = 2 * tokens_adapted(memory.prepared, memory.lengths) * emulator_work(memory.layout)
    return StageCost(
        memory.correction_parts(),
        flops=(scoring + seeing) * workers,  # one worker does both
        float32_flops=memory.correction_work() + difference_work(memory),
        moved_bytes=memory.moved(memory.selection_plan().hold, rows / CANDIDATES, memory.selection_rows()) * workers,
        disk_bytes=int(4 * memory.corrected_parameters + memory.thin_matrices()),
        start_seconds=15,
    )


def _summary(result: Result) -> str:
    if result.get("as_trained"):
        return "as trained: nothing to correct"
    chosen = f"chose {describe_choice(result)}"
    if result.get("note"):
        return f"{chosen}. {result['note']}"
    if not result.get("selection_rows"):
        return chosen
    sure, considered = "", result.get("considered", {})
    if considered.get("certainty") is not None:
        named = "it" if considered["method"] == result["method"] else describe_choice(considered)
        if considered["certainty"] >= 0.5:
            sure = f"; with about {whole_percent(considered['certainty'])} certainty {named} is better than none"
        else:
            sure = f"; the rows do not tell whether {named} is better than none"
    return f"{chosen}, best of {len(result['candidates'])} on {counted(result['selection_rows'], 'row')}{sure}"


def _metrics(prepared: Prepared, results: dict[str, Result]) -> dict[str, Any]:
    left_out = ("usage", "num_workers")
    return {"correction": {key: value for key, value in results["correct"].items() if key not in left_out}}


CORRECT = Stage(
    name="correct",
    title="Correcting",
    workers=lambda config: config.evaluation,  # it scores the original with adapters, as the evaluation does
    inputs=_inputs,
    outputs=("adapter",),
    scratch=("correction",),
    run=_correct,
    cost=_cost,
    reads=lambda context: (CALIBRATE.name,) if context.layout.differs else (),
    drops=lambda context: SUMS if context.prepared.config.calibration.keep == "none" else (),
    divisible=True,
    summary=_summary,
    metrics=_metrics,
    metrics_keys=("correction",),
)
