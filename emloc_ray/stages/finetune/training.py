"""What each worker of the fine-tuning runs: the Hugging Face Trainer with PEFT on the emulator."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, enable_full_determinism
from transformers.trainer_pt_utils import get_model_param_count

from emloc_ray.core.precision import computes_bfloat16
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.packing import num_sequences
from emloc_ray.errors import DamagedArtifactError
from emloc_ray.io.formats.json_lines import end_last_line, keep_objects
from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.node_cache import discard, ensure, exists
from emloc_ray.io.store.replacing import naming_full_disk
from emloc_ray.modeling.adapter import attach_adapter, load_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import load_config, towers
from emloc_ray.modeling.compiling import KEYS, check_compiling, compile_blocks, is_compiled
from emloc_ray.modeling.experts import UnfusedExperts
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.liger import check_liger
from emloc_ray.modeling.packing import check_rows_apart
from emloc_ray.stages.finetune.batches import RankBatches
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import GroupSession, LoneSession, TrainingSession, own_environment, step_of
from emloc_ray.stages.finetune.trainer import EmulatorTrainer, StepKeeper, publish_logs
from emloc_ray.stages.finetune.validation import Validation
from emloc_ray.stages.finetune.watchdog import Watchdog
from emloc_ray.stages.finetune.zero import join_as_deepspeed_rank, scattered_in
from emloc_ray.stages.ray.losses import is_out_of_memory
from emloc_ray.stages.ray.pace import end_process
from emloc_ray.stages.ray.spans import Span, timed
from emloc_ray.stages.ray.tasks import set_threads

# Of a training beside one that is scored, whose arguments it has.
_UNSCORED = {"eval_on_start": False}


def train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a Ray Train group runs; returns what the driver wants to know, and each rank's span: Ray Train
    hands on what the first one returns."""
    if settings["device"] == "cpu":  # a Ray that our caller started lets every worker see its node's GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_threads(settings["threads"], in_group=True)
    job: FinetuneJob = settings["job"]
    if exists(job.out_of_memory_path):  # the group was restarted, and would run out once more
        return {"out_of_memory": True, "spans": []}
    try:
        outcome = timed(train)(job, GroupSession(job.place))
    except Exception as error:
        if is_out_of_memory(error):
            write_text(job.out_of_memory_path, "")
        raise
    return {**outcome.result, "spans": of_ranks(outcome.span)}


def of_ranks(own: Span) -> list[Span]:
    """What each rank of this process's group says, by rank. All ranks call it."""
    said = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, own)
    return said


def train_alone(job: FinetuneJob) -> dict[str, Any]:
    """The same in a Ray task, whose process may have trained before and may train again."""
    with own_environment():
        try:
            return train(job, LoneSession(job.place))
        finally:
            gc.collect()


def train(job: FinetuneJob, session: TrainingSession) -> dict[str, Any]:
    """Trains one rank's part, from the newest checkpoint on, and writes the adapter."""
    _configure_trackers(job)
    if session.rank == 0:
        discard(job.last_word_path)  # of an earlier try, told by now
    watchdog = Watchdog(job.planned_s, functools.partial(end_process, job.last_word_path))
    with watchdog, tempfile.TemporaryDirectory() as output_dir:
        trainer, keeper = _make_trainer(job, output_dir, session, watchdog)
        if session.rank == 0:
            write_text(job.begun_path, "")
        with session.checkpoint() as folder:
            if session.rank == 0:
                _trim_logs(job, -1 if folder is None else step_of(Path(folder).name))
            if folder is not None and trainer.validation is not None:
                trainer.validation.load(folder)
                trainer.args.eval_on_start = False  # the first try has scored its start
            try:
                with naming_full_disk(Path(output_dir)):  # checkpoints are written there first
                    output = trainer.train(resume_from_checkpoint=folder)
            except pickle.UnpicklingError as error:  # torch's weights-only loader found more than tensors and numbers
                raise DamagedArtifactError(
                    f"{folder} holds something else than a training's checkpoint: delete {job.storage_dir} and run the same"
                    " command again."
                ) from error
        publish_logs(job, session)
        if keeper.failure is None and not keeper.stopped:
            trainer.save_adapter()
    a_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * session.world_size
    outcome = {"failure": keeper.failure, "stopped": keeper.stopped, "resumed": folder is not None}
    return {
        **outcome,
        "steps": output.global_step,
        "train_loss": output.training_loss,
        "trainable_parameters": get_model_param_count(trainer.model, trainable_only=True),
        "sequences_per_second": output.global_step * a_step / output.metrics["train_runtime"],
    }


