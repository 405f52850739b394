"""Fine-tuning as a step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emloc_ray.config.base import StageConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.data.packing import num_sequences
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.layout import adapter_settings
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.work import num_steps, rows_a_step, steps_trained, training_cost
from emloc_ray.stages.context import Context, Inputs, Result, without
from emloc_ray.stages.stage import Stage, part

if TYPE_CHECKING:
    from emloc_ray.stages.finetune.job import FinetuneJob, ValidationJob
    from emloc_ray.stages.ray.tasks import Progress, Resources

# Settings of the fine-tuning that do not enter what comes out of it; its number of workers does, which orders the rows.
NOT_LEARNED = frozenset(
    {"cpus_per_worker", "gpus_per_worker", "max_failures", "deepspeed", "report_to", "run_name", "exact_steps"}
)

VALIDATION = frozenset(
    {
        "eval_strategy",
        "eval_steps",
        "num_validation_samples",
        "load_best_model_at_end",
        "early_stopping_patience",
        "early_stopping_threshold",
    }
)


def learned(section: FinetuneConfig, *own: str) -> Inputs:
    """The settings of the fine-tuning that its result follows from, but for some; ``bf16: auto`` follows from the machine."""
    machine = {"bf16"} if section.bf16 == "auto" else set()
    off = set() if section.packing else {"packing"}
    off |= set() if section.validates else VALIDATION
    off |= {"loraplus_lr_ratio"} if section.loraplus_lr_ratio is None else set()
    return without(section, NOT_LEARNED | machine | off | set(own))


def pack_length(config: RunConfig) -> int | None:
    """The tokens of a sequence that rows are packed into; None where they are not."""
    return config.data.max_seq_length if config.finetune.packing else None


def steps_of(context: Context) -> int:
    """Optimizer steps of the fine-tuning, from the rows that it has, or the packs that these make."""
    config = context.prepared.config
    return num_steps(config, num_sequences(context.tokens("train"), pack_length(config)))


def trained_tokens(context: Context) -> float:
    """Tokens that all steps of the fine-tuning read, of rows or packs of mean length."""
    return steps_of(context) * rows_a_step(context.prepared.config.finetune) * sequence_tokens(context)


def sequence_tokens(context: Context) -> float:
    """The mean tokens of a row, or of a pack of rows."""
    tokens_dir = context.tokens("train")
    sequences = num_sequences(tokens_dir, pack_length(context.prepared.config))
    return float(TokenShards(tokens_dir).index["tokens"]) / max(1, sequences)


def finetune_job(context: Context, name: str) -> FinetuneJob:
    """``name`` identifies the training, so that a later try resumes it."""
    from emloc_ray.stages.finetune.job import FinetuneJob

    prepared, config = context.prepared, context.prepared.config
    section, targets = config.finetune, context.layout.portable_targets
    return FinetuneJob(
        emulator_dir=context.emulator_dir,
        tokens_dir=context.tokens("train"),
        out_dir=context.path("adapter_emulator"),
        storage_dir=context.path("training"),
        name=name,
        adapter=_adapter_settings(context),
        portable_targets=targets if isinstance(targets, str) else list(targets),
        base_model=_base_model(context),
        max_steps=steps_of(context),
        batch_size=section.per_device_train_batch_size,
        seed=config.seed,
        loss_on=context.loss_on(),
        pad_token_id=context.pad_token_id(),
        max_failures=section.max_failures,
        training_arguments={"run_name": prepared.run.name, **_training_arguments(section)},
        zero_config=prepared.zero_config,
        model_options=context.model_options,
        hold=context.memory.finetune_hold(),
        pack_length=pack_length(config),
        validation=_validation_job(context),
        loraplus_lr_ratio=section.loraplus_lr_ratio,
        tokens_a_step=rows_a_step(section) * sequence_tokens(context),
        images=context.images,
    )


def _validation_job(context: Context) -> ValidationJob | None:
    from emloc_ray.stages.finetune.job import ValidationJob

    section = context.prepared.config.finetune
    if not section.validates:
        return None
    rows = (section.model_extra or {}).get("per_device_eval_batch_size", section.per_device_train_batch_size)
    return ValidationJob(
        context.tokens("validation"),
        section.eval_steps or section.save_steps,
        rows,
        section.load_best_model_at_end,
        section.early_stopping_patience,
        section.early_stopping_threshold,
    )


def _base_model(context: Context) -> str:
    """How the adapter's config names the original."""
    prepared = context.prepared
    if prepared.source.gguf_file is None:
        return prepared.config.model.source
    run = prepared.run
    return str(context.model_dir) if run.store is None else f"{run.place.partition('?')[0]}/model"


def _adapter_settings(context: Context) -> dict[str, Any]:
    settings = adapter_settings(context.prepared.config.adapter, context.layout, context.base_config())
    if settings.get("prompt_tuning_init") == "TEXT":
        settings["tokenizer_name_or_path"] = str(context.model_dir)
    return settings


def _training_arguments(section: Any) -> dict[str, Any]:
    """What the finetune section says to Hugging Face's TrainingArguments, but for what the stage sets itself."""
    own = {*StageConfig.model_fields, "loss_on", "max_steps", "num_train_epochs", "per_device_train_batch_size"}
    own |= {"max_failures", "deepspeed", "exact_steps", "packing", "loraplus_lr_ratio", *VALIDATION}
    dumped: dict[str, Any] = section.model_dump(mode="json", exclude=own)
    return dumped


def _inputs(context: Context) -> Inputs:
    prepared, config = context.prepared, context.prepared.config
    return {
        "emulator": context.emulator_key,
        "data": context.split_key("train"),
        **({"validation": context.split_key("validation")} if config.finetune.validates else {}),
        "options": context.model_options,
        "adapter": config.adapter.model_dump(mode="json"),
        "finetune": learned(context.prepared.as_asked.config.finetune),
        "steps": steps_of(context),
        "seed": config.seed,
        **({} if prepared.zero_config is None else {"deepspeed": prepared.zero_config}),
    }


def _finetune(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.finetune.finetune import finetune

    job = finetune_job(context, f"finetune-{fingerprint(context.begun(inputs))}")
    result = finetune(job, granted, progress, context.note, detail=context.detail)
    if rate := result.pop("sequences_per_second"):
        result["tokens_per_second"] = rate * sequence_tokens(context)
    return result


def _cost(memory: MemoryModel) -> StageCost:
    return training_cost(memory, steps_trained(memory.prepared))


def _steps(prepared: Prepared) -> tuple[int, str]:
    return steps_trained(prepared), f"on the {'emulator' if prepared.layout.differs else 'original'}"


def _summary(result: Result) -> str:
    text = f"{result['steps']} steps, training loss {result['train_loss']:.3f}"
    validation = result.get("validation")
    if not validation:
        return text
    best = min(validation["history"], key=lambda line: line["loss"])
    kept = ", whose adapter is kept" if validation["keeps_best"] else ""
    return f"{text}, lowest validation loss {best['loss']:.3f} at step {best['step']}{kept}"


FINETUNE = Stage(
    name="finetune",
    title="Fine-tuning",
    asks=lambda config: config.finetune,
    inputs=_inputs,
    outputs=("adapter_emulator",),
    scratch=("training",),
    run=_finetune,
    cost=_cost,
    steps=_steps,
    summary=_summary,
    sections=part(
        "finetune",
        "finetune",
        "steps",
        "train_loss",
        "history",
        "trainable_parameters",
        "tokens_per_second",
        "validation",
    ),
    keys=("finetune",),
)
