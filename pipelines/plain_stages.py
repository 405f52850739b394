"""Stages in one process, without Ray: the same plain functions that Ray's workers call, on one part after the other."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from emloc_ray.core.gram import Gram
from emloc_ray.data import tokenizing
from emloc_ray.data.processors import example
from emloc_ray.errors import StageError
from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint
from emloc_ray.io.formats.grams import GramStore, StoredGram, reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.formats.teacher_shards import write_teacher_index
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.modeling.architecture import load_config
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.stages.calibrate.job import BLOCKS, CalibrationJob
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.calibrate.stage import calibration_job, gradient_job
from emloc_ray.stages.calibrate.streamed_slot import StreamedSlot, grams_file
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.evaluate.evaluate import EvaluationJob, evaluate_slice
from emloc_ray.stages.evaluate.stage import evaluation_job
from emloc_ray.stages.factorize.allocate import allocate_ranks, group_losses
from emloc_ray.stages.factorize.factorize import factorize_group, finish_emulator, rewritten
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.factorize.spend import read_forms, read_ranks
from emloc_ray.stages.factorize.stage import allocation_job, factorization_job
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.finetune.training import train_alone
from emloc_ray.stages.finish import finishing_job
from emloc_ray.stages.heal.fold import pieces, write_pieces
from emloc_ray.stages.heal.stage import healing_job
from emloc_ray.stages.heal.teacher import teach_part
from emloc_ray.stages.merge.merge import MergeJob, merge_shard
from emloc_ray.stages.merge.stage import merge_job
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.refine.refine import refine_blocks
from emloc_ray.stages.refine.stage import refinement_job
from emloc_ray.stages.tokens.tokens import tokenize_data

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


def stages(context: Context, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """What does each stage that the config has, from the data on, in order; every artifact comes to its place. Ranks, factors and
    correction are computed on ``device``, models where torch has a GPU. A training gives its logged losses, the evaluation each
    variant's scores."""
    path = context.path
    every: dict[str, Callable[[], Any]] = {
        "data": lambda: tokenize(context),
        "calibrate": lambda: gather(calibration_job(context), path("calibration")),
        "gradients": lambda: gather(gradient_job(context), path("gradients")),
        "allocate": lambda: allocate(context, device),
        "factorize": lambda: factorize(context, device),
        "refine": lambda: refine_blocks(refinement_job(context)),
        "heal": lambda: heal(context),
        "finetune": lambda: train(finetune_job(context, "training")),
        "correct": lambda: correct_adapter(correction_job(context), device=device),
        "finish": lambda: train(finishing_job(context, "finishing")),
        "merge": lambda: merge(merge_job(context)),
        "evaluate": lambda: score(evaluation_job(context)),
    }
    return {step.name: every[step.name] for step in STEPS if step.name in every and step.wanted(context.prepared)}


@contextmanager
def tokenized_here() -> Iterator[None]:
    """Rows are tokenized in this process meanwhile."""
    with (
        mock.patch.object(tokenizing, "mapped", Inline),
        mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"),
    ):
        yield


def tokenize(context: Context) -> None:
    """The token shards of every split."""
    with tokenized_here():
        tokenize_data(context.prepared, context.model_dir, context.path("data"))


def gather(job: CalibrationJob, out_dir: Path) -> GramStore:
    """All sums, by one slot that holds the model as the job says."""
    files: dict[str, str] = {}
    counts: dict[str, int] = {}

    def write(grams: dict[str, Gram]) -> None:
        file = f"grams-{len(files)}.safetensors"
        write_gram_shard(out_dir / file, grams)
        files.update(dict.fromkeys(grams, file))
        counts.update({name: gram.num_tokens for name, gram in grams.items()})

    if job.hold == BLOCKS:
        for grams in streamed(job, out_dir):
            write(grams)
    else:
        for groups in job.waves or (job.groups,):
            gather_whole(replace(job, groups=groups), out_dir / "slot.safetensors")
            names = [group[0] for group in groups]
            for start in range(0, len(names), 4):
                write(reduce_slots([out_dir / "slot.safetensors"], names[start : start + 4]))
            (out_dir / "slot.safetensors").unlink()
    write_gram_index(out_dir, job.groups, files, counts)
    return GramStore(out_dir)


