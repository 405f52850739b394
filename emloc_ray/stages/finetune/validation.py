"""Scores the emulator while it is trained, and now and then the original with the same adapter; keeps the adapter of the
lowest score, and ends the training where scores rise."""

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from emloc_ray.data.ahead import made_ahead, pinned
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.io.formats.json_lines import append_object
from emloc_ray.io.store.node_cache import publish
from emloc_ray.modeling.adapter import load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_layers import keep_gains
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.loss import token_loss
from emloc_ray.stages.finetune.job import FinetuneJob, OriginalJob, ValidationJob
from emloc_ray.stages.finetune.session import TrainingSession

_FILE = "best_adapter.safetensors"  # in each checkpoint: what the scores before it came to


class Validation(TrainerCallback):
    """The scores of one training, the same on every rank.

    The adapter's best and the end go by the loss on the emulator, or on the original where that ``decides``. ``best_loss`` is
    the lowest score, in nats a token; infinite before the first. ``num_worse`` counts the scores since one was better by more
    than the threshold. ``best`` is the adapter of the lowest score, on the CPU; empty where the last one is wanted.
    """

    def __init__(self, job: FinetuneJob, asked: ValidationJob, session: TrainingSession) -> None:
        self.job, self.asked, self.session = job, asked, session
        self.best_loss, self.num_worse = float("inf"), 0
        self.best: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether its patience is used up, and the training with it."""
        return self.asked.patience is not None and self.num_worse >= self.asked.patience

    def losses(self, model: Any, step: int) -> dict[str, float]:
        """``eval_loss`` of the emulator, and where this score is one of the original too, ``eval_original_loss``."""
        losses, original = {"eval_loss": self.measure(model)}, self.asked.original
        number = -(-step // self.asked.every)
        if original is not None and (number % original.every == 0 or step >= self.job.max_steps):
            losses["eval_original_loss"] = self._on_original(model, original)
            gc.collect()  # cycles would hold the original's weights through the steps that follow
        return losses

    def _on_original(self, model: Any, original: OriginalJob) -> float:
        """As :meth:`measure`, for the original with the adapter as it is now, DoRA's magnitudes as the correction converts them.
        The adapter is read from a file, as the evaluation reads it."""
        with tempfile.TemporaryDirectory() as folder:
            path, job = Path(folder) / "adapter", self.job
            save_trained_adapter(model, path, targets=job.portable_targets, base_model=job.base_model)
            bare = open_model(original.model_dir, original.hold, **job.model_options)
            adapted = load_adapter(bare, path)
            keep_gains(adapted, model)
            return self.measure(adapted)

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        """The loss a label over all validation rows, in nats, of which each rank reads its part, a few batches at a time."""
        was_training = model.training
        model.eval()
        shards = TokenShards(self.asked.tokens_dir)
        order, size = np.argsort(shards.lengths(), kind="stable"), self.asked.batch_size
        starts = range(0, len(order), size)[self.session.rank :: self.session.world_size]
        parts = (map(shards.row, order[start : start + size].tolist()) for start in starts)
        sums = torch.zeros(2, dtype=torch.float64, device=model.device)
        for batch in made_ahead(map(list, parts), self._made, ahead=shards.has_images):
            scored = token_loss(model, batch, self.job.loss_on)
            sums[0] += scored.loss_sum
            sums[1] += scored.num_tokens
        if self.session.world_size > 1:
            torch.distributed.all_reduce(sums)
        model.train(was_training)
        loss, count = sums.tolist()
        return float(loss / count)

    def _made(self, rows: list[Tokens]) -> dict[str, Tensor]:
        return pinned(collate(rows, self.job.pad_token_id, self.job.images))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scores the last step too."""
        if state.global_step >= self.job.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: Any
    ) -> None:
        """Keeps the adapter of a new lowest score; ends the training after ``patience`` scores without one."""
        line = {"step": state.global_step, "loss": metrics["eval_loss"]}
        if (on_original := metrics.get("eval_original_loss")) is not None:
            line["original_loss"] = on_original
        if self.session.rank == 0:
            append_object(self.job.validation_path, line)
            publish(self.job.validation_path)
        if (loss := line.get(self.asked.goes_by)) is None:
            return
        self.num_worse = 0 if loss < self.best_loss - self.asked.threshold else self.num_worse + 1
        if loss < self.best_loss:
            self.best_loss = loss
            if self.asked.keeps_best:
                self.best = {name: p.detach().to("cpu", copy=True) for name, p in _trained(model)}
        if self.is_over:
            control.should_training_stop = True

    def save(self, folder: Path) -> None:
        """Writes what a later try goes on with into a checkpoint."""
        state = {"best_loss": self.best_loss, "num_worse": self.num_worse}
        save_file(self.best, folder / _FILE, {"scores": json.dumps(state)})

    def load(self, folder: str) -> None:
        """Goes on from a checkpoint."""
        with safe_open(Path(folder) / _FILE, "pt") as file:
            scores = json.loads(file.metadata()["scores"])
            self.best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        self.best_loss, self.num_worse = scores["best_loss"], scores["num_worse"]

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Gives the model the adapter of the lowest score, where that is kept."""
        for name, parameter in _trained(model):
            if name in self.best:
                parameter.copy_(self.best[name])


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
