"""Calibrate: token shards go to slots, an actor each; Grams accumulate inside the actors and are summed in slot order."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from emloc_ray.data.token_shards import TokenShards, collate, length_batches
from emloc_ray.errors import StageError
from emloc_ray.io.grams import read_slot, reduce_slots, write_gram_index, write_gram_shard, write_slot
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import label_mask
from emloc_ray.stages.cluster import MAX_RESTARTS, Progress, Resources, bounded, set_threads, silent

_COMMIT_SHARE = 0.05  # of a slot's time, at the most


@dataclass(frozen=True)
class CalibrationJob:
    """What every slot needs to know: artifact paths and flat settings."""

    model_dir: Path
    tokens_dir: Path
    groups: tuple[tuple[str, ...], ...]
    tokens: str = "all"
    batch_size: int = 8
    pad_token_id: int = 0
    model_options: tuple[tuple[str, Any], ...] = ()


class Slot:
    """Accumulates the Grams of its shards, in order, and goes on from its last commit when it is made anew."""

    def __init__(self, job: CalibrationJob, path: Path, threads: int) -> None:
        set_threads(threads)
        self.job, self.path = job, path
        self.shards = TokenShards(job.tokens_dir)
        self.hooks = GramHooks(load_model(job.model_dir, **dict(job.model_options)), job.groups)
        self.last_shard = -1
        if path.is_file():
            committed, self.last_shard = read_slot(path)
            for name, gram in committed.items():
                gram.matrix = gram.matrix.to(self.hooks.grams[name].matrix.device)
                self.hooks.grams[name] = gram
        self._commit_seconds, self._committed_at = 0.0, time.monotonic()

    def position(self) -> int:
        """The last shard that is counted, or -1."""
        return self.last_shard

    def accumulate(self, number: int) -> int:
        """Counts one shard; returns its number."""
        device = self.hooks.model.device
        for rows in length_batches(self.shards.shard(number), self.job.batch_size):
            batch = {key: value.to(device) for key, value in collate(rows, self.job.pad_token_id).items()}
            counted = batch["attention_mask"].bool() if self.job.tokens == "all" else label_mask(batch, "completion")
            self.hooks.forward(batch["input_ids"], batch["attention_mask"], counted)
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


def calibrate(job: CalibrationJob, out_dir: Path, resources: Resources, progress: Progress = silent) -> dict[str, Any]:
    """Gathers every group's Gram over all token shards into ``out_dir``; each shard counts exactly once.

    Shard i belongs to slot ``i mod num_workers``; a lost actor is replaced and goes on from its slot's commit.

    Raises:
        NumericsError: where activations are NaN or Inf, naming the layer.
        StageError: where a slot is lost more often than retries allow.
    """
    num_shards = TokenShards(job.tokens_dir).num_shards
    num_slots = min(resources.num_workers, num_shards)
    slots = [out_dir / "slots" / f"slot-{slot:04d}-of-{num_slots:04d}.safetensors" for slot in range(num_slots)]
    for stale in set((out_dir / "slots").glob("*")) - set(slots):  # of a run with another number of slots
        stale.unlink()
    _run_slots(job, slots, num_shards, resources, progress)
    counts = _reduce(job, slots, out_dir)
    shutil.rmtree(out_dir / "slots")
    return {"num_workers": num_slots, "num_shards": num_shards, "num_tokens": max(counts.values())}


def _run_slots(
    job: CalibrationJob, slots: Sequence[Path], num_shards: int, resources: Resources, progress: Progress
) -> None:
    waiting: dict[Any, int] = {}
    actors: dict[int, Any] = {}
    restarts = dict.fromkeys(range(len(slots)), 0)
    done: dict[int, int] = dict.fromkeys(range(len(slots)), -1)

    def start(slot: int) -> None:
        actors[slot] = ray.remote(Slot).options(**resources.options()).remote(job, slots[slot], resources.threads)
        waiting[actors[slot].position.remote()] = slot

    for slot in range(len(slots)):
        start(slot)
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        slot = waiting.pop(ready[0])
        try:
            number = ray.get(ready[0])
        except ray.exceptions.RayActorError as error:
            restarts[slot] += 1
            if restarts[slot] > MAX_RESTARTS or isinstance(error, ray.exceptions.ActorUnschedulableError):
                raise StageError(f"calibrate: slot {slot} was lost {restarts[slot]} times: {_brief(error)}") from error
            start(slot)
            continue
        if number is None:  # committed to the end
            ray.kill(actors.pop(slot))
            continue
        done[slot] = number
        progress(sum(1 for s, last in done.items() for i in range(s, last + 1, len(slots))), num_shards)
        following = slot if number < 0 else number + len(slots)
        actor = actors[slot]
        waiting[actor.accumulate.remote(following) if following < num_shards else actor.commit.remote()] = slot


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] + ": give the workers more memory or lower calibration.batch_size."


def _reduce(job: CalibrationJob, slots: Sequence[Path], out_dir: Path) -> dict[str, int]:
    """Sums the slots, a file of a few Grams a task; returns every Gram's token count."""
    names = [group[0] for group in job.groups]
    per_file = 4
    parts = [names[start : start + per_file] for start in range(0, len(names), per_file)]
    task: Any = ray.remote(_reduce_part).options(num_cpus=1)
    files = [f"grams-{number + 1:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
    submit = [
        functools.partial(task.remote, list(slots), part, out_dir / file)
        for file, part in zip(files, parts, strict=True)
    ]
    results = bounded(submit, max(2, int(ray.cluster_resources().get("CPU", 1))), silent, len(parts))
    counts: dict[str, int] = {name: count for result in results for name, count in result.items()}
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    write_gram_index(out_dir, job.groups, weight_map, counts)
    return counts


def _reduce_part(slots: list[Path], names: list[str], path: Path) -> dict[str, int]:
    set_threads(1)
    grams = reduce_slots(slots, names)
    write_gram_shard(path, grams)
    return {name: gram.num_tokens for name, gram in grams.items()}
