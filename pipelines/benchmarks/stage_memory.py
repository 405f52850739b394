"""Every stage's memory as planned, against what a process of its own that runs the stage's functions held."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RunConfig
from emloc_ray.core.correction import Candidate
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.planning.budget import with_settings
from emloc_ray.planning.layout import make_layout
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel, Parts
from emloc_ray.planning.model_bytes import DIVERGENCE_COPIES
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.planning.skeleton import skeleton_of
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.correct.job import CorrectionJob
from emloc_ray.stages.evaluate.evaluate import EvaluationJob
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.merge.merge import MergeJob
from emloc_ray.stages.ray.session import LEAN_MEMORY

LENGTH = 512  # tokens a row, of fine-tuning and inference
LOGITS = 64  # of a teacher
_BLOCKS = 4  # that the streamed slot is taken through: its peak is the same in all


def probe(what: str, path: Path | str, *options: str, job: bytes | None = None) -> dict[str, float]:
    """What ``memory_probe.py`` printed, run as workers under a memory_budget are."""
    environment = {**os.environ, **LEAN_MEMORY}
    command = [sys.executable, str(Path(__file__).with_name("memory_probe.py")), what, str(path), *options]
    output = subprocess.run(command, check=True, capture_output=True, input=job, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def probe_job(name: str, arguments: dict[str, Any]) -> dict[str, float]:
    """The same of one job, handed over by a pipe: no file holds a pickle."""
    return probe("stage", "-", job=pickle.dumps((name, arguments)))


Case = tuple[str, str, dict[str, Any], Parts]  # what it is called, the probe's function, its arguments, the plan


def quickstart_cases(config: RunConfig, run: Path, out: Path) -> Iterator[Case]:
    """Every stage of a run up to its ``adapter_emulator``."""
    prepared = prepare(config)
    layout, tokens = prepared.layout, run / "data" / "tokens"
    lengths = {split: _lengths(tokens / split) for split in ("calibration", "selection", "eval")}
    groups = tuple(tuple(spec.name for spec in group) for group in layout.groups)
    num_shards = TokenShards(tokens / "calibration").num_shards
    calibration = CalibrationJob(run / "model", tokens / "calibration", groups, (0, num_shards))
    memory = MemoryModel(prepared, lengths["calibration"])
    arguments: dict[str, Any] = {"job": calibration, "out_dir": made_directory(out / "resident"), "threads": 1}
    yield "calibrate, resident", "calibrate_resident", arguments, memory.calibration_parts_whole()
    arguments = {**arguments, "out_dir": made_directory(out / "streamed"), "num_blocks": _BLOCKS}
    yield "calibrate, streamed", "calibrate_streamed", arguments, memory.calibration_parts_by_block()
    job = FactorizationJob(run / "model", out, layout.groups, layout.ranks)
    arguments = {"job": job, "grams_dir": run / "calibration", "threads": 1}
    yield "factorize", "factorize", arguments, memory.factorization_parts()
    yield from trained_cases(prepared, run / "model", run / "emulator", rows=4)
    correction = CorrectionJob(
        run / "model",
        run / "emulator",
        run / "calibration",
        run / "adapter_emulator",
        out / "adapter",
        tokens / "selection",
        tokens / "calibration",
        layout.specs,
        (Candidate("none"), Candidate("adapted", None)),
    )
    arguments = {"job": correction, "threads": 2}
    yield "correct", "correct", arguments, MemoryModel(prepared, lengths["selection"]).correction_parts()
    merging = MergeJob(run / "model", run / "adapter_emulator", made_directory(out / "merged"), layout.specs)
    yield "merge", "merge", {"job": merging, "threads": 2}, memory.merge_parts()
    adapters = run / "adapter_emulator", run / "adapter_emulator"
    evaluation = EvaluationJob(run / "model", run / "emulator", *adapters, run / "model", tokens / "eval")
    arguments = {"job": evaluation, "family": "original", "num_parts": 4, "threads": 1}
    yield "evaluate", "evaluate", arguments, MemoryModel(prepared, lengths["eval"]).evaluation_parts()


def trained_cases(prepared: Prepared, model: Path, emulator: Path, rows: int) -> Iterator[Case]:
    """Inference of an original and fine-tuning of its emulator, at the same rows and length."""
    size = {"rows": rows, "length": LENGTH}
    ratio = prepared.config.emulator.compression_ratio
    for checkpointing in (True, False):
        memory = MemoryModel(with_settings(prepared, ratio, rows, 1, checkpointing), Lengths(LENGTH, LENGTH))
        arguments = {**size, "directory": emulator, "checkpointing": checkpointing}
        name = f"finetune, {'with' if checkpointing else 'without'} gradient checkpointing"
        yield name, "finetune", arguments, memory.finetuning_parts()
        arguments = {**arguments, "num_logits": LOGITS}
        yield (
            name.replace("finetune", "heal: training"),
            "finetune",
            arguments,
            memory.finetuning_parts(DIVERGENCE_COPIES),
        )
    yield "heal: teacher", "teach", {**size, "directory": model}, memory.teacher_plan(rows).parts
    yield "inference", "inference", {**size, "directory": model}, memory.inference(rows, LENGTH)


def bare_prepared(values: dict[str, Any], model_config: Any) -> Prepared:
    """A config on a model that has no files: enough to plan with."""
    config = parse_config(values)
    layout = make_layout(config, skeleton_of(model_config, empty_model(model_config)))
    return Prepared(config, RunDirectory(config.run_dir), ModelSource(Path()), model_config, layout, {})


def _lengths(directory: Path) -> Lengths:
    shards = TokenShards(directory)
    sizes = [len(shards.row(position)) for position in range(len(shards))]
    return Lengths(sum(sizes) / len(sizes), max(sizes))


def made_directory(directory: Path) -> Path:
    """The directory, made where it was not there."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory
