"""Healing as a step of a run: the original's logits are distilled into the emulator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emloc_ray.config.emulator import HealingConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.teacher_shards import BYTES_PER_LOGIT
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import discard_both_unless
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import healing_run, healing_split
from emloc_ray.planning.work import block_work, emulator_work, head_work, num_train_sequences, passes, rows_trained
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.finetune.stage import finetune_job, learned
from emloc_ray.stages.stage import Stage, by_weights, part

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

    prepared = replace(context.prepared, layout=context.layout_made)
    config, layout = prepared.config, prepared.layout
    own = context.with_prepared(healing_run(prepared, healing))
    training = replace(
        finetune_job(own, name),
        emulator_dir=context.unhealed_dir,
        tokens_dir=context.tokens(healing_split(config)),
        out_dir=context.path(_PLACE, "adapter"),
        storage_dir=context.path(_PLACE),
        teacher_dir=context.path(_PLACE, "teacher"),
        stage="heal",
    )
    num_workers = config.finetune.num_workers
    order = SampleOrder(len(TokenShards(training.tokens_dir)), training.batch_size, 0, num_workers, training.seed)
    teacher = TeacherJob(
        context.model_dir,
        training.tokens_dir,
        context.path(_PLACE, "teacher"),
        order,
        training.max_steps * config.finetune.gradient_accumulation_steps,
        healing.num_teacher_logits,
        training.loss_on,
        training.batch_size,
        training.pad_token_id,
        context.model_options,
        context.memory.teaching(training.batch_size).hold,
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
    )
    return HealingJob(teacher, training, fold)


def _inputs(context: Context) -> Inputs:
    prepared = replace(context.prepared.as_asked, layout=context.layout_made)
    config, healing = prepared.config, prepared.config.emulator.heals
    assert healing is not None
    training = healing_run(prepared, healing)
    if not training.layout.adapted:
        raise ConfigError(f"emulator.healing.r is {healing.r}, and no linear was given a rank above it: lower it.")
    return {
        "factorize": context.made["factorize"],
        **({"refine": context.made["refine"]} if config.emulator.refines is not None else {}),
        "data": context.split_key(healing_split(config)),
        "options": context.model_options,
        "healing": healing.model_dump(mode="json"),
        "finetune": learned(training.config.finetune, *_OWN),
        "ranks": prepared.layout.ranks,
        "quantization": config.emulator.quantization,
        "seed": config.seed,
        **({} if prepared.zero_config is None else {"deepspeed": prepared.zero_config}),
    }


def _heal(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.heal.heal import heal

    healing = context.prepared.config.emulator.heals
    assert healing is not None
    begun = context.begun(inputs)
    discard_both_unless(context.path(_PLACE), context.path("emulator_healed"), begun)
    job = healing_job(context, healing, f"heal-{fingerprint(begun)}")
    return heal(job, context.base_config(), granted, progress, context.note, context.detail)


def _cost(memory: MemoryModel) -> StageCost:
    """The healed emulator, and while it is made the teacher's logits (k · 6 bytes of a token) and training checkpoints."""
    prepared, layout, healing = memory.prepared, memory.layout, memory.config.emulator.heals
    assert healing is not None
    run = healing_run(prepared, healing)
    lengths, rows = run.lengths, rows_trained(run)
    taught, head = min(rows, num_train_sequences(run)) * lengths.mean, head_work(layout)
    lora = sum(healing.r * (s.out_features + s.in_features) for s in run.layout.specs if s.name in run.layout.adapted)
    again = prepared.config.finetune.gradient_checkpointing
    training = rows * lengths.mean * passes(again) * (emulator_work(layout) + 4 * head)
    batch_size = run.config.finetune.per_device_train_batch_size
    hold = MemoryModel(prepared, lengths).teaching(batch_size).hold
    return StageCost(
        MemoryModel(prepared, lengths).heal(),
        flops=training + taught * 2 * (block_work(layout) + 4 * head),
        moved_bytes=memory.moved(hold, taught / lengths.mean, batch_size),
        disk_bytes=int(memory.emulator_files + taught * healing.num_teacher_logits * BYTES_PER_LOGIT + 4 * 4 * lora),
        efficiency=0.2,
        start_seconds=30,
    )


def no_healing(config: RunConfig) -> str | None:
    """Says where healing is asked for and there is nothing to heal."""
    if config.emulator.healing is None or config.emulator.heals is not None:
        return None
    return "heal: at compression_ratio 1.0 the emulator is the original, so it is not healed."


def _steps(prepared: Prepared) -> tuple[int, str]:
    healing = prepared.config.emulator.heals
    assert healing is not None
    return healing.steps, "of healing"


def _summary(result: Result) -> str:
    return f"{result['steps']} steps, mean divergence from the original {result['train_loss']:.3f}"


HEAL = Stage(
    name="heal",
    title="Healing",
    wanted=lambda prepared: prepared.config.emulator.heals is not None,
    asks=lambda config: config.finetune,
    inputs=_inputs,
    outputs=("emulator_healed",),
    scratch=(_PLACE,),
    run=_heal,
    cost=_cost,
    steps=_steps,
    shares=by_weights,
    resumes=True,
    summary=_summary,
    absent=no_healing,
    sections=part(
        "healing", "heal", "steps", "train_loss", "history", "healed_layers", "teacher_rows", "teacher_bytes"
    ),
    keys=("healing",),
)
