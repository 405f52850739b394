"""A calibration slot whose rows pass through the whole model: Grams accumulate in forward passes, sums of gradients in
backward ones."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards, collate, length_batches
from emloc_ray.io.formats.grams import add_slot, write_slot
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.holding import open_model
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.ray.tasks import set_threads

_COMMIT_SHARE = 0.05  # of a slot's time, at the most


@dataclass(frozen=True)
class _Numbered:
    """A row and its position in the whole sample."""

    position: int
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)


class ResidentSlot:
    """Accumulates the job's sums over its shards, in order, and goes on from its last commit when it is made anew."""

    def __init__(self, job: CalibrationJob, path: Path, threads: int) -> None:
        set_threads(threads)
        self.job, self.path = job, path
        self.shards = TokenShards(job.tokens_dir)
        model = open_model(job.model_dir, job.hold, **dict(job.model_options))
        self.hooks: GramHooks | GradientHooks
        if job.gradients is None:
            self.hooks = GramHooks(model, job.groups, dict(job.streams), reread=job.reread)
        else:
            names, labels = [name for group in job.groups for name in group], job.gradients
            streams = dict(job.streams)
            self.hooks = GradientHooks(
                model,
                names,
                streams,
                loss_on=labels.loss_on,
                seed=labels.seed,
                checkpointing=job.hold == "resident",
            )
        self.last_shard = -1
        if exists(path):
            self.last_shard = add_slot(path, self.hooks.grams)
        self._commit_seconds, self._committed_at = 0.0, time.monotonic()

    def position(self) -> int:
        """The last shard that is counted, or -1."""
        return self.last_shard

    def accumulate(self, number: int) -> int:
        """Counts one shard; returns its number."""
        images = self.job.image_inputs()
        rows = [_Numbered(*pair) for pair in enumerate(self.shards.shard(number), self.shards.first_position(number))]
        for some in length_batches(rows, self.job.batch_size):
            batch = collate([row.tokens for row in some], self.job.pad_token_id, images)
            if isinstance(self.hooks, GramHooks):
                self.hooks.forward(batch, self.job.tokens)
            else:
                self.hooks.forward(batch, self.job.tokens, [row.position for row in some])
        self.hooks.check_finite()
        self.last_shard = number
        if self._commit_seconds < _COMMIT_SHARE * (time.monotonic() - self._committed_at - 30):
            self.commit()
        return number

    def commit(self) -> None:
        """Writes the sums and the last shard they hold, atomically."""
        begin = time.monotonic()
        write_slot(self.path, self.hooks.grams, self.last_shard)
        self._committed_at = time.monotonic()
        self._commit_seconds = self._committed_at - begin
