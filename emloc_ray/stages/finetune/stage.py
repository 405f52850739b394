"""Fine-tuning as a step of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emloc_ray.config.base import StageConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.data.packing import num_sequences
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.layout import Layout, adapter_settings
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Training
from emloc_ray.planning.work import num_steps, rows_a_step, steps_trained, training_cost, validation_cost
from emloc_ray.stages.context import Context, Inputs, Result, without
from emloc_ray.stages.stage import Stage, metrics_of
from emloc_ray.text import described_bits

if TYPE_CHECKING:
    from emloc_ray.stages.finetune.job import FinetuneJob, ValidationJob
    from emloc_ray.stages.ray.tasks import Progress, Resources

# Settings of the fine-tuning that do not enter what comes out of it; its number of workers does, which orders the rows.
NOT_LEARNED = frozenset(
    {
        "cpus_per_worker",
        "gpus_per_worker",
        "max_failures",
        "deepspeed",
        "report_to",
        "run_name",
        "exact_steps",
        "disable_tqdm",
        "include_num_input_tokens_seen",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_strategy",
        "project",
        "save_on_each_node",
        "save_strategy",
        "save_total_limit",
        "skip_memory_metrics",
        "trackio_space_id",
        "torch_empty_cache_steps",
        "ddp_timeout",
    }
)

VALIDATION = frozenset(
    {
        "eval_strategy",
        "eval_steps",
        "eval_original_every",
        "metric_for_best_model",
        "num_validation_samples",
        "load_best_model_at_end",
        "early_stopping_patience",
        "early_stopping_threshold",
    }
)
_SCORED_BY_TRAINER = frozenset({"eval_delay", "eval_on_start", "per_device_eval_batch_size"})


def learned(section: FinetuneConfig, *own: str) -> Inputs:
    """The settings that decide what a training learns, but for ``own``; ``bf16: auto`` follows from the machine."""
    machine = {"bf16"} if section.bf16 == "auto" else set()
    off = set() if section.packing else {"packing"}
    off |= set() if section.validates else VALIDATION | _SCORED_BY_TRAINER
    off |= {"eval_original_every", "metric_for_best_model"} if section.eval_original_every is None else set()
    off |= {"loraplus_lr_ratio"} if section.loraplus_lr_ratio is None else set()
    settings = without(section, NOT_LEARNED | machine | off | set(own))
    unread = {"logging_steps"}
    if not section.validates or section.eval_steps is not None:  # else it says when the emulator is scored
        unread.add("save_steps")
    if section.max_steps != -1 and "num_train_epochs" in settings:
        unread.add("num_train_epochs")
    return settings | {key: FinetuneConfig.model_fields[key].default for key in unread}


def steps_of(context: Context) -> int:
    """Optimizer steps of the fine-tuning, from the rows that it has, or the packs that these make."""
    training = context.prepared.finetuning
    return num_steps(training.section, _sequences(context, training))


def steps_done(context: Context) -> int:
    """The steps that the fine-tuning took, which may have stopped early; once it has: before, those that it is to take."""
    return int(context.results.get("finetune", {}).get("steps", steps_of(context)))


def trained_tokens(context: Context) -> float:
    """Tokens that all steps of the fine-tuning read, of rows or packs of mean length."""
    training = context.prepared.finetuning
    return float(steps_done(context)) * rows_a_step(training.section) * _sequence_tokens(context, training)


def _pack_length(context: Context, training: Training) -> int | None:
    return context.prepared.config.data.max_seq_length if training.section.packing else None


def _sequences(context: Context, training: Training) -> int:
    return num_sequences(context.tokens(training.split), _pack_length(context, training))


def _sequence_tokens(context: Context, training: Training) -> float:
    """The mean tokens of a row, or of a pack of rows."""
    tokens = TokenShards(context.tokens(training.split)).index["tokens"]
    return float(tokens) / max(1, _sequences(context, training))


def finetune_job(context: Context, name: str, training: Training | None = None) -> FinetuneJob:
    """The job of a training, by default the fine-tuning; ``name`` identifies it, so that a later try resumes it."""
    from emloc_ray.stages.finetune.job import FinetuneJob

    prepared = context.prepared
    training = training or prepared.finetuning
    section, targets = training.section, training.layout.portable_targets
    memory = MemoryModel(prepared, training=training)
    return FinetuneJob(
        emulator_dir=context.emulator_dir,
        tokens_dir=context.tokens(training.split),
        out_dir=context.path("adapter_emulator"),
        storage_dir=context.path("training"),
        name=name,
        adapter=_adapter_settings(context, training),
        portable_targets=targets if isinstance(targets, str) else list(targets),
        base_model=context.prepared.original_name,
        max_steps=num_steps(section, _sequences(context, training)),
        batch_size=section.per_device_train_batch_size,
        seed=prepared.config.seed,
        loss_on=context.loss_on(training),
        pad_token_id=context.pad_token_id(),
        max_failures=section.max_failures,
        training_arguments={"run_name": prepared.run.name, **_training_arguments(section)},
        zero_config=prepared.zero_config,
        model_options=context.model_options,
        hold=memory.finetuning_hold(),
        pack_length=_pack_length(context, training),
        validation=_validation_job(context, section, memory),
        loraplus_lr_ratio=section.loraplus_lr_ratio,
        tokens_a_step=rows_a_step(section) * _sequence_tokens(context, training),
        images=context.images,
    )


def _validation_job(context: Context, section: FinetuneConfig, memory: MemoryModel) -> ValidationJob | None:
    from emloc_ray.stages.finetune.job import OriginalJob, ValidationJob

    original = None
    if not section.validates:
        return None
    if section.eval_original_every is not None and context.layout.differs:
        decides = section.metric_for_best_model == "eval_original_loss"
        original = OriginalJob(context.model_dir, section.eval_original_every, memory.validation_plan().hold, decides)
    return ValidationJob(
        context.tokens("validation"),
        section.scores_every,
        memory.validation_rows(),
        section.load_best_model_at_end,
        section.early_stopping_patience,
        section.early_stopping_threshold,
        original,
    )


def _adapter_settings(context: Context, training: Training) -> dict[str, Any]:
    settings = adapter_settings(training.adapter, training.layout, context.base_config())
    settings["revision"] = context.prepared.source.revision  # of the base that PEFT's Auto classes load
    if settings.get("prompt_tuning_init") == "TEXT":
        settings["tokenizer_name_or_path"] = str(context.model_dir)
    return settings


def _training_arguments(section: Any) -> dict[str, Any]:
    """What the finetune section says to Hugging Face's TrainingArguments, but for what the stage sets itself."""
    own = {*StageConfig.model_fields, "loss_on", "max_steps", "num_train_epochs", "per_device_train_batch_size"}
    own |= {"max_failures", "deepspeed", "exact_steps", "packing", "loraplus_lr_ratio", *VALIDATION}
    return section.model_dump(mode="json", exclude=own)


