"""Stages in one process, without Ray: the same plain functions that Ray's workers call, on one part after the other."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from emloc_ray.core.gram import Gram
from emloc_ray.data import tokenizing
from emloc_ray.data.processors import example
from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint
from emloc_ray.io.formats.grams import GramStore, StoredGram
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.modeling.architecture import load_config
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.calibrate.streamed_slot import StreamedSlot, grams_file
from emloc_ray.stages.factorize.factorize import factorize_group, finish_emulator
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.merge.merge import MergeJob, merge_shard

Batch = dict[str, Any]


class Inline:
    """Stands for what Ray makes: the function, called here, on one unit after the other."""

    def __init__(self, work: list[Batch], function: Callable[[Batch], Batch], *others: Any) -> None:
        self.made = [function({"unit": [json.dumps(unit)]}) for unit in work]

    def blocks(self) -> list[Batch]:
        """What was made, in another order: it comes in any."""
        return self.made[::-1]

    def end(self) -> None:
        """Nothing is at work."""


@contextmanager
def tokenized_here() -> Iterator[None]:
    """Rows are tokenized in this process meanwhile."""
    with (
        mock.patch.object(tokenizing, "mapped", Inline),
        mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"),
    ):
        yield


def gather_whole(job: CalibrationJob, file: Path) -> None:
    """The sums of a wave, each row passing through the whole model."""
    slot = ResidentSlot(job, file, 1)
    for number in range(*job.shards):
        slot.accumulate(number)
    slot.commit()
    del slot
    gc.collect()  # a model and its hooks hold one another


def streamed(job: CalibrationJob, out_dir: Path) -> Iterator[dict[str, Gram]]:
    """Each block's Grams, by one slot that holds a block at a time."""
    order = block_flow(load_config(job.model_dir), False, example(job.model_dir, False)).order
    names = [[group[0] for group in job.groups_of(block)] for block in order]
    num_blocks = 1 + max(position for position, inside in enumerate(names) if inside)
    slot = StreamedSlot(job, out_dir, 0, 1, num_blocks, 1)
    for position in range(num_blocks):
        slot.accumulate(position)
        stored = [StoredGram(grams_file(out_dir, position, num_blocks), name) for name in names[position]]
        yield {gram.name: Gram(gram.read(), gram.num_tokens) for gram in stored}


def build(job: FactorizationJob, grams: GramStore, base_config: Any, device: str = "cpu") -> None:
    """The emulator, of factors and of what stays as it is, in this process, computed on ``device``."""
    factorized = [[spec for spec in group if spec.name in job.ranks] for group in job.groups]
    work, rest = [group for group in factorized if group], rest_of_shards(job)
    files = [job.out_dir / f"model-{number}.safetensors" for number in range(len(work) + len(rest))]
    for group, file in zip(work, files, strict=False):
        factorize_group(job, group, grams.stored(group[0].name), file, device)
    for kept, file in zip(rest, files[len(work) :], strict=True):
        copy_rest(kept, file)
    finish_emulator(files, base_config, job.model_dir, job.ranks, job.storage, None)


def merge(job: MergeJob) -> None:
    """The merged model, in the original's shards."""
    for shard in Checkpoint(job.model_dir).shards:
        merge_shard(job, shard, job.out_dir / shard.file.name)
    for name in ("config.json", INDEX_NAME):
        if (job.model_dir / name).is_file():
            copy_file(job.model_dir / name, job.out_dir / name)
    copy_tokenizer(job.model_dir, job.out_dir)
