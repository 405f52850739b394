"""The evaluation as a step of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.config.steps import ON_EMULATOR
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.work import block_work, emulator_work, head_work, num_sequences, unpacked_weights
from emloc_ray.stages.context import Context, Inputs, Result, without
from emloc_ray.stages.stage import Stage
from emloc_ray.text import counted

if TYPE_CHECKING:
    from emloc_ray.stages.evaluate.evaluate import EvaluationJob
    from emloc_ray.stages.ray.tasks import Progress, Resources

# Settings that say where work runs, not what comes out of it, and the run that the result is held against.
_NOT_SCORED = {"num_workers", "cpus_per_worker", "gpus_per_worker", "upper_bound"}
_SAME_LOSS = 1e-2  # of a loss in bfloat16 on different machines


def evaluation_job(context: Context) -> EvaluationJob:
    """The job that scores every variant on the held-out rows."""
    from emloc_ray.stages.evaluate.evaluate import EvaluationJob

    config = context.prepared.config
    section = config.evaluation
    return EvaluationJob(
        model_dir=context.model_dir,
        emulator_dir=context.emulator_dir if context.layout.differs else context.model_dir,
        trained_adapter_dir=context.path("adapter_emulator"),
        corrected_adapter_dir=context.path("adapter"),
        finished_adapter_dir=context.final_adapter if context.prepared.finishes else None,
        merged_dir=None if config.adapter.is_prompt else context.path("merged"),
        tokens_dir=context.tokens("eval"),
        loss_on=context.loss_on(),
        batch_size=section.batch_size,
        rows_on_original=context.memory.evaluation_rows(),
        pad_token_id=context.pad_token_id(),
        num_generations=section.num_generations,
        num_exact_match=section.num_exact_match,
        max_new_tokens=section.max_new_tokens,
        prompts_at_once=context.memory.prompts_at_once(),
        max_seq_length=config.data.max_seq_length,
        variants=context.prepared.variants_scored,
        model_options=context.model_options,
        hold=context.memory.evaluation_plan().hold,
        images=context.images,
    )


def _inputs(context: Context) -> Inputs:
    return {
        "correct": context.made["correct"],
        "adapter": context.contents("adapter"),
        "merge": context.made.get("merge", ""),
        **({"finish": context.contents(context.final_adapter.name)} if context.prepared.finishes else {}),
        "data": context.split_key("eval"),
        "evaluation": without(context.prepared.for_fingerprints.config.evaluation, _NOT_SCORED),
    }


def _evaluate(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.evaluate.evaluate import evaluate

    return evaluate(evaluation_job(context), granted, progress, context.note)


def _cost(memory: MemoryModel) -> StageCost:
    section, layout, hold = memory.config.evaluation, memory.layout, memory.evaluation_plan().hold
    blocks, kept, head = block_work(layout), emulator_work(layout), head_work(layout)
    rows, prompts = num_sequences(memory.prepared, "eval"), max(section.num_generations, section.num_exact_match)
    apart = [name for name in memory.prepared.variants_scored if layout.differs or name not in ON_EMULATOR]
    works = ((kept if name in ON_EMULATOR else blocks) + head for name in apart)
    read_by_emulator = sum(name in ON_EMULATOR for name in apart) * math.ceil(rows / memory.evaluation_rows())
    completed = 2 * prompts * section.max_new_tokens * (blocks + 4 * head)
    # All variants go through offloaded blocks together; a token of a completion is a pass too, of all prompts that are
    # completed at once.
    turns = section.num_workers * math.ceil(prompts / section.num_workers / memory.prompts_at_once())
    passes = memory.moved(hold, rows, memory.evaluation_rows()) + memory.moved(hold, turns * section.max_new_tokens, 1)
    return StageCost(
        memory.evaluation_parts(),
        flops=2 * (memory.lengths.mean * rows * sum(works) + completed),
        unpacked=read_by_emulator * unpacked_weights(layout),
        moved_bytes=passes,
        efficiency=0.45,
        start_seconds=20,
    )


def gap_closed(evaluation: dict[str, Any], upper_bound: str | Path) -> dict[str, Any] | None:
    """``(original − corrected) / (original − LoRA on the original)`` in held-out loss, by the run at ratio 1.0 in
    ``upper_bound``; None where that gained nothing, or was not held against the same rows of the same model."""
    other = bound_scores(evaluation, upper_bound)
    if other is None:
        return None
    original, bound = evaluation["original"]["loss"], other["corrected"]["loss"]
    gap = original - bound
    if gap <= 0:
        return None
    scored = [name for name in ("uncorrected", "corrected", "finished", "merged") if name in evaluation]
    shares: dict[str, Any] = {name: (original - evaluation[name]["loss"]) / gap for name in scored}
    return {"upper_bound": str(upper_bound), "upper_bound_loss": bound, **shares}


def bound_scores(evaluation: Mapping[str, Any], upper_bound: str | Path) -> Mapping[str, Any] | None:
    """The evaluation of the run ``upper_bound``; None where it has none yet, or was scored on other tokens."""
    other: Mapping[str, Any] | None = RunDirectory(upper_bound).metrics().get("evaluation")
    if other is None:
        return None
    one, another = evaluation["original"], other["original"]
    alike = math.isclose(one["loss"], another["loss"], rel_tol=_SAME_LOSS)
    return other if alike and one["num_tokens"] == another["num_tokens"] else None


def other_bound(evaluation: Mapping[str, Any], upper_bound: str | None, steps: int = 0) -> str | None:
    """Says so where ``evaluation.upper_bound`` was not scored on the same held-out tokens, or was trained for fewer ``steps``
    than this run's adapter."""
    if upper_bound is None:
        return None
    if bound_scores(evaluation, upper_bound) is None:
        return (
            f"evaluation.upper_bound {upper_bound} was not scored on the same held-out tokens of the same original, so the gap"
            " is unknown: run it again with this run's data, seed and evaluation.num_samples."
        )
    trained = (RunDirectory(upper_bound).metrics().get("finetune") or {}).get("steps", steps)
    if trained >= steps:
        return None
    return (
        f"evaluation.upper_bound {upper_bound} was trained for {counted(trained, 'step')} and this run's adapter for {steps}, so"
        f" the gap looks closed further than it is: run it again with finetune.max_steps: {steps}."
    )


def _remarks(context: Context, result: Result) -> list[str | None]:
    config, done = context.prepared.config, context.results
    # A training that ends early by its scores has the steps that it needs.
    ends_early = config.finetune.early_stopping_patience is not None
    steps = 0 if ends_early else sum(done[name]["steps"] for name in ("finetune", "finish") if name in done)
    return [other_bound(result["evaluation"], config.evaluation.upper_bound, steps)]


def _metrics(prepared: Prepared, results: dict[str, Result]) -> dict[str, Any]:
    sections = {key: results["evaluate"][key] for key in ("evaluation", "exact_match", "generations")}
    bound = prepared.config.evaluation.upper_bound
    gap = None if bound is None else gap_closed(sections["evaluation"], bound)
    return sections if gap is None else {**sections, "gap_closed": gap}


EVALUATE = Stage(
    name="evaluate",
    title="Evaluating",
    workers=lambda config: config.evaluation,
    inputs=_inputs,
    run=_evaluate,
    cost=_cost,
    remarks=_remarks,
    metrics=_metrics,
    metrics_keys=("evaluation", "exact_match", "generations", "gap_closed"),
)
