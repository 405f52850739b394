"""Calibration as two steps of a run: the Grams of what linears read, and the gradients of what they give."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from emloc_ray.data.token_shards import TokenShards
from emloc_ray.planning.budget import check_holding
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.sizes import gradient_bytes, gram_bytes
from emloc_ray.planning.work import WITH_BACKWARD, block_work, head_work, num_slots, tokens_calibrated
from emloc_ray.stages.calibrate.job import BLOCKS, MAX_LEAD, CalibrationJob, Labels, resume_job
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.stage import Stage, metrics_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emloc_ray.planning.prepared import Prepared
    from emloc_ray.stages.ray.tasks import Progress, Resources


def calibration_job(context: Context) -> CalibrationJob:
    """The job of the Grams, with the hold and the waves that fit a worker's memory."""
    prepared, memory = context.prepared, context.memory
    hold, section = memory.calibration_hold(), prepared.config.calibration
    return CalibrationJob(
        context.model_dir,
        context.tokens("calibration"),
        context.gram_groups(),
        (0, TokenShards(context.tokens("calibration")).num_shards),
        section.tokens,
        section.batch_size,
        context.pad_token_id(),
        tuple(context.model_options.items()),
        hold,
        None if hold == BLOCKS else tuple(context.gram_groups(wave) for wave in memory.waves()),
        may_stream=memory.may_stream(),
        experts=experts(context),
        min_expert_tokens=section.min_expert_tokens,
        streams=tuple((s.name, s.stream) for s in context.layout.specs if s.stream != "row"),
        between=tuple((s.name, s.block) for s in context.layout.specs if s.between),
        images=context.images,
    )


def gradient_job(context: Context) -> CalibrationJob:
    """The same pass over the same rows, forward and back, for the sums of gradients of what linears give."""
    plan = context.memory.gradient_plan()
    waves = tuple(tuple((spec.name,) for spec in wave) for wave in plan.waves)
    return dataclasses.replace(
        calibration_job(context),
        groups=tuple(group for wave in waves for group in wave),
        batch_size=plan.batch_size,
        hold=plan.hold,
        waves=waves,
        may_stream=False,
        experts=(),
        gradients=Labels(context.loss_on(), context.prepared.config.seed),
    )


def experts(context: Context) -> tuple[tuple[str, int], ...]:
    """The Grams of experts' linears, with how many inputs these have."""
    specs = context.layout.by_name
    firsts = [specs[group[0]] for group in context.gram_groups()]
    return tuple((spec.name, spec.in_features) for spec in firsts if spec.routed_share is not None)


def _pass_inputs(context: Context) -> Inputs:
    return {
        "model": context.model_key,
        "options": context.model_options,
        "data": context.split_key("calibration"),
        "tokens": context.prepared.config.calibration.tokens,
    }


def _gram_inputs(context: Context) -> Inputs:
    section = context.prepared.config.calibration
    return {
        **_pass_inputs(context),
        "groups": context.gram_groups(),
        **({"min_expert_tokens": section.min_expert_tokens} if experts(context) else {}),
    }


def gradient_inputs(context: Context) -> Inputs:
    """What the sums of gradients are made of."""
    return {
        **_pass_inputs(context),
        "linears": context.layout.gradient_linears,
        "loss_on": context.loss_on(),
        "seed": context.prepared.config.seed,
    }


