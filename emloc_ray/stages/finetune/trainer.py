"""The Hugging Face Trainer of an emulator, and what it does beside its steps: stops, checkpoints, a log."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.json_lines import append_object
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import exists, is_stored, publish
from emloc_ray.modeling.adapter import read_adapter, save_trained_adapter
from emloc_ray.modeling.inputs import on_device
from emloc_ray.modeling.loss import call_loss
from emloc_ray.stages.finetune.batches import CALL, TEACHER, RankBatches
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import TrainingSession
from emloc_ray.stages.finetune.validation import Validation
from emloc_ray.stages.finetune.zero import step_was_finite, whole_parameters
from emloc_ray.stages.ray.departures import ASK_S

_POLL_S = 0.5
STORE_POLL_S = 5.0  # on an object store, where each write and each look costs
_NOTHING, _ASK, _STOP = range(3)  # what rank 0 requests of all ranks at a step


class EmulatorTrainer(Trainer):
    """The Hugging Face Trainer with our batches and a loss that makes logits only where labels are."""

    def __init__(
        self,
        job: FinetuneJob,
        batches: RankBatches,
        keeper: StepKeeper,
        validation: Validation | None = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer asks for a data set to evaluate on, which `evaluate` has in `validation`.
        super().__init__(train_dataset=batches, eval_dataset=batches if validation else None, **kwargs)
        self.job, self.batches, self.keeper, self.validation = job, batches, keeper, validation
        keeper.trainer = self
        self.norm: float | None = None  # of the step's gradients
        # The loss below is already divided by the labels of all ranks and micro-steps together.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Our own order, resumed by position: nothing is skipped over."""
        self.batches.trainer = self
        self.batches.is_over = self.validation is not None and self.validation.is_over
        return DataLoader(self.batches, batch_size=None)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """A step's micro-batches, and how many labels those of all ranks have: counted on the host, which copies nothing."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        count = sum(len(batch[CALL].targets) for batch in batches)
        return batches, self.accelerator.gather(torch.full((1,), count, device=device)).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss over all labels of the step, so that ranks and micro-steps weigh by their labels."""
        device = inputs["input_ids"].device
        called = {key: value for key, value in inputs.items() if key not in (TEACHER, CALL)}
        call = replace(inputs[CALL], inputs=called).to(device)
        teacher = inputs[TEACHER].to(device) if TEACHER in inputs else None
        result = call_loss(model, call, self.model, teacher)
        # Averaging gradients over ranks divides by the world size once more.
        return result.loss_sum * self.accelerator.num_processes / num_items_in_batch

    def floating_point_ops(self, inputs: Any) -> int:
        """None: the Trainer's count, which nobody reads, goes through all modules at each micro-step."""
        return 0

    def _prepare_input(self, data: Any) -> Any:
        """Takes a batch's tensors to the device without waiting for the copies, as those of pinned memory allow."""
        if isinstance(data, Tensor) and not self.is_deepspeed_enabled:
            return on_device(data, self.args.device)
        return super()._prepare_input(data)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Reads the adapter on the CPU; the Trainer's leaves it to PEFT, which reads it on the first GPU on every rank."""
        adapted: Any = self.model if model is None else model
        read_adapter(adapted, Path(resume_from_checkpoint))

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
        """The validation losses."""
        assert self.validation is not None
        self._take_average()
        metrics = self.validation.losses(self.model, self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def gradients_are_finite(self) -> bool:
        """Whether this step's gradients are numbers. Asked before an optimizer step; under DeepSpeed, which takes both at once,
        after it."""
        if self.is_deepspeed_enabled:
            return step_was_finite(self.model_wrapped)
        if (scaler := self.accelerator.scaler) is not None:
            # In fp16 an overflow is what the loss scale is found by: that step is left out, and the scale halved.
            return scaler.get_scale() >= 1
        return self.norm is not None and math.isfinite(self.norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float | None:
        """As a number, which is none where a gradient is not: the check and the log wait for a GPU once, and with it all ranks
        hear what the first one says."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.norm = self.keeper.sync_norm_and_stop(norm, self.args.device, self.state.global_step + 1)
        return self.norm

    def _take_average(self) -> None:
        """Gives the model the weights that the optimizer returns, where a schedule-free one takes gradients at others. The next
        training step sets that back."""
        if callable(settle := getattr(self.optimizer, "eval", None)):
            settle()

    def save_adapter(self) -> None:
        """Rank 0 writes the adapter, that of the lowest score where that is kept; all ranks have to call this."""
        self._take_average()
        if self.validation is not None:
            self.validation.restore(self.model)
        model = self.accelerator.unwrap_model(self.model)
        state = whole_parameters(model) if self.is_deepspeed_enabled else None
        if self.is_world_process_zero():
            job = self.job
            save_trained_adapter(
                model, job.out_dir, targets=job.portable_targets, base_model=job.base_model, state=state
            )


class StepKeeper(TrainerCallback):
    """Seeds each step, logs, keeps checkpoints, and stops all ranks at a loss that is no number, or where asked to. Where a
    node is about to leave, it keeps a checkpoint at once."""

    def __init__(
        self, job: FinetuneJob, session: TrainingSession, poll_s: float = _POLL_S, ask_s: float = ASK_S
    ) -> None:
        """``poll_s``: seconds between polls of the stop file; ``ask_s``: between questions whether a node is about to leave."""
        self.job, self.session, self.poll_s = job, session, poll_s
        self.trainer: EmulatorTrainer | None = None
        self.failure: str | None = None
        self.stopped = self._saved_to_leave = False
        self._request = _NOTHING
        self.ask_s = ask_s
        self._polled_at = self._asked_node_at = self._shown_at = time.monotonic()
        self._line: dict[str, Any] = {}  # the log's newest

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports the step that training begins at. Saves as often as this job asks, not as a checkpoint's job did."""
        state.compute_steps(args, state.max_steps)
        self._show(state.global_step)

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
        """Saves and ends the training where it is asked to. Logs where it is saved, as who goes on from there begins a new mean,
        and where the training may end: of steps that no log gathers transformers takes this rank's loss for all."""
        if self._request == _STOP:
            self.stopped = control.should_save = control.should_training_stop = True
        elif self._request == _ASK and not self._saved_to_leave and self.session.is_leaving():
            self._saved_to_leave = control.should_save = True  # and trains on: Ray may give it longer than it says
        control.should_log |= control.should_save or control.should_evaluate or state.global_step >= self.job.max_steps

    def sync_norm_and_stop(self, norm: Tensor | float | None, device: torch.device, step: int) -> float | None:
        """The gradient norm as a number, the same on all ranks; rank 0 sends its stop request with it."""
        self._request = self._poll(step)
        if self.session.world_size > 1:
            own_norm = torch.as_tensor(math.nan if norm is None else norm, dtype=torch.float64, device=device)
            message = torch.stack([own_norm, torch.full_like(own_norm, self._request)])
            torch.distributed.broadcast(message, src=0)
            norm_of_rank_0, self._request = message.tolist()
            return None if norm is None else norm_of_rank_0
        return float(norm) if isinstance(norm, Tensor) else norm

    def _poll(self, step: int) -> int:
        """Rank 0's request, at most every ``poll_s``: to stop, or that each rank asks whether its node is about to leave."""
        request = _NOTHING
        if self.session.rank == 0 and time.monotonic() >= self._polled_at + self.poll_s:
            self._polled_at = time.monotonic()
            with contextlib.suppress(ArtifactError, OSError):  # a store that does not answer now is asked again
                if not is_stored(self.job.storage_dir) or self._polled_at >= self._shown_at + STORE_POLL_S:
                    self._show(step)
                if exists(self.job.stop_path):
                    return _STOP
            if time.monotonic() >= self._asked_node_at + self.ask_s:
                request, self._asked_node_at = _ASK, time.monotonic()
        return request

    def _show(self, done: int) -> None:
        """Leaves for the driver how far it is, in a small file: the log grows with the training."""
        if self.session.rank == 0:
            path, self._shown_at = self.job.step_path, time.monotonic()
            check_lock(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"done": done, **self._line}))
            publish(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Appends the losses to the job's log. A store is given it with each checkpoint: what comes after that a later try logs
        again."""
        if logs and "loss" in logs and state.is_world_process_zero:
            self._line = {"step": state.global_step, **logs}
            append_object(self.job.log_path, self._line)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands the checkpoint to the session, and removes the Trainer's copy."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        publish_logs(self.job, self.session)
        if self.failure is None:
            if self.trainer is not None and self.trainer.validation is not None and self.session.rank == 0:
                self.trainer.validation.save(folder)
            # Every rank has files of its own there: the random state, and its part of what DeepSpeed scatters.
            self.session.save(folder if folder.is_dir() else None, state.global_step)
        shutil.rmtree(folder, ignore_errors=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tells its last step."""
        self._show(state.global_step)


def publish_logs(job: FinetuneJob, session: TrainingSession) -> None:
    """Hands the log, and the events of those whom ``report_to`` names, to the run's storage; the first rank has them."""
    for path in (job.log_path, job.events_dir):
        if session.rank == 0 and path.exists():
            publish(path)