def _trim_logs(job: FinetuneJob, reached: int) -> None:
    """Drops what an earlier try logged after the step that this one goes on from. These steps are done again, and maybe logged
    at others: a line is the mean since the line before."""
    for path in (job.log_path, job.validation_path):
        ensure(path)
        keep_objects(path, lambda line: line["step"] <= reached)
        end_last_line(path)


def _configure_trackers(job: FinetuneJob) -> None:
    """Sets where the trackers of ``report_to`` write, and the group that all tries of one training share.

    transformers reads both from the environment and reports from rank 0 alone. A value that is set already stays.
    """
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.events_dir))
    os.environ.setdefault("WANDB_RUN_GROUP", job.name)


def _arguments(job: FinetuneJob, output_dir: str) -> TrainingArguments:
    """The Trainer's arguments: the job's own over our defaults, and over these what the stage decides."""
    scattered = {"deepspeed": job.zero_config, **join_as_deepspeed_rank()} if job.zero_config else {}
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=job.max_steps,
        per_device_train_batch_size=job.batch_size,
        seed=job.seed,
        remove_unused_columns=False,
        ignore_data_skip=True,
        **{
            "save_strategy": "steps",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "use_cpu": not torch.cuda.is_available(),
            **{key: value for key, value in job.training_arguments.items() if key not in KEYS},
            "bf16": trains_in_bfloat16(job),
            **({"eval_strategy": "steps", "eval_steps": job.validation.every} if job.validation else _UNSCORED),
            **({} if job.hold == "resident" else {"gradient_checkpointing": False}),  # its blocks are run again anyway
            **scattered,
        },
    )


def _make_trainer(
    job: FinetuneJob, output_dir: str, session: TrainingSession, watchdog: Watchdog
) -> tuple[EmulatorTrainer, StepKeeper]:
    arguments = _arguments(job, output_dir)
    if arguments.full_determinism:  # before the first product: torch reads cuBLAS's variable once, then
        enable_full_determinism(job.seed)
    model = _opened(job, arguments)
    _fit_arguments(job, arguments, model)
    model = _adapted(job, model, arguments)
    order = SampleOrder(
        num_sequences(job.tokens_dir, job.pack_length),
        job.batch_size,
        session.rank,
        session.world_size,
        job.seed,
        job.pack_length,
    )
    keeper = StepKeeper(job, session)
    validation = Validation(job, job.validation, session) if job.validation is not None else None
    trainer = EmulatorTrainer(
        job,
        RankBatches(job, order, arguments.gradient_accumulation_steps),
        keeper,
        validation,
        model=model,
        args=arguments,
        callbacks=[keeper, *([validation] if validation is not None else []), watchdog],
    )
    return trainer, keeper


def _opened(job: FinetuneJob, arguments: TrainingArguments) -> Any:
    """The emulator, its blocks compiled where that is asked for."""
    with scattered_in(_stored_dtype(job)) if job.zero_config else contextlib.nullcontext():
        wide = {} if arguments.bf16 or job.model_options.get("dtype", "auto") != "auto" else _stored_float32(job)
        model = open_model(job.emulator_dir, job.hold, **{**job.model_options, **wide})
    if arguments.use_liger_kernel:  # for the driver's machine may not know
        check_liger(model.config.model_type, _has_experts(model), arguments.liger_kernel_config)
    if is_compiled(job.training_arguments):
        check_compiling(_has_experts(model), job.zero_config is not None, job.hold != "resident")
        compile_blocks(model, job.training_arguments)
    return model