def gather_whole(job: CalibrationJob, file: Path) -> None:
    """The sums of a wave, each row passing through the whole model."""
    slot = ResidentSlot(job, file, torch.get_num_threads())  # which it sets: later stages compute here too
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
    slot = StreamedSlot(job, out_dir, 0, 1, num_blocks, torch.get_num_threads())
    for position in range(num_blocks):
        slot.accumulate(position)
        stored = [StoredGram(grams_file(out_dir, position, num_blocks), name) for name in names[position]]
        yield {gram.name: Gram(gram.read(), gram.num_tokens) for gram in stored}


def allocate(context: Context, device: str = "cpu") -> None:
    """The ranks, which the context knows from then on."""
    job, out_dir = allocation_job(context), context.path("allocation")
    grams, sums = GramStore(job.calibration_dir), GramStore(job.gradients_dir)
    for number, specs in enumerate(job.groups):
        stored = {spec.name: sums.stored(spec.name) for spec in specs}
        losses = group_losses(job, specs, grams.stored(specs[0].name), stored, device)
        write_tensors(out_dir / f"losses-{number + 1:05d}-of-{len(job.groups):05d}.safetensors", losses)
    allocate_ranks(job, out_dir, Resources())
    if context.layout.budget is not None:
        layout = context.layout.with_forms(read_forms(out_dir))
        forms = {name: asdict(layout.form(spec)) for name, spec in layout.by_name.items()}
        context.results["factorize"] = {"forms": forms, "layers": {}}
        return
    ranks = {**context.layout.ranks, **read_ranks(out_dir)}
    kept = {name: rank for name, rank in ranks.items() if rank is not None}
    context.results["factorize"] = {"ranks": kept, "layers": {}}


def factorize(context: Context, device: str = "cpu") -> None:
    """The emulator before it is refined and healed."""
    job = factorization_job(context, context.layout_made)
    build(job, context.path("calibration"), context.base_config(), device)


def build(job: FactorizationJob, grams_dir: Path, base_config: Any, device: str = "cpu") -> None:
    """The emulator, of factors and of what stays as it is, in this process, computed on ``device``."""
    work, rest, without_gram = rewritten(job), rest_of_shards(job), {*job.without_gram}
    files = [job.out_dir / f"model-{number}.safetensors" for number in range(len(work) + len(rest))]
    for group, file in zip(work, files, strict=False):
        gram = None if group[0].name in without_gram else GramStore(grams_dir).stored(group[0].name)
        factorize_group(job, group, gram, file, device)
    for kept, file in zip(rest, files[len(work) :], strict=True):
        copy_rest(kept, file)
    finish_emulator(files, base_config, job.model_dir, job.ranks, job.storage, None, job.integers)


def heal(context: Context) -> None:
    """The healed emulator."""
    healing = context.prepared.config.emulator.heals
    assert healing is not None
    job = healing_job(context, healing, "healing")
    teach_part(job.teacher, 0, 1)
    write_teacher_index(job.teacher.out_dir, [rows[0] for rows in job.teacher.shards()])
    train(job.training)
    write_pieces(job.fold, pieces(job.fold))
    files = [piece.file for piece in pieces(job.fold)]
    fold = job.fold
    finish_emulator(files, context.base_config(), fold.emulator_dir, fold.ranks, fold.storage, None, fold.integers)


def train(job: FinetuneJob) -> list[float]:
    """The adapter; returns the loss of each logged step, none where none came. Raises StageError where the training failed."""
    if failure := train_alone(job)["failure"]:
        raise StageError(failure)
    logged = map(json.loads, job.log_path.read_text().splitlines() if job.log_path.is_file() else ())
    return [line["loss"] for line in logged if "loss" in line]


def merge(job: MergeJob) -> None:
    """The merged model, in the original's shards."""
    for shard in Checkpoint(job.model_dir).shards:
        merge_shard(job, shard, job.out_dir / shard.file.name)
    for name in ("config.json", INDEX_NAME):
        if (job.model_dir / name).is_file():
            copy_file(job.model_dir / name, job.out_dir / name)
    copy_tokenizer(job.model_dir, job.out_dir)


def score(job: EvaluationJob) -> dict[str, dict[str, float]]:
    """Every variant on the held-out rows."""
    results = [result for family in job.families for result in evaluate_slice(job, family, 0, 1)]
    return {result.variant: result.score.metrics() for result in results}