def _gather_grams(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.calibrate.calibrate import calibrate

    config, out_dir = context.prepared.config, context.path("calibration")
    job = calibration_job(context)
    job = resume_job(job, out_dir, inputs, config.calibration.num_workers, config.model.hold == "auto")
    return calibrate(job, out_dir, granted, progress, context.note)


def _gather_gradients(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.calibrate.calibrate import calibrate

    config, out_dir = context.prepared.config, context.path("gradients")
    # Only where the config has changed since the run was prepared: prepare checks it too.
    if config.memory_budget is not None and not config.budget_is_default:
        check_holding(context.prepared)
    job = resume_job(gradient_job(context), out_dir, inputs, config.calibration.num_workers, False)
    return calibrate(job, out_dir, granted, progress, context.note)


def _gram_cost(memory: MemoryModel) -> StageCost:
    prepared, layout = memory.prepared, memory.layout
    waves, by_blocks = memory.waves(), memory.calibration_hold() == BLOCKS
    groups = [group for wave in waves for group in wave]
    products = sum(group[0].token_share * group[0].in_features ** 2 for group in groups) * 1.2
    passes = 1 if by_blocks else len(waves)
    summed = [sum(map(gram_bytes, wave)) for wave in waves]
    on_disk = _by_block_on_disk(memory, sum(summed)) if by_blocks else _in_waves_on_disk(prepared, summed)
    written = on_disk if by_blocks else _written_in_waves(prepared, summed)
    tokens, section = tokens_calibrated(prepared, memory.lengths), prepared.config.calibration
    # Block by block each worker's weights come once for all its rows.
    rows_read = num_slots(prepared) * section.batch_size if by_blocks else tokens / memory.lengths.mean
    moved = memory.moved(memory.calibration_hold(), rows_read, section.batch_size)
    return StageCost(
        memory.calibration_parts(),
        flops=tokens * 2 * (passes * block_work(layout) + products),
        moved_bytes=passes * moved,
        disk_bytes=on_disk,
        written_bytes=written,
        efficiency=0.65,
        start_seconds=25,
    )


def _by_block_on_disk(memory: MemoryModel, grams: int) -> int:
    """Bytes on disk at most, block by block: the packed sums, hidden states, and of several slots each the sums of the blocks
    that are not summed over all yet."""
    slots = num_slots(memory.prepared)
    waiting = (MAX_LEAD + 1) * slots * memory.calibration_parts_by_block()["grams"] if slots > 1 else 0
    return grams // 2 + memory.hidden_state_disk_bytes() + min(int(waiting), grams * slots)


def _in_waves_on_disk(prepared: Prepared, waves: Sequence[int]) -> int:
    """Bytes on disk at most, by those of each wave's sums: the packed sums of the waves before, and every slot's of one, twice
    while it commits."""
    slots = num_slots(prepared)
    before = [sum(waves[:number]) // 2 for number in range(len(waves))]
    return max((held + 2 * slots * wave for held, wave in zip(before, waves, strict=True)), default=0)


def _written_in_waves(prepared: Prepared, waves: Sequence[int]) -> int:
    """Bytes that are written in all waves: every slot's sums, and their own, packed."""
    return sum(waves) // 2 + num_slots(prepared) * sum(waves)


def _gradient_cost(memory: MemoryModel) -> StageCost:
    prepared, layout = memory.prepared, memory.layout
    with_gradients = set(layout.gradient_linears)
    # Forward, once more for what the backward pass reads, and back; and the sums.
    sums = sum(s.token_share * s.out_features**2 for s in layout.specs if s.name in with_gradients) * 1.2
    plan, tokens = memory.gradient_plan(), tokens_calibrated(prepared, memory.lengths) if with_gradients else 0.0
    waves = [sum(map(gradient_bytes, wave)) for wave in plan.waves]
    forward = len(plan.waves) * memory.moved(plan.hold, tokens / memory.lengths.mean, plan.batch_size)
    work = 3 * (block_work(layout) + head_work(layout)) + sums
    return StageCost(
        memory.gradient_parts(),
        flops=tokens * 2 * work * len(plan.waves),
        moved_bytes=WITH_BACKWARD * forward,
        disk_bytes=_in_waves_on_disk(prepared, waves),
        written_bytes=_written_in_waves(prepared, waves),
        start_seconds=25,
    )


def thin_experts(calibration: Result) -> str | None:
    """How many experts were sent too few tokens, and what was done for them, from the calibration's result."""
    counts = calibration.get("experts") or {}
    if not counts.get("too_few"):
        return None
    reread = counts["too_few"] - counts["plain_svd"]
    done = [f"{reread} have their statistics from {counts['reread_tokens']} tokens run through them"] if reread else []
    done += [f"{counts['plain_svd']} are cut by a plain SVD, for want of tokens"] if counts["plain_svd"] else []
    return (
        f"The router sent {counts['too_few']} of {counts['number']} experts fewer than {counts['min_expert_tokens']} tokens"
        f" ({counts['never_routed']} none, the fewest {counts['fewest_routed_tokens']}): {' and '.join(done)}."
    )


def _summary(result: Result) -> str:
    return f"{result['num_tokens']:,} tokens in {result['num_shards']} shards"


CALIBRATE = Stage(
    name="calibrate",
    title="Calibrating",
    wanted=lambda prepared: prepared.layout.differs,
    workers=lambda config: config.calibration,
    working=num_slots,
    inputs=_gram_inputs,
    outputs=("calibration",),
    run=_gather_grams,
    cost=_gram_cost,
    is_shared=lambda context: True,
    resumes=True,
    summary=_summary,
    remarks=lambda context, result: [thin_experts(result)],
    metrics=metrics_of("calibration", "calibrate", "num_tokens", "num_shards", "hold", "waves", "experts"),
    metrics_keys=("calibration",),
)
GRADIENTS = Stage(
    name="gradients",
    title="Gathering gradients",
    verb="calibrate",
    wanted=lambda prepared: bool(prepared.layout.gradient_linears),
    workers=lambda config: config.calibration,
    working=num_slots,
    inputs=gradient_inputs,
    outputs=("gradients",),
    run=_gather_gradients,
    cost=_gradient_cost,
    is_shared=lambda context: True,
    resumes=True,
    summary=_summary,
)
SUMS = (CALIBRATE.name, GRADIENTS.name)
