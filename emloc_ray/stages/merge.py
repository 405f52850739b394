"""Merge: one Ray task per shard, header first, then row chunks of ``W + s B A``; the other tensors byte for byte."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from emloc_ray.core.merging import merge_rows
from emloc_ray.errors import ArtifactError
from emloc_ray.io.checkpoint import INDEX_NAME, Checkpoint, TensorEntry, read_shard
from emloc_ray.io.shard_writing import copy_chunks, row_chunks, stream_shard
from emloc_ray.modeling.adapter import Adapter, LoraModule
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.stages.cluster import Progress, Resources, bounded, set_threads, silent


@dataclass(frozen=True)
class MergeJob:
    """Artifact paths and flat settings of the stage."""

    model_dir: Path
    adapter_dir: Path
    out_dir: Path
    specs: tuple[LinearSpec, ...]
    chunk_bytes: int = 2**25


def merge_shard(job: MergeJob, source: Path, target: Path) -> int:
    """Writes one shard of the merged model under the header of the original's; returns how many tensors changed."""
    adapter = Adapter(job.adapter_dir)
    touched = {spec.weight_name: spec for spec in job.specs if spec.name in set(adapter.names)}
    shard = read_shard(source)
    changed = [entry.name for entry in shard.entries if entry.name in touched]

    def tensors() -> Iterator[tuple[TensorEntry, Iterator[torch.Tensor]]]:
        for entry in shard.entries:
            spec = touched.get(entry.name)
            if spec is None:
                yield entry, copy_chunks(entry, job.chunk_bytes)
            else:
                yield entry, _merged(entry, adapter.module(spec.name), spec.transposed, job.chunk_bytes)

    stream_shard(target, shard.header, tensors())
    return len(changed)


def _merged(entry: TensorEntry, lora: LoraModule, transposed: bool, chunk_bytes: int) -> Iterator[torch.Tensor]:
    own_bytes = max(1, chunk_bytes * entry.dtype.itemsize // 4)  # of the stored dtype: chunk_bytes counts float32
    for begin, rows in row_chunks(entry, own_bytes):
        yield merge_rows(rows, lora.lora_a, lora.lora_b, lora.scale, begin, transposed)


def merge(job: MergeJob, resources: Resources, progress: Progress = silent) -> dict[str, Any]:
    """Writes ``job.out_dir`` as a plain transformers checkpoint: the original's shards with the adapter folded in.

    Raises:
        ArtifactError: where the adapter names a module that the checkpoint does not hold.
    """
    shards = Checkpoint(job.model_dir).shards
    job.out_dir.mkdir(parents=True, exist_ok=True)
    options, threads = resources.options(), resources.threads

    def submit(source: Path) -> Any:
        return ray.remote(_merge_task).options(**options).remote(job, source, job.out_dir / source.name, threads)

    files: Sequence[Path] = sorted((s.file for s in shards), key=lambda file: file.stat().st_size, reverse=True)
    changed = bounded(
        [functools.partial(submit, file) for file in files], 2 * resources.num_workers, progress, len(files)
    )
    expected = len(Adapter(job.adapter_dir).names)
    if sum(changed) != expected:
        raise ArtifactError(
            f"{job.adapter_dir} names {expected} modules, of which {job.model_dir} holds {sum(changed)}: they do not fit."
        )
    shutil.copyfile(job.model_dir / "config.json", job.out_dir / "config.json")
    if (job.model_dir / INDEX_NAME).is_file():
        shutil.copyfile(job.model_dir / INDEX_NAME, job.out_dir / INDEX_NAME)
    copy_tokenizer(job.model_dir, job.out_dir)
    return {"num_workers": resources.num_workers, "merged_tensors": sum(changed)}


def _merge_task(job: MergeJob, source: Path, target: Path, threads: int) -> int:
    set_threads(threads)
    return merge_shard(job, source, target)
