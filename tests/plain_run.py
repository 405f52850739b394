"""A run's stages in this process, without Ray: their plain functions on the context that a config makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_runs import write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.data.formats import Tokens, truncate
from emloc_ray.data.token_shards import TokenShards, shard_name, write_index, write_shard
from emloc_ray.data.tokenizing import TokenizeOptions
from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint
from emloc_ray.io.formats.grams import GramStore, reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot
from emloc_ray.stages.calibrate.stage import calibration_job
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.evaluate.evaluate import evaluate_slice
from emloc_ray.stages.evaluate.stage import evaluation_job
from emloc_ray.stages.factorize.factorize import factorize_group, finish_emulator
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.factorize.stage import factorization_job
from emloc_ray.stages.finetune.session import LoneSession, own_environment
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.merge.merge import merge_shard, output_shards
from emloc_ray.stages.merge.stage import merge_job

SPLITS = ("train", "calibration", "selection", "eval")


@dataclass(frozen=True)
class PlainRun:
    """Where a run's artifacts are, the loss of each optimizer step, and the held-out loss of each variant."""

    context: Context
    step_losses: list[float]
    losses: dict[str, float]

    def rows(self, split: str) -> list[Tokens]:
        """The rows of a split, in order."""
        shards = TokenShards(self.context.tokens(split))
        return [shards.row(position) for position in range(len(shards))]


def run_plainly(root: Path, values: dict[str, Any], rows: dict[str, list[dict[str, str]]]) -> PlainRun:
    """Every stage on these rows of each split, by a config's nested values, in ``root``."""
    paths = {split: {"path": str(write_jsonl(root / f"{split}.jsonl", rows[split]))} for split in SPLITS}
    values = {**values, "run_dir": str(root / "run"), "data": {**values["data"], **paths}}
    prepared = prepare(parse_config(values))
    context = Context(prepared, prepared.source.directory)
    for split in SPLITS:
        _tokenize(context, split, rows[split])
    _calibrate(context)
    _factorize(context)
    step_losses = _finetune(context)
    correct_adapter(correction_job(context))
    _merge(context)
    job = evaluation_job(context)
    results = [result for family in job.families for result in evaluate_slice(job, family, 0, 1)]
    return PlainRun(context, step_losses, {result.variant: result.score.metrics()["loss"] for result in results})


def _tokenize(context: Context, split: str, rows: Iterable[dict[str, str]]) -> None:
    data = context.prepared.config.data
    options = TokenizeOptions(str(context.model_dir), data.format, data.max_seq_length)
    whole = options.tokens((f"{split} {number}", row) for number, row in enumerate(rows))
    kept = [cut for tokens in whole if tokens is not None and (cut := truncate(tokens, data.max_seq_length))]
    write_shard(context.tokens(split) / shard_name(0), kept)
    write_index(context.tokens(split), [len(kept)], {"tokens": sum(map(len, kept))})


def _calibrate(context: Context) -> None:
    job, out_dir = calibration_job(context), context.prepared.run.path("calibration")
    slot = ResidentSlot(job, out_dir / "slot.safetensors", 1)
    slot.accumulate(0)
    slot.commit()
    grams = reduce_slots([slot.path], [group[0] for group in job.groups])
    write_gram_shard(out_dir / "grams.safetensors", grams)
    counts = {name: gram.num_tokens for name, gram in grams.items()}
    write_gram_index(out_dir, job.groups, dict.fromkeys(grams, "grams.safetensors"), counts)


def _factorize(context: Context) -> None:
    job, grams = factorization_job(context), GramStore(context.prepared.run.path("calibration"))
    files = [job.out_dir / f"group-{number}.safetensors" for number in range(len(job.groups))]
    for group, file in zip(job.groups, files, strict=True):
        factorize_group(job, group, grams.stored(group[0].name), file)
    for number, kept in enumerate(rest_of_shards(job)):
        files.append(job.out_dir / f"rest-{number}.safetensors")
        copy_rest(kept, files[-1])
    finish_emulator(files, context.base_config(), job.model_dir, job.ranks, job.storage, kept_wide=None)


def _finetune(context: Context) -> list[float]:
    job = finetune_job(context, "finetune")
    with own_environment():
        train(job, torch.get_num_threads(), LoneSession(job.storage_dir / "session"))
    logged = map(json.loads, job.log_path.read_text().splitlines())
    return [line["loss"] for line in logged if "loss" in line]


def _merge(context: Context) -> None:
    job = merge_job(context)
    for name, shard in output_shards(Checkpoint(job.model_dir).shards, job.max_shard_size):
        merge_shard(job, shard, job.out_dir / name)
    for name in ("config.json", INDEX_NAME, "tokenizer.json", "tokenizer_config.json"):
        (job.out_dir / name).write_bytes((job.model_dir / name).read_bytes())
