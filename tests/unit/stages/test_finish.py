"""Exact finishing: a run whose original is offloaded ends in the losses of one that holds it whole, and merges that."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from plain_runs import PlainRun, plain_run
from safetensors.torch import load_file
from small_runs import make_values

from emloc_ray.config.reading import parse_config
from emloc_ray.modeling.adapter_files import WEIGHTS_NAME
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.evaluate.stage import evaluation_job
from emloc_ray.stages.finetune.session import own_environment
from emloc_ray.stages.finish import FINISH, finishing_job
from emloc_ray.stages.merge.stage import merge_job

STEPS = 3


@pytest.fixture(scope="module")
def run_held(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, task_file: Path
) -> Callable[[str], PlainRun]:
    @functools.cache
    def run_held(hold: str) -> PlainRun:
        root = tmp_path_factory.mktemp(hold)
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
        batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        changes = {"max_steps": 4, "exact_steps": STEPS, "learning_rate": 2e-3, **batches, **schedule}
        values = make_values(
            root / "run",
            tiny_model_dir("llama"),
            task_file,
            model={"hold": hold},
            finetune=changes,
            evaluation={"num_exact_match": 0, "num_generations": 0},
        )
        with own_environment():
            return plain_run(values, tiny_model_dir("llama"))

    return run_held


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    with own_environment():
        yield


@pytest.mark.slow
def test_offloaded_and_resident_end_in_the_same_losses(run_held: Callable[[str], PlainRun]) -> None:
    resident, offloaded = runs = run_held("resident"), run_held("offloaded")
    assert len(resident.step_losses) == 4 + STEPS
    assert offloaded.step_losses == pytest.approx(resident.step_losses, rel=1e-4)
    assert offloaded.losses == pytest.approx(resident.losses, rel=1e-4)
    jobs = [finishing_job(run.context, "x") for run in runs]
    assert [job.hold for job in jobs] == ["resident", "offloaded"]
    # A step's rows at once move the blocks once.
    assert [(job.training_arguments["gradient_accumulation_steps"], job.batch_size) for job in jobs] == [(2, 4), (1, 8)]


def test_the_finished_adapter_is_better_and_is_what_is_merged(run_held: Callable[[str], PlainRun]) -> None:
    run = run_held("resident")
    assert run.losses["finished"] < run.losses["corrected"]
    assert run.losses["merged"] == pytest.approx(run.losses["finished"], rel=1e-4)
    corrected, finished = (load_file(run.root / name / WEIGHTS_NAME) for name in ("adapter", "adapter_finished"))
    assert corrected.keys() == finished.keys()
    assert any(not torch.equal(corrected[name], finished[name]) for name in corrected)


def test_it_reads_the_rows_that_come_next_at_a_lower_learning_rate(run_held: Callable[[str], PlainRun]) -> None:
    job = finishing_job(run_held("resident").context, "x")
    assert (job.steps_before, job.max_steps) == (4, STEPS)
    stopped = dataclasses.replace(run_held("resident").context, results={"finetune": {"steps": 3}})
    assert finishing_job(stopped, "x").steps_before == 3
    assert job.training_arguments["lr_scheduler_type"] == "linear"
    assert job.training_arguments["learning_rate"] == pytest.approx(0.3 * 2e-3)


def test_without_steps_there_is_no_such_stage(run_held: Callable[[str], PlainRun]) -> None:
    run = run_held("resident")
    assert FINISH.wanted(run.context.prepared)
    for changes in ({"finetune": {"exact_steps": 0}}, {"emulator": {"compression_ratio": 1.0}}):
        context = dataclasses.replace(run.context, prepared=prepare(parse_config(run.changed(**changes))))
        assert not FINISH.wanted(context.prepared)
        assert merge_job(context).adapter_dir == run.root / "adapter"
        assert "finished" not in evaluation_job(context).scored
