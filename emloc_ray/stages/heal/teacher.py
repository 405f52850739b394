"""The teacher of the healing: what the original predicts at each label of the rows that the healing will read, cached."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.teacher_shards import (
    TopRow,
    rows_per_shard,
    teacher_shard,
    write_teacher_index,
    write_teacher_shard,
)
from emloc_ray.io.store.node_cache import existing
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.loss import teacher_logits
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, run_tasks, silent


@dataclass(frozen=True)
class TeacherJob:
    """Artifact paths and flat settings; ``order`` and ``micro_steps`` say which rows the healing will read."""

    model_dir: Path
    tokens_dir: Path
    out_dir: Path
    order: SampleOrder
    micro_steps: int
    num_logits: int = 64
    loss_on: str = "all"
    batch_size: int = 8
    pad_token_id: int = 0
    model_options: dict[str, Any] = field(default_factory=dict)
    hold: str = "resident"
    images: ImageInputs | None = None

    def shards(self) -> list[list[int]]:
        """The rows of each shard, ascending."""
        rows = self.order.seen(self.micro_steps).tolist()
        tokens = TokenShards(self.tokens_dir)
        step = rows_per_shard(tokens.index.get("tokens", 0) / max(1, len(tokens)), self.num_logits)
        return [rows[start : start + step] for start in range(0, len(rows), step)]


def teach_shard(job: TeacherJob, model: Any, rows: Sequence[int]) -> list[TopRow]:
    """What the model predicts at the labels of some rows, in their order, in batches of rows of like length. Raises
    NumericsError where a log-probability is no number, naming the row."""
    by_row = TokenShards(job.tokens_dir).rows(rows)
    tokens = [by_row[row] for row in rows]
    tops: dict[int, TopRow] = {}
    for numbers, batch in batches_by_length(tokens, job.batch_size, job.pad_token_id, job.images):
        for number, top in zip(numbers, teacher_logits(model, batch, job.loss_on, job.num_logits), strict=True):
            if bool(torch.isnan(top.log_probs).any()):
                what = f"The original's logits of training row {rows[number]} are NaN or Inf"
                raise NumericsError(f"{what}: check its weights.")
            tops[number] = top.ids.to(torch.int32), top.log_probs.to(torch.float16)
    return [tops[number] for number in range(len(rows))]


def teach_part(job: TeacherJob, part: int, num_parts: int) -> None:
    """Writes the shards ``part, part + num_parts, …`` that are not there yet."""
    own = {teacher_shard(job.out_dir, number): rows for number, rows in list(enumerate(job.shards()))[part::num_parts]}
    written = existing(list(own))
    left = {file: rows for file, rows in own.items() if file not in written}
    model = open_model(job.model_dir, job.hold, **job.model_options) if left else None
    for file, rows in left.items():
        write_teacher_shard(file, rows, teach_shard(job, model, rows))


def teach(job: TeacherJob, resources: Resources, progress: Progress = silent, tell: Tell = unheard) -> None:
    """Writes ``job.out_dir``: a task a worker, each with the original held so; shards that are there already stay. Raises what
    a task raised. ``progress`` counts shards."""
    shards = job.shards()
    num_parts = min(resources.num_workers, len(shards))
    names = [f"part {part + 1} of {num_parts} of the teacher's logits" for part in range(num_parts)]
    files = [teacher_shard(job.out_dir, number) for number in range(len(shards))]
    losses = Losses("heal", tell, files={name: files[part::num_parts] for part, name in enumerate(names)})
    pieces = [(name, (part, num_parts)) for part, name in enumerate(names)]
    run_tasks(teach_part, job, pieces, resources, losses, progress)
    write_teacher_index(job.out_dir, [rows[0] for rows in shards])
