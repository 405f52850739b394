"""Trainings whose worker hangs once: they are ended, told and gone on with, to the same bytes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import acting
from stage_artifacts import write_tokens

from emloc_ray.stages.finetune import group_callbacks
from emloc_ray.stages.finetune.finetune import finetune
from emloc_ray.stages.finetune.group_callbacks import StopBeforeStart
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.ray import pace
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.tasks import Resources

HANGS_AFTER = 7  # of eight steps


def hanging(job: FinetuneJob, marker: Path, stops: bool) -> FinetuneJob:
    """The same, but once its first rank hangs at a step's log, or is stopped, whereupon its peers hang."""
    driver = os.getpid()

    class Impatient(FinetuneJob):
        @property
        def events_dir(self) -> Path:  # asked for by each rank before it trains
            if os.getpid() != driver and not marker.exists():
                pace.PATIENCE_S = 10.0  # on a machine that stands still for some seconds too
            return super().events_dir

    def hang(job: FinetuneJob) -> None:
        if stops:
            time.sleep(3)  # Ray Train's controller looks each second for what was saved
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)

    impatient = Impatient(**{name: getattr(job, name) for name in asdict(job)})
    return acting(impatient, HANGS_AFTER - 1, marker, hang)  # before the next step is logged


def job_in(root: Path, emulator_dir: Path) -> FinetuneJob:
    return FinetuneJob(
        emulator_dir=emulator_dir,
        tokens_dir=write_tokens(root / "tokens", 40, 10),
        out_dir=root / "calm-adapter",
        storage_dir=root / "calm",
        name="training",
        adapter={"r": 4, "target_modules": ["q_proj", "down_proj"]},
        portable_targets=["q_proj", "down_proj"],
        base_model="the/original",
        max_steps=8,
        batch_size=4,
        training_arguments={"save_steps": 4, "logging_steps": 1, "learning_rate": 0.01},
    )


@pytest.fixture
def job(emulator_dir: Callable[[str], Path], tmp_path: Path) -> FinetuneJob:
    return job_in(tmp_path, emulator_dir("llama"))


@pytest.fixture(scope="module")
def begun_again(
    ray_session: None, emulator_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The adapter of a group of which one was frozen before it trained, and what was told."""
    root = tmp_path_factory.mktemp("frozen")
    job, marker, told = job_in(root, emulator_dir("llama")), root / "frozen", list[str]()

    class Freezing(StopBeforeStart):
        def after_worker_group_start(self, worker_group: Any) -> None:  # Ray Train's controller waits for it next
            if not marker.exists():
                marker.touch()
                group_callbacks.LOOK_S = 0.1  # the looks that are left, one after another
                os.kill(worker_group.get_workers()[0].metadata.pid, signal.SIGSTOP)

    with pytest.MonkeyPatch.context() as patched:

        def tell(text: str) -> None:
            told.append(text)
            patched.setattr(pace, "PATIENCE_S", 1800.0)

        patched.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
        patched.setattr(Losses, "delays", (0.0,))
        patched.setattr(pace, "PATIENCE_S", 30.0)
        patched.setattr("emloc_ray.stages.finetune.finetune.StopBeforeStart", Freezing)
        assert finetune(job, Resources(2, planned_s=60.0), tell=tell)["steps"] == 8
    return job.out_dir, told


@pytest.mark.deep
def test_a_group_of_which_one_is_frozen_before_it_trains_is_begun_again(begun_again: tuple[Path, list[str]]) -> None:
    assert begun_again[1] == [
        "finetune: the training lost its worker because its workers did not start within 30 s; restarted (1 of 3)."
    ]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.deep)])
def test_a_training_that_hangs_goes_on_from_its_checkpoint(
    ray_session: None,
    job: FinetuneJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    ranks: int,
) -> None:
    monkeypatch.setattr(Losses, "delays", (0.0,))
    resources, told = Resources(ranks, planned_s=60.0), list[str]()
    if ranks == 1:
        finetune(job, resources)
    expected = job.out_dir if ranks == 1 else request.getfixturevalue("begun_again")[0]
    hung = replace(job, out_dir=tmp_path / "adapter", storage_dir=tmp_path / "hung")
    outcome = finetune(hanging(hung, tmp_path / "marker", ranks > 1), resources, tell=told.append)
    assert (outcome["steps"], outcome["sequences_per_second"]) == (8, None)  # no rate: it was resumed
    [sentence] = told
    assert re.fullmatch(
        rf"finetune: (the training|rank \d) lost its worker because it gave nothing for [\d.]+ s after step {HANGS_AFTER},"
        r" where [\d.]+ s is usual; restarted.* \(1 of 3\)\.",
        sentence,
    )
    for file in expected.iterdir():
        assert (hung.out_dir / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.deep
def test_a_group_whose_controller_is_frozen_is_begun_again(
    ray_session: None, job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, told = tmp_path / "frozen", list[str]()

    def tell(text: str) -> None:
        told.append(text)
        monkeypatch.setattr(pace, "PATIENCE_S", 1800.0)

    class Freezing(StopBeforeStart):
        def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
            if not marker.exists() and job.begun_path.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(Losses, "delays", (0.0,))
    monkeypatch.setattr(pace, "PATIENCE_S", 12.0)
    monkeypatch.setattr("emloc_ray.stages.finetune.finetune.StopBeforeStart", Freezing)
    outcome = finetune(job, Resources(2, planned_s=60.0), tell=tell)
    assert outcome["steps"] == 8
    [sentence] = told
    assert re.fullmatch(
        r"finetune: the training lost its worker because Ray Train's controller gave no sign of life for 1[234] s; restarted"
        r" \(1 of 3\)\.",
        sentence,
    )
    assert not job.last_word_path.exists()