def _has_experts(model: Any) -> bool:
    return any(isinstance(part, UnfusedExperts) for part in model.modules())


def _fit_arguments(job: FinetuneJob, arguments: TrainingArguments, model: Any) -> None:
    """Sets what follows from model and adapter: whether blocks may be run again, and what DDP looks for and sends; and one GPU a
    process, where it sees several: the Trainer would split every batch over them (``nn.DataParallel``)."""
    setattr(arguments, "_n_gpu", min(1, arguments.n_gpu))  # noqa: B010
    if not model.supports_gradient_checkpointing:
        arguments.activation_checkpointing = arguments.gradient_checkpointing = False
    if arguments.ddp_find_unused_parameters is None:
        # Looked for in vain at every step, but for an expert that gets no token, a tower that gets no image, and an adapter
        # that drops whole modules.
        drops = bool(job.adapter.get("module_dropout"))
        arguments.ddp_find_unused_parameters = drops or _has_experts(model) or bool(towers(model))
    if arguments.ddp_broadcast_buffers is None:  # they never change, and are most of an emulator in few bits
        arguments.ddp_broadcast_buffers = False


def _adapted(job: FinetuneJob, model: Any, arguments: TrainingArguments) -> Any:
    """The model with the adapter to train: a new one, the same on every rank, or that of ``job.start_dir``."""
    if tokenizer := job.adapter.get("tokenizer_name_or_path"):  # which a prompt of a text is begun by
        ensure(Path(tokenizer), weights=False)
    torch.manual_seed(job.seed)  # the same A on every rank
    if job.start_dir is None:
        model = attach_adapter(model, adapter_config(**job.adapter))
    else:
        model = load_adapter(model, job.start_dir, trainable=True, lora_dropout=job.adapter.get("lora_dropout"))
    # DDP would send every rank the first one's frozen weights, which it has read itself, or which are away.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    setattr(model, "_ddp_params_and_buffers_to_ignore", frozen)  # noqa: B010
    if job.pack_length is not None and not job.zero_config:  # whose scattered weights are whole inside its engine alone
        check_rows_apart(model, torch.bfloat16 if arguments.bf16 else model.dtype)
    return model


def trains_in_bfloat16(job: FinetuneJob) -> bool:
    """As asked; else as the DeepSpeed config has it, or where this worker's GPU computes it and no other dtype is asked for."""
    arguments, zero = job.training_arguments, (job.zero_config or {}).get("bf16", {})
    asked = arguments.get("bf16", "auto")
    if asked != "auto":
        return bool(asked)
    if isinstance(zero.get("enabled"), bool):
        return bool(zero["enabled"])
    others = any(arguments.get(key) for key in ("fp16", "use_cpu"))
    return not others and computes_bfloat16("cuda" if torch.cuda.is_available() else "cpu")


def _stored_float32(job: FinetuneJob) -> dict[str, str]:
    """What keeps the weights of a float32 emulator in float32 where its passes are not to be in bfloat16."""
    return {"dtype": "float32"} if _dtype_of_files(job) == torch.float32 else {}


def _stored_dtype(job: FinetuneJob) -> torch.dtype:
    """The dtype that the emulator's weights are loaded in."""
    named = job.model_options.get("dtype", "auto")
    if named != "auto":
        return getattr(torch, named)
    return _dtype_of_files(job) or torch.float32


def _dtype_of_files(job: FinetuneJob) -> torch.dtype | None:
    trusted = job.model_options.get("trust_remote_code", False)
    return load_config(job.emulator_dir, trust_remote_code=trusted).dtype