def _inputs(context: Context) -> Inputs:
    prepared, config = context.prepared, context.prepared.config
    return {
        "emulator": context.emulator_key,
        "data": context.split_key("train"),
        **({"validation": context.split_key("validation")} if config.finetune.validates else {}),
        "options": context.model_options,
        "adapter": config.adapter.model_dump(mode="json"),
        "finetune": learned(context.prepared.for_fingerprints.config.finetune),
        "steps": steps_of(context),
        "seed": config.seed,
        **({} if prepared.zero_config is None else {"deepspeed": prepared.zero_config}),
    }


def _finetune(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.finetune.finetune import finetune

    job = finetune_job(context, f"finetune-{fingerprint(context.begun(inputs))}")
    result = finetune(job, granted, progress, context.note, detail=context.detail)
    if rate := result.pop("sequences_per_second"):
        result["tokens_per_second"] = rate * _sequence_tokens(context, context.prepared.finetuning)
    return result


def _cost(memory: MemoryModel) -> StageCost:
    cost = training_cost(memory, steps_trained(memory.prepared))
    return replace(cost, scores=validation_cost(memory)) if memory.config.finetune.validates else cost


def _summary(result: Result) -> str:
    text = f"{result['steps']} steps, training loss {result['train_loss']:.3f}"
    validation = result.get("validation")
    if not validation:
        return text
    goes_by = validation.get("goes_by", "loss")
    best = min((line for line in validation["history"] if goes_by in line), key=lambda line: line[goes_by])
    where = " on the original" if goes_by == "original_loss" else ""
    kept = ", whose adapter is kept" if validation["keeps_best"] else ""
    return f"{text}, lowest validation loss{where} {best[goes_by]:.3f} at step {best['step']}{kept}"


def _trained_on(layout: Layout) -> str:
    if layout.ranks or layout.budget is not None:
        return "on the emulator"
    return f"on the original in {described_bits(layout.quantization)}" if layout.quantized else "on the original"


FINETUNE = Stage(
    name="finetune",
    title="Fine-tuning",
    workers=lambda config: config.finetune,
    inputs=_inputs,
    outputs=("adapter_emulator",),
    scratch=("training",),
    run=_finetune,
    cost=_cost,
    steps=lambda prepared: (steps_trained(prepared), _trained_on(prepared.layout)),
    summary=_summary,
    metrics=metrics_of(
        "finetune",
        "finetune",
        "steps",
        "train_loss",
        "history",
        "trainable_parameters",
        "tokens_per_second",
        "validation",
    ),
    metrics_keys=("finetune",),
)
