"""The merge as a step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emloc_ray.config.schema import RunConfig
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.planning.costs import StageCost
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.stage import Stage

if TYPE_CHECKING:
    from emloc_ray.stages.merge.merge import MergeJob
    from emloc_ray.stages.ray.tasks import Progress, Resources


def merge_job(context: Context) -> MergeJob:
    """The job that merges the corrected adapter, or the one that exact steps finished, into the original."""
    from emloc_ray.stages.merge.merge import MergeJob

    section = context.prepared.config.merge
    return MergeJob(
        context.model_dir,
        context.final_adapter,
        context.path("merged"),
        context.specs(),
        section.chunk_bytes,
        section.max_shard_size,
    )


def _inputs(context: Context) -> Inputs:
    size = context.prepared.config.merge.max_shard_size
    return {
        "correct": context.made["correct"],
        "adapter": context.contents(context.final_adapter.name),
        **({} if size is None else {"max_shard_size": size}),
    }


def _merge(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.merge.merge import merge

    job = merge_job(context)
    discard_unless(job.out_dir, inputs)
    assert context.final_actor is not None
    return context.final_actor.work("merge", merge, job, granted, progress, context.note)


def no_merge(config: RunConfig) -> str:
    """Says what to serve where there is no merged model."""
    return f"merge: {config.adapter.method} changes no weight, so there is no merged/: the original is served with adapter/."


MERGE = Stage(
    name="merge",
    title="Merging",
    wanted=lambda prepared: not prepared.config.adapter.is_prompt,
    workers=lambda config: config.merge,
    inputs=_inputs,
    outputs=("merged",),
    run=_merge,
    cost=lambda memory: StageCost(memory.merge_parts(), disk_bytes=memory.weight_files, start_seconds=4),
    resumes=True,
    divisible=True,
    summary=lambda result: f"{result['merged_tensors']} tensors changed",
    note_if_left_out=no_merge,
)
