"""A calibration slot whose rows pass through the whole model: Grams accumulate in forward passes, sums of gradients in
backward ones."""

import gc
import time
from pathlib import Path

import torch

from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.grams import add_slot, write_slot
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.holding import open_model
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.ray.losses import is_out_of_memory
from emloc_ray.stages.ray.tasks import set_threads

_COMMIT_SHARE = 0.05  # of a slot's time, at the most


def smaller_batch(path: Path, rows: int) -> int:
    """The rows of the batch that the slot of ``path`` goes on with: fewer than ``rows`` where it ran out of memory."""
    noted = read_json(path.with_suffix(".batch.json"))
    return rows if noted is None else min(rows, int(noted["rows"]))


class ResidentSlot:
    """Accumulates the job's sums over its shards, in order, and goes on from its last commit when it is made anew; also
    where it runs out of memory, then with half the rows a batch."""

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
        self.batch_size = smaller_batch(path, job.batch_size)
        self.last_shard = add_slot(path, self.hooks.grams) if exists(path) else -1
        self._uncommitted: list[int] = []
        self._commit_seconds, self._committed_at = 0.0, time.monotonic()

    def position(self) -> int:
        """The last shard that is counted, or -1."""
        return self.last_shard

    def accumulate(self, number: int) -> int:
        """Counts one shard; returns its number."""
        self._uncommitted.append(number)
        pending = [number]
        while pending:
            if self._try_to_add(pending[0]):
                del pending[0]
            else:
                self._begin_again()
                pending = list(self._uncommitted)
        self.hooks.check_finite()
        self.last_shard = number
        if self._commit_seconds < _COMMIT_SHARE * (time.monotonic() - self._committed_at - 30):
            self.commit()
        return number

    def _try_to_add(self, number: int) -> bool:
        """Adds a shard's rows to the sums. False where memory runs out: then only some of them are in the sums."""
        try:
            self._add_shard(number)
        except Exception as error:
            if self.batch_size == 1 or not is_out_of_memory(error):
                raise
            return False
        return True

    def _begin_again(self) -> None:
        """Takes the sums back to the last commit, and half the rows a batch from now on."""
        gc.collect()  # what the pass that failed has left
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_size = max(1, self.batch_size // 2)
        write_json(self.path.with_suffix(".batch.json"), {"rows": self.batch_size})
        for gram in self.hooks.grams.values():
            gram.matrix.zero_()
            gram.num_tokens = 0
        if exists(self.path):
            add_slot(self.path, self.hooks.grams)

    def _add_shard(self, number: int) -> None:
        rows, first = self.shards.shard(number), self.shards.first_position(number)
        batches = batches_by_length(rows, self.batch_size, self.job.pad_token_id, self.job.images)
        for numbers, batch in batches:
            if isinstance(self.hooks, GramHooks):
                self.hooks.forward(batch, self.job.tokens)
            else:
                self.hooks.forward(batch, self.job.tokens, [first + row for row in numbers])

    def commit(self) -> None:
        """Writes the sums and the last shard they hold, atomically."""
        begin = time.monotonic()
        write_slot(self.path, self.hooks.grams, self.last_shard)
        self._uncommitted.clear()
        self._committed_at = time.monotonic()
        self._commit_seconds = self._committed_at - begin
