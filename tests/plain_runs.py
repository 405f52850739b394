"""A run through the stages' plain functions, in this process: what a test of the method needs of one, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from plain_stages import build, gather_whole, merge, streamed, tokenized_here
from small_runs import FinishedRun, RecordingReporter

from emloc_ray.config.reading import parse_config
from emloc_ray.core.gram import Gram
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.grams import GramStore, reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.formats.teacher_shards import write_teacher_index
from emloc_ray.planning.batches import shrink_batches
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.calibrate.job import BLOCKS, CalibrationJob
from emloc_ray.stages.calibrate.stage import calibration_job, gradient_job
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.evaluate.evaluate import EvaluationJob, evaluate_slice
from emloc_ray.stages.evaluate.stage import evaluation_job
from emloc_ray.stages.factorize.allocate import allocate_ranks, group_spectra, read_ranks
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.factorize.stage import allocation_job, factorization_job
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.finetune.training import train_alone
from emloc_ray.stages.finish import finishing_job
from emloc_ray.stages.heal.fold import pieces, write_pieces
from emloc_ray.stages.heal.stage import healing_job
from emloc_ray.stages.heal.teacher import teach_part
from emloc_ray.stages.merge.stage import merge_job
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.refine.refine import refine_blocks
from emloc_ray.stages.refine.stage import refinement_job
from emloc_ray.stages.tokens.tokens import tokenize_data


class PlainRun(FinishedRun):
    """A finished run whose metrics hold the evaluation alone, with its context and the loss of each optimizer step."""

    def __init__(self, context: Context, values: dict[str, Any], step_losses: list[float]) -> None:
        super().__init__(context.path(), values, context.model_dir, RecordingReporter())
        self.context, self.step_losses = context, step_losses

    @property
    def losses(self) -> dict[str, float]:
        """The held-out loss of each variant."""
        return {variant: scores["loss"] for variant, scores in self.metrics["evaluation"].items()}

    def rows(self, split: str) -> list[Tokens]:
        """The rows of a split, in order."""
        shards = TokenShards(self.context.tokens(split))
        return [shards.row(position) for position in range(len(shards))]


def plain_run(
    values: dict[str, Any],
    model_dir: Path,
    during: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext(),
    device: str = "cpu",
) -> PlainRun:
    """A run of this config: every artifact at its place. ``during(stage)`` is entered for each stage; ranks, factors and
    correction are computed on ``device``, models where torch has a GPU."""
    prepared = shrink_batches(prepare(parse_config(values)))
    context = Context(prepared, model_dir)
    prepared.run.create(prepared.config.model_dump(mode="json"))
    with tokenized_here(), during("tokens"):
        tokenize_data(prepared, model_dir, context.path("data"))
    with during("calibrate"):
        gather(calibration_job(context), context.path("calibration"))
    if context.layout.gradient_linears:
        with during("gradients"):
            gather(gradient_job(context), context.path("gradients"))
    if context.layout.allocated:
        with during("allocate"):
            allocate(context, device)
    with during("factorize"):
        job = factorization_job(context, context.layout_made)
        build(job, GramStore(context.path("calibration")), context.base_config(), device)
    if prepared.config.emulator.refines is not None:
        with during("refine"):
            refine_blocks(refinement_job(context))
    if prepared.config.emulator.heals is not None:
        with during("heal"):
            heal(context)
    with during("finetune"):
        step_losses = train(finetune_job(context, "training"))
    with during("correct"):
        correct_adapter(correction_job(context), device=device)
    if context.prepared.finishes:
        with during("finish"):
            step_losses += train(finishing_job(context, "finishing"))
    with during("merge"):
        merge(merge_job(context))
    with during("evaluate"):
        scores = score(evaluation_job(context))
    context.path("metrics.json").write_text(json.dumps({"evaluation": scores}))
    return PlainRun(context, values, step_losses)


def gather(job: CalibrationJob, out_dir: Path) -> None:
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


def gather_streamed(job: CalibrationJob, out_dir: Path) -> dict[str, Gram]:
    """All Grams, by one slot that holds a block at a time."""
    return {name: gram for grams in streamed(job, out_dir) for name, gram in grams.items()}


def allocate(context: Context, device: str = "cpu") -> None:
    """The ranks, which the context knows from then on."""
    job, out_dir = allocation_job(context), context.path("allocation")
    grams, sums = GramStore(job.calibration_dir), GramStore(job.gradients_dir)
    for number, specs in enumerate(job.groups):
        stored = {spec.name: sums.stored(spec.name) for spec in specs}
        found = group_spectra(job, specs, grams.stored(specs[0].name), stored, device)
        write_tensors(out_dir / f"spectra-{number + 1:05d}-of-{len(job.groups):05d}.safetensors", found)
    allocate_ranks(job, out_dir, Resources())
    ranks = {**context.layout.ranks, **read_ranks(out_dir)}
    kept = {name: rank for name, rank in ranks.items() if rank is not None}
    context.results["factorize"] = {"ranks": kept, "layers": {}}


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
    finish_emulator(files, context.base_config(), job.fold.emulator_dir, job.fold.ranks, job.fold.storage, None)


def train(job: FinetuneJob) -> list[float]:
    """The adapter; returns the loss of each logged step."""
    train_alone(job)
    logged = map(json.loads, job.log_path.read_text().splitlines())
    return [line["loss"] for line in logged if "loss" in line]


def score(job: EvaluationJob) -> dict[str, dict[str, float]]:
    """Every variant on the held-out rows."""
    found: Sequence[Any] = [result for family in job.families for result in evaluate_slice(job, family, 0, 1)]
    return {result.variant: result.score.metrics() for result in found}
