"""Healing as a step of a run: the original's logits are distilled into the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emloc_ray.config.emulator import HealingConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.teacher_shards import BYTES_PER_LOGIT
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_both_unless
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.model_checks import check_healing
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import healing_training, rounded_late, rounding_work
from emloc_ray.planning.work import (
    block_work,
    emulator_work,
    head_work,
    num_sequences,
    passes,
    rows_a_step,
    unpacked_in_training,
)
from emloc_ray.stages.calibrate.stage import CALIBRATE
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.finetune.stage import finetune_job, learned
from emloc_ray.stages.stage import Stage, metrics_of

if TYPE_CHECKING:
    from emloc_ray.stages.heal.heal import HealingJob
    from emloc_ray.stages.ray.tasks import Progress, Resources

_OWN = {"max_steps", "num_train_epochs", "loss_on"}  # what the healing has instead of the fine-tuning's
_PLACE = "healing"


def healing_job(context: Context, healing: HealingConfig, name: str) -> HealingJob:
    """``name`` identifies the healing, so that a later try resumes it; all but the outcome is in ``healing/``."""
    from emloc_ray.data.ingest import SampleOrder
    from emloc_ray.stages.heal.fold import FoldJob
    from emloc_ray.stages.heal.heal import HealingJob
    from emloc_ray.stages.heal.teacher import TeacherJob

    config, layout = context.prepared.config, context.layout_made
    own = healing_training(config, healing, layout)
    training = replace(
        finetune_job(context, name, own),
        emulator_dir=context.unhealed_dir,
        out_dir=context.path(_PLACE, "adapter"),
        storage_dir=context.path(_PLACE),
        teacher_dir=context.path(_PLACE, "teacher"),
        stage="heal",
    )
    num_workers = config.finetune.num_workers
    memory = MemoryModel(context.prepared, context.prepared.lengths_of(own.split))
    taught_at_once = memory.teacher_rows()
    order = SampleOrder(len(TokenShards(training.tokens_dir)), training.batch_size, 0, num_workers, training.seed)
    teacher = TeacherJob(
        context.model_dir,
        training.tokens_dir,
        context.path(_PLACE, "teacher"),
        order,
        training.max_steps * own.section.gradient_accumulation_steps,
        healing.num_teacher_logits,
        training.loss_on,
        taught_at_once,
        training.pad_token_id,
        context.model_options,
        memory.teacher_plan(taught_at_once).hold,
        context.images,
    )
    fold = FoldJob(
        training.emulator_dir,
        training.out_dir,
        context.path("emulator_healed"),
        layout.ranks,
        own.layout.adapted,
        layout.in_4bit,
        tuple(s.name for s in layout.specs if s.transposed and s.routed_share is None),
        layout.kept_wide,
        layout.storage,
        layout.forms,
        context.path("calibration") if _rounds_by_grams(context) else None,
        config.emulator.dampening_frac,
    )
    return HealingJob(teacher, training, fold)


def _inputs(context: Context) -> Inputs:
    config, layout, zero_config = (
        context.prepared.for_fingerprints.config,
        context.layout_made,
        context.prepared.zero_config,
    )
    healing = config.emulator.heals
    assert healing is not None
    check_healing(config, layout)
    training, batch = healing_training(config, healing, layout), {"gradient_accumulation_steps"}
    inputs: Inputs = {
        "factorize": context.made["factorize"],
        "data": context.split_key(training.split),
        "options": context.model_options,
        "healing": healing.model_dump(mode="json", exclude=batch),  # it is in what is learned
        "finetune": learned(training.section, *_OWN),
        "ranks": layout.ranks,
        "quantization": config.emulator.quantization,
        "seed": config.seed,
    }
    if config.emulator.refines is not None:
        inputs["refine"] = context.made["refine"]
    if layout.budget is not None:
        inputs |= {"bits": layout.bits, "residual_ranks": layout.residual_ranks}
    if rounded_late(layout, healing):
        inputs["group_size"] = layout.group_size
    if zero_config is not None:
        inputs["deepspeed"] = zero_config
    return inputs


def _heal(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.finetune.finetune import other_try
    from emloc_ray.stages.heal.heal import heal

    healing = context.prepared.config.emulator.heals
    assert healing is not None
    begun = context.begun(inputs)
    job = healing_job(context, healing, f"heal-{fingerprint(begun)}")
    if other := other_try(job.training):
        context.note(other)
    discard_both_unless(context.path(_PLACE), context.path("emulator_healed"), begun)
    return heal(job, context.base_config(), granted, progress, context.note, context.detail)


def _cost(memory: MemoryModel) -> StageCost:
    """The healed emulator, and while it is made the teacher's logits (k · 6 bytes of a token) and training checkpoints."""
    prepared, layout, healing = memory.prepared, memory.layout, memory.config.emulator.heals
    assert healing is not None
    training = healing_training(memory.config, healing, layout)
    section, lengths = training.section, prepared.lengths_of(training.split)
    own, rows = MemoryModel(prepared, lengths), healing.steps * rows_a_step(section)
    taught, head = min(rows, num_sequences(prepared, training.split)) * lengths.mean, head_work(layout)
    lora = MemoryModel(prepared, lengths, training).adapter_parameters
    learning = rows * lengths.mean * passes(section.gradient_checkpointing) * (emulator_work(layout) + 4 * head)
    batch_size = own.teacher_rows()
    hold = own.teacher_plan(batch_size).hold
    return StageCost(
        own.healing_stage_parts(),
        flops=learning + taught * 2 * (block_work(layout) + 4 * head),
        unpacked=unpacked_in_training(
            layout, rows, section.per_device_train_batch_size, section.gradient_checkpointing
        ),
        float32_flops=2.5 * rounding_work(layout, layout.ranks, set(rounded_late(layout, healing))),
        moved_bytes=memory.moved(hold, taught / lengths.mean, batch_size),
        disk_bytes=int(memory.emulator_files + taught * healing.num_teacher_logits * BYTES_PER_LOGIT + 4 * 4 * lora),
        efficiency=0.2,
        start_seconds=30,
    )


def _rounds_by_grams(context: Context) -> bool:
    """Whether it rounds what it grew under Grams, as the factorization rounds the rest. By the weights alone it reads none."""
    layout = context.layout_made
    return layout.objective != "weights" and bool(rounded_late(layout, context.prepared.config.emulator.heals))


def no_healing(config: RunConfig) -> str | None:
    """Says where healing is asked for and there is nothing to heal."""
    if config.emulator.healing is None or config.emulator.heals is not None:
        return None
    return "heal: at compression_ratio 1.0 nothing is factorized, so there are no factors to heal."


def _steps(prepared: Prepared) -> tuple[int, str]:
    healing = prepared.config.emulator.heals
    assert healing is not None
    return healing.steps, "of healing"


HEAL = Stage(
    name="heal",
    title="Healing",
    wanted=lambda prepared: prepared.config.emulator.heals is not None,
    workers=lambda config: config.finetune,
    inputs=_inputs,
    outputs=("emulator_healed",),
    scratch=(_PLACE,),
    run=_heal,
    cost=_cost,
    steps=_steps,
    reads=lambda context: (CALIBRATE.name,) if _rounds_by_grams(context) else (),
    is_shared=lambda context: True,
    resumes=True,
    summary=lambda result: f"{result['steps']} steps, mean divergence from the original {result['train_loss']:.3f}",
    note_if_left_out=no_healing,
    metrics=metrics_of(
        "healing", "heal", "steps", "train_loss", "history", "healed_layers", "teacher_rows", "teacher_bytes"
    ),
    metrics_keys=("healing",),
)
