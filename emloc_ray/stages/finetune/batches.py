"""The batches that a rank of a training reads, as the model is called with them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from emloc_ray.data.ahead import made_ahead, pinned
from emloc_ray.data.formats import Tokens
from emloc_ray.data.ingest import SampleOrder, stream_batches
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.io.formats.teacher_shards import TeacherShards
from emloc_ray.modeling.attention import is_flash
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import TopLogProbs
from emloc_ray.modeling.packing import as_one_row
from emloc_ray.stages.finetune.job import FinetuneJob

TEACHER, CALL = "teacher", "call"  # what a batch holds beside what the model is called with


class RankBatches(IterableDataset[dict[str, Any]]):
    """This rank's micro-batches from the Trainer's current step on, each with the teacher's top log-probabilities where there
    is a teacher; none where the training is over."""

    def __init__(self, job: FinetuneJob, order: SampleOrder, accumulation: int) -> None:
        self.job, self.order, self.accumulation = job, order, accumulation
        self.trainer: Trainer | None = None
        self.is_over = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.is_over:
            return
        before = self.job.steps_before
        begin = (before + (self.trainer.state.global_step if self.trainer else 0)) * self.accumulation
        end = (before + self.job.max_steps) * self.accumulation
        config = self.trainer.model.config if self.trainer and self.trainer.model else None
        images, shows = self.job.images, TokenShards(self.job.tokens_dir).has_images
        blank = images.blank_row() if images is not None and shows and self.order.world_size > 1 else None
        taught = self._taught(begin, end)

        def made(rows: list[Tokens]) -> dict[str, Any]:
            batch = collate_together(rows, blank, self.job.pad_token_id, images)
            if self.job.pack_length is not None and is_flash(getattr(config, "_attn_implementation", None)):
                batch = as_one_row(batch)
            return pinned(self.called(batch, config))

        for batch in made_ahead(stream_batches(self.job.tokens_dir, self.order, begin, end), made, ahead=shows):
            # No plain tensors: DeepSpeed's training would round those to the dtype that it computes in.
            yield {**batch, **({} if taught is None else {TEACHER: next(taught)})}

    def called(self, batch: dict[str, torch.Tensor], config: Any) -> dict[str, Any]:
        """A call of a model of that config, with the positions and labels that it predicts. They are found here, before the
        batch is on a GPU."""
        call = model_call(config, batch, self.job.loss_on)
        given = {key: value for key, value in call.inputs.items() if value is not None}  # the Trainer may count a mask
        return {**given, CALL: replace(call, inputs={})}

    def _taught(self, begin: int, end: int) -> Iterator[TopLogProbs] | None:
        if self.job.teacher_dir is None:
            return None
        teacher = TeacherShards(self.job.teacher_dir)
        tops = ([teacher.row(row) for row in rows.tolist()] for rows in self.order.batches(begin, end))
        return (TopLogProbs(*map(torch.cat, zip(*parts, strict=True))) for parts in tops)


def collate_together(
    rows: list[Tokens], blank: Tokens | None, pad_token_id: int, images: ImageInputs | None
) -> dict[str, torch.Tensor]:
    """A batch, with ``blank`` as its last row where no other shows an image: none of its tokens is a label."""
    if blank is None or any(row.images for row in rows):
        return collate(rows, pad_token_id, images)
    batch = collate([*rows, blank], pad_token_id, images)
    batch["attention_mask"][-1, 1:] = 0
    return batch
