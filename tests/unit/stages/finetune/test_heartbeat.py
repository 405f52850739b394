"""A controller's signs of life: one that gives none for long is killed, and why is left; one that does is left alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from emloc_ray.stages.finetune.heartbeat import Heartbeat, HeartbeatWatch
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.ray import pace


def controller() -> Any:
    """As Ray Train's: an actor that calls the callback, and whose end the driver waits for."""

    class Controller:  # in here, for workers do not have this module
        def run(self, heartbeat: Heartbeat, freezes: bool) -> int:
            heartbeat.after_controller_start(None)
            time.sleep(2)
            if freezes:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(6)
            return os.getpid()

    return ray.remote(num_cpus=0)(Controller).remote()


@pytest.fixture
def job(tmp_path: Path) -> FinetuneJob:
    return FinetuneJob(tmp_path, tmp_path, tmp_path, tmp_path, "training", {}, None, "base", 4, 1)


def test_a_frozen_controller_is_killed_and_the_reason_left(ray_session: None, job: FinetuneJob) -> None:
    with HeartbeatWatch(job, within_s=5.0, beat_s=1.0) as watch, pytest.raises(ray.exceptions.RayActorError):
        ray.get(controller().run.remote(watch.heartbeat, freezes=True), timeout=60)
    said = job.last_word_path.read_text()
    assert said.startswith("Ray Train's controller gave no sign of life for ")


def test_a_frozen_controller_is_killed_where_the_reason_cannot_be_left(
    ray_session: None, job: FinetuneJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the store does not answer")

    monkeypatch.setattr(pace, "write_text", fail)
    with HeartbeatWatch(job, within_s=5.0, beat_s=1.0) as watch, pytest.raises(ray.exceptions.RayActorError):
        ray.get(controller().run.remote(watch.heartbeat, freezes=True), timeout=60)
    assert not job.last_word_path.exists()


def test_a_controller_that_beats_is_left_alone_and_leaves_nothing(ray_session: None, job: FinetuneJob) -> None:
    with HeartbeatWatch(job, within_s=5.0, beat_s=1.0) as watch:
        assert ray.get(controller().run.remote(watch.heartbeat, freezes=False), timeout=60) > 0
        assert watch.heartbeat.heard()
    for _ in range(50):
        if not watch.heartbeat.heard():
            break
        time.sleep(0.2)
    assert not watch.heartbeat.heard()
    assert not job.last_word_path.exists()
