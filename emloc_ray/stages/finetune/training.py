"""What each worker of the fine-tuning runs: the Hugging Face Trainer with PEFT on the emulator."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count

from emloc_ray.core.precision import computes_bfloat16
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.packing import num_sequences
from emloc_ray.errors import DamagedArtifactError
from emloc_ray.io.formats.json_lines import append_object, end_last_line
from emloc_ray.io.store.node_cache import ensure, exists, is_stored, publish
from emloc_ray.modeling.adapter import attach_adapter, load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import load_config, towers
from emloc_ray.modeling.experts import UnfusedExperts
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.inputs import on_device
from emloc_ray.modeling.loss import call_loss
from emloc_ray.modeling.packing import check_rows_apart
from emloc_ray.stages.finetune.batches import CALL, TEACHER, RankBatches
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import GroupSession, LoneSession, TrainingSession, own_environment
from emloc_ray.stages.finetune.validation import Validation
from emloc_ray.stages.finetune.zero import join_as_deepspeed_rank, scattered_in, step_was_finite, whole_parameters
from emloc_ray.stages.ray.departures import ASK_S
from emloc_ray.stages.ray.losses import is_out_of_memory
from emloc_ray.stages.ray.spans import timed
from emloc_ray.stages.ray.tasks import set_threads

_POLL_S = 0.5
_NOTHING, _ASK, _STOP = range(3)  # what the first rank says at a step


class EmulatorTrainer(Trainer):
    """The Hugging Face Trainer with our batches and a loss that makes logits only where labels are."""

    def __init__(
        self, job: FinetuneJob, batches: RankBatches, validation: Validation | None = None, **kwargs: Any
    ) -> None:
        # The Trainer asks for a data set to evaluate on, which `evaluate` has in `validation`.
        super().__init__(train_dataset=batches, eval_dataset=batches if validation else None, **kwargs)
        self.job, self.batches, self.validation = job, batches, validation
        # The loss below is already divided by the labels of all ranks and micro-steps together.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our own order, resumed by position: nothing is skipped over."""
        self.batches.trainer = self
        return DataLoader(self.batches, batch_size=None)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss over all labels of the step, so that ranks and micro-steps weigh by their labels."""
        device, others = inputs["input_ids"].device, (TEACHER, CALL, "labels")
        called = {key: value for key, value in inputs.items() if key not in others}
        call = replace(inputs[CALL], inputs=called).to(device)
        teacher = inputs[TEACHER].to(device) if TEACHER in inputs else None
        result = call_loss(model, call, self.accelerator.unwrap_model(model), teacher)
        # Averaging gradients over ranks divides by the world size once more.
        return result.loss_sum * self.accelerator.num_processes / num_items_in_batch

    def _prepare_input(self, data: Any) -> Any:
        """Takes a batch's tensors to the device without waiting for the copies, as those of pinned memory allow."""
        if isinstance(data, torch.Tensor) and not self.is_deepspeed_enabled:
            return on_device(data, self.args.device)
        return super()._prepare_input(data)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's; with ``loraplus_lr_ratio`` PEFT's LoRA+ of it (https://arxiv.org/abs/2402.12354)."""
        if self.optimizer is None and self.job.loraplus_lr_ratio is not None:
            adapted: Any = self.model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            self.optimizer = create_loraplus_optimizer(
                adapted,
                optimizer,
                loraplus_lr_ratio=self.job.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return super().create_optimizer(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss."""
        assert self.validation is not None
        metrics = {"eval_loss": self.validation.measure(self.model)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def gradients_are_finite(self) -> bool:
        """Asked before an optimizer step, or where DeepSpeed is, which does both at once, after it."""
        if self.is_deepspeed_enabled:
            return step_was_finite(self.model_wrapped)
        if (scaler := self.accelerator.scaler) is not None:
            # In fp16 an overflow is what the loss scale is found by: that step is left out, and the scale halved.
            return scaler.get_scale() >= 1
        model: Any = self.model
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # Asked once, not once a gradient: a GPU waits at each answer. The largest of all is not finite where any is not.
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients, float("inf"))))

    def save_adapter(self) -> None:
        """Rank 0 writes the adapter; all ranks have to call this."""
        model = self.accelerator.unwrap_model(self.model)
        state = whole_parameters(model) if self.is_deepspeed_enabled else None
        if self.is_world_process_zero():
            job = self.job
            save_trained_adapter(
                model, job.out_dir, targets=job.portable_targets, base_model=job.base_model, state=state
            )


class StepKeeper(TrainerCallback):
    """Seeds each step, logs, keeps checkpoints, and stops all ranks at a loss that is no number, or where asked to.

    Where a node is about to leave, it keeps a checkpoint at once.
    """

    def __init__(
        self, job: FinetuneJob, session: TrainingSession, poll_s: float = _POLL_S, ask_s: float = ASK_S
    ) -> None:
        """``poll_s``: seconds between looks whether it is to stop; ``ask_s``: between questions whether a node leaves."""
        self.job, self.session, self.poll_s = job, session, poll_s
        self.trainer: EmulatorTrainer | None = None
        self.failure: str | None = None
        self.stopped = self._saved_to_leave = False
        self.ask_s = ask_s
        self._looked = self._asked = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seeds the step."""
        # Dropout depends on the step alone, so that a resumed run repeats the uninterrupted one.
        torch.manual_seed((self.job.seed * 1_000_003 + state.global_step) * 1009 + self.session.rank)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Ends the training, its weights unchanged, at a loss that is no number."""
        assert self.trainer is not None
        if not self.trainer.gradients_are_finite():  # gradients are averaged by now: every rank sees the same
            self.failure = (
                f"The loss or a gradient is NaN or Inf at step {state.global_step + 1}: lower the learning rate."
            )
            for parameter in model.parameters():
                parameter.grad = None
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves and ends the training where it is asked to."""
        look = self._look(args.device, state.global_step)
        if look == _STOP:
            self.stopped = control.should_save = control.should_training_stop = True
        elif look == _ASK and not self._saved_to_leave and self.session.is_leaving():
            self._saved_to_leave = control.should_save = True  # and trains on: Ray may give it longer than it says

    def _look(self, device: torch.device, step: int) -> int:
        """The same on all ranks: the first looks now and then, and says at every step what it saw."""
        seen = _NOTHING
        if self.session.rank == 0 and time.monotonic() >= self._looked + self.poll_s:
            self._looked = time.monotonic()
            if not is_stored(self.job.storage_dir):  # where each write costs, the log says it
                self.job.step_path.write_text(str(step))
            if exists(self.job.stop_path):
                seen = _STOP
            elif time.monotonic() >= self._asked + self.ask_s:
                seen, self._asked = _ASK, time.monotonic()
        if self.session.world_size == 1:
            return seen
        heard = torch.tensor([float(seen)], device=device)
        torch.distributed.broadcast(heard, src=0)
        return int(heard.item())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Appends the losses to the job's log."""
        if logs and "loss" in logs and state.is_world_process_zero:
            append_object(self.job.log_path, {"step": state.global_step, **logs})
            publish(self.job.log_path)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands the checkpoint to the session, and removes the Trainer's copy."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _publish_events(self.job, self.session)
        if self.failure is None:
            if self.trainer is not None and self.trainer.validation is not None and self.session.rank == 0:
                self.trainer.validation.save(folder)
            # Every rank has files of its own there: the random state, and its part of what DeepSpeed scatters.
            self.session.save(folder if folder.is_dir() else None, state.global_step)
        shutil.rmtree(folder, ignore_errors=True)


def train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a Ray Train group runs; returns what the driver wants to know, ``peaks`` of its memory too."""
    if settings["device"] == "cpu":  # a Ray that our caller started lets every worker see its node's GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_threads(settings["threads"])
    job: FinetuneJob = settings["job"]
    if exists(job.out_of_memory_path):  # the group was restarted, and would run out once more
        return {"out_of_memory": True, "peaks": {}}
    try:
        outcome = timed(train)(job, GroupSession())
    except Exception as error:
        if is_out_of_memory(error):
            job.out_of_memory_path.parent.mkdir(parents=True, exist_ok=True)
            job.out_of_memory_path.touch()
            publish(job.out_of_memory_path)
        raise
    return {**outcome.result, "peaks": outcome.peaks}


def train_alone(job: FinetuneJob) -> dict[str, Any]:
    """The same in a Ray task, whose process may have trained before and may train again."""
    with own_environment():
        try:
            return train(job, LoneSession(job.storage_dir / job.name))
        finally:
            gc.collect()


def leaves_traces(job: FinetuneJob) -> bool:
    """Whether a training changes its process for the next one: switches of torch's, a model's functions that Liger takes the
    place of, a run that a tracker holds open."""
    arguments = job.training_arguments
    report_to = arguments.get("report_to") or "none"
    trackers = {report_to} if isinstance(report_to, str) else set(report_to)
    changes = any(arguments.get(key) for key in ("full_determinism", "tf32", "use_liger_kernel"))
    return changes or bool(trackers - {"none", "tensorboard"})


def train(job: FinetuneJob, session: TrainingSession) -> dict[str, Any]:
    """Trains one rank's part, from the newest checkpoint on, and writes the adapter."""
    _settle_reports(job)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer, keeper = _make_trainer(job, output_dir, session)
        if session.rank == 0:
            for path in (job.log_path, job.validation_path):
                ensure(path)
                end_last_line(path)
            job.begun_path.parent.mkdir(parents=True, exist_ok=True)
            job.begun_path.touch()
            publish(job.begun_path)
        with session.checkpoint() as folder:
            if folder is not None and trainer.validation is not None:
                trainer.validation.load(folder)
            try:
                output = trainer.train(resume_from_checkpoint=folder)
            except pickle.UnpicklingError as error:  # torch's weights-only loader found more than tensors and numbers
                raise DamagedArtifactError(
                    f"{folder} holds something else than a training's checkpoint: delete {job.storage_dir} and run the same"
                    " command again."
                ) from error
        _publish_events(job, session)
        if keeper.failure is None and not keeper.stopped:
            if trainer.validation is not None:
                trainer.validation.restore(trainer.model)
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


def _settle_reports(job: FinetuneJob) -> None:
    """Tells those whom ``report_to`` names where their files belong and which runs make up one training.

    transformers reads these from the environment, reports from rank 0 alone, and what is set there already stays.
    """
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.events_dir))
    os.environ.setdefault("WANDB_RUN_GROUP", job.name)


def _publish_events(job: FinetuneJob, session: TrainingSession) -> None:
    if session.rank == 0 and job.events_dir.is_dir():
        publish(job.events_dir)


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
            **job.training_arguments,
            "bf16": trains_in_bfloat16(job),
            **({"eval_strategy": "steps", "eval_steps": job.validation.every} if job.validation else {}),
            **({} if job.hold == "resident" else {"gradient_checkpointing": False}),  # its blocks are run again anyway
            **scattered,
        },
    )


def _make_trainer(job: FinetuneJob, output_dir: str, session: TrainingSession) -> tuple[EmulatorTrainer, StepKeeper]:
    arguments = _arguments(job, output_dir)
    with scattered_in(_stored_dtype(job)) if job.zero_config else contextlib.nullcontext():
        wide = {} if arguments.bf16 or job.model_options.get("dtype", "auto") != "auto" else _stored_float32(job)
        model = open_model(job.emulator_dir, job.hold, **{**job.model_options, **wide})
    if not model.supports_gradient_checkpointing:
        arguments.activation_checkpointing = arguments.gradient_checkpointing = False
    if arguments.ddp_find_unused_parameters is None:
        # Looked for in vain at every step, but for an expert that gets no token and a tower that gets no image.
        has_experts = any(isinstance(part, UnfusedExperts) for part in model.modules())
        arguments.ddp_find_unused_parameters = has_experts or bool(towers(model))
    if tokenizer := job.adapter.get("tokenizer_name_or_path"):  # which a prompt of a text is begun by
        ensure(Path(tokenizer), weights=False)
    torch.manual_seed(job.seed)  # the same A on every rank
    if job.start_dir is None:
        model = attach_adapter(model, adapter_config(**job.adapter))
    else:
        model = load_adapter(model, job.start_dir, trainable=True)
    if job.hold != "resident":  # DDP would make all ranks' weights the first one's, which are away
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        setattr(model, "_ddp_params_and_buffers_to_ignore", frozen)  # noqa: B010
    if job.pack_length is not None and not job.zero_config:  # whose scattered weights are whole inside its engine alone
        check_rows_apart(model, torch.bfloat16 if arguments.bf16 else model.dtype)
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
        validation,
        model=model,
        args=arguments,
        callbacks=[keeper, *([validation] if validation is not None else [])],
    )
    keeper.trainer = trainer
    return trainer, keeper


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
    dtype: torch.dtype | None = load_config(job.emulator_dir, trust_remote_code=trusted).dtype
    return dtype
