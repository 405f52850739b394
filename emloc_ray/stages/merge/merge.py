"""Merge: one Ray task per shard, header first, then row chunks with the adapter folded in; the other tensors byte for byte."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emloc_ray.core.precision import exact_float32
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint, Shard, TensorEntry, read_index, write_index
from emloc_ray.io.formats.shards import chunk_limit, copy_chunks, make_header, stream_shard
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.adapter_merging import Changes, changed_tensors, merged_chunks
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, run_tasks, silent


@dataclass(frozen=True)
class MergeJob:
    """Artifact paths and flat settings of the stage; ``chunk_bytes`` bounds a row chunk, see :func:`chunk_limit`."""

    model_dir: Path
    adapter_dir: Path
    out_dir: Path
    specs: tuple[LinearSpec, ...]
    chunk_bytes: int = 2**25
    max_shard_size: int | None = None


def output_shards(shards: Sequence[Shard], max_shard_size: int | None) -> list[tuple[str, Shard]]:
    """Names and contents of the merged model's shards: the original's own, or cut so that none is larger than asked. A tensor
    is never cut: one that is larger alone makes a shard of its own."""
    if max_shard_size is None or all(shard.entries[-1].stop <= max_shard_size for shard in shards if shard.entries):
        return [(shard.file.name, shard) for shard in shards]
    parts: list[Shard] = []
    for shard in shards:
        chosen: list[TensorEntry] = []
        for entry in shard.entries:
            if chosen and sum(e.num_bytes for e in chosen) + entry.num_bytes > max_shard_size:
                parts.append(Shard(shard.file, make_header(chosen), tuple(chosen)))
                chosen = []
            chosen.append(entry)
        parts.append(Shard(shard.file, make_header(chosen), tuple(chosen)))
    return [(f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors", part) for number, part in enumerate(parts)]


@exact_float32()
def merge_shard(job: MergeJob, shard: Shard, target: Path, adapter: Adapter | None = None) -> int:
    """Writes one shard of the merged model, with one row chunk and one module's adapter held at a time; returns how many
    tensors changed. ``adapter`` is that of the job, where it has been read."""
    adapter = adapter or Adapter(job.adapter_dir)
    touched = _touched(job, adapter, shard)
    chunk_bytes = chunk_limit(job.chunk_bytes, max((entry.num_bytes for entry in shard.entries), default=0))

    def tensors() -> Iterator[tuple[TensorEntry, Iterator[torch.Tensor]]]:
        for entry in shard.entries:
            if entry.name not in touched:
                yield entry, copy_chunks(entry, chunk_bytes)
                continue
            yield entry, merged_chunks(entry, adapter, touched[entry.name], chunk_bytes)

    stream_shard(target, shard.header, tensors())
    return sum(map(len, touched.values()))


def _touched(job: MergeJob, adapter: Adapter, shard: Shard) -> dict[str, Changes]:
    """The shard's tensors that the adapter changes, with their linears."""
    inside = {entry.name for entry in shard.entries}
    return {name: changes for name, changes in changed_tensors(adapter, job.specs).items() if name in inside}


def merge(job: MergeJob, resources: Resources, progress: Progress = silent, tell: Tell = unheard) -> dict[str, Any]:
    """Writes ``job.out_dir`` as a plain transformers checkpoint: the original's shards with the adapter folded in.

    Shards that are in it already are kept: the caller knows that they are of this adapter. Raises ArtifactError where the
    adapter names a module that the checkpoint does not hold.
    """
    shards = Checkpoint(job.model_dir).shards
    job.out_dir.mkdir(parents=True, exist_ok=True)
    adapter = Adapter(job.adapter_dir)
    named = sorted(
        output_shards(shards, job.max_shard_size),
        key=lambda item: sum(entry.num_bytes for entry in item[1].entries),
        reverse=True,
    )
    work = [(f"shard {name}", (shard, job.out_dir / name)) for name, shard in named]
    losses = Losses("merge", tell)
    changed = run_tasks(_merge_task, (job, adapter), work, resources, losses, progress)
    known = {spec.name for spec in job.specs}
    expected = sum(map(len, changed_tensors(adapter, job.specs).values()))
    expected += sum(name not in known for name in adapter.names)
    if sum(changed) != expected:
        raise ArtifactError(
            f"{job.adapter_dir} changes {expected} tensors, of which {job.model_dir} holds {sum(changed)}: they do not fit."
        )
    copy_file(job.model_dir / "config.json", job.out_dir / "config.json")
    write_weight_index(job, shards, named)
    copy_tokenizer(job.model_dir, job.out_dir)
    return {"num_workers": resources.num_workers, "merged_tensors": sum(changed)}


def write_weight_index(job: MergeJob, shards: Sequence[Shard], named: Sequence[tuple[str, Shard]]) -> None:
    """The original's own index where the shards are its own; else one of what was written."""
    if {name for name, _ in named} != {shard.file.name for shard in shards}:
        files = {entry.name: name for name, shard in named for entry in shard.entries}
        entries = [entry for _, shard in named for entry in shard.entries]
        sizes = sum(entry.num_bytes for entry in entries), sum(math.prod(entry.shape) for entry in entries)
        write_index(job.out_dir, files, *sizes)
    elif read_index(job.model_dir):
        copy_file(job.model_dir / INDEX_NAME, job.out_dir / INDEX_NAME)


def _merge_task(merging: tuple[MergeJob, Adapter], shard: Shard, target: Path) -> int:
    job, adapter = merging
    if exists(target):  # whole, from a try that was killed
        return sum(map(len, _touched(job, adapter, shard).values()))
    return merge_shard(job, shard, target, adapter)
