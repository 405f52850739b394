"""Exact finishing: a few steps of the corrected adapter on the original itself, its learning rate falling to zero.

The correction's closed forms work layer by layer; only steps on the original can learn how its layers act together. Where
the original does not fit, its blocks come and go (:mod:`emloc_ray.modeling.holding`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emloc_ray.config.schema import RunConfig
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import worker_rows
from emloc_ray.planning.work import block_work, steps_cost
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.finetune.stage import finetune_job, learned, steps_done, steps_of
from emloc_ray.stages.stage import Stage, metrics_of

if TYPE_CHECKING:
    from emloc_ray.stages.finetune.job import FinetuneJob
    from emloc_ray.stages.ray.tasks import Progress, Resources


# Of the fine-tuning's learning rate. Adam starts without averages of gradients: its first steps are as long as the rate allows.
# Six steps of the 135M took a task of short answers from 2.66 to 2.76 nats at the whole rate, to 2.59 at 0.3 of it.
LEARNING_RATE_SHARE = 0.3


def finishing_job(context: Context, name: str) -> FinetuneJob:
    """Goes on with the rows that the fine-tuning would read next, at a learning rate that falls to zero from
    :data:`LEARNING_RATE_SHARE` of the fine-tuning's; ``name`` is what a later try goes on from."""
    config, job = context.prepared.config, finetune_job(context, name)
    falls = {
        "learning_rate": LEARNING_RATE_SHARE * config.finetune.learning_rate,
        "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": None,  # another schedule's
        "warmup_steps": 0,
        "logging_steps": 1,
    }
    rows = context.memory.finishing_rows()
    passes = {
        "gradient_accumulation_steps": worker_rows(config.finetune, config.finetune) // rows,
        "gradient_checkpointing": runs_again(config),
    }
    return replace(
        job,
        emulator_dir=context.model_dir,
        start_dir=context.path("adapter"),
        out_dir=context.path("adapter_finished"),
        storage_dir=context.path("finishing"),
        max_steps=config.finetune.exact_steps,
        batch_size=rows,
        steps_before=steps_done(context),
        training_arguments={**job.training_arguments, **falls, **passes},
        zero_config=None,
        stage="finish",
        validation=None,
        hold=context.memory.finishing_plan().hold,
    )


def _inputs(context: Context) -> Inputs:
    config = context.prepared.config
    return {
        "adapter": context.contents("adapter"),
        "correct": context.made["correct"],
        "model": context.model_key,
        "data": context.split_key("train"),
        "options": context.model_options,
        "finetune": learned(context.prepared.for_fingerprints.config.finetune),
        "steps": [steps_of(context), config.finetune.exact_steps],
        "learning_rate_share": LEARNING_RATE_SHARE,
        "seed": config.seed,
    }


def _finish(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.finetune.finetune import finetune

    begun = {**context.begun(inputs), "rows": context.memory.finishing_rows()}
    job = finishing_job(context, f"finish-{fingerprint(begun)}")
    return finetune(job, granted, progress, context.note, detail=context.detail)


def _cost(memory: MemoryModel) -> StageCost:
    steps, work, again = memory.config.finetune.exact_steps, block_work(memory.layout), runs_again(memory.config)
    plan, rows = memory.finishing_plan(), memory.finishing_rows()
    return steps_cost(memory, steps, plan, rows, work, again, memory.corrected_parameters)


def runs_again(config: RunConfig) -> bool:
    """Whether blocks are run again in the backward pass; a prefix works through a cache that this would fill twice."""
    return config.adapter.method != "prefix_tuning"


def no_finishing(config: RunConfig) -> str | None:
    """Says where exact steps are asked for and every step is one on the original."""
    steps = config.finetune.exact_steps
    if not steps:
        return None
    return (
        f"finish: the emulator is the original itself, so finetune.exact_steps: {steps} is not read: add them to"
        " finetune.max_steps."
    )


FINISH = Stage(
    name="finish",
    title="Finishing on the original",
    verb="correct",
    wanted=lambda prepared: prepared.finishes,
    workers=lambda config: config.finetune,
    inputs=_inputs,
    outputs=("adapter_finished",),
    scratch=("finishing",),
    run=_finish,
    cost=_cost,
    steps=lambda prepared: (prepared.config.finetune.exact_steps, "on the original"),
    summary=lambda result: f"{result['steps']} steps on the original, training loss {result['train_loss']:.3f}",
    note_if_left_out=no_finishing,
    metrics=metrics_of("finishing", "finish", "steps", "train_loss", "history"),
    metrics_keys=("finishing",),
)
