"""A controller's signs of life: one that gives none for long is killed, and why is left; one that does is left alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from emloc_ray.io.store.atomic import write_text
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
            time.sleep(5.5)  # it ends between two beats
            return os.getpid()

    return ray.remote(num_cpus=0)(Controller).remote()


Watched = dict[str, tuple[FinetuneJob, HeartbeatWatch]]


def job_in(folder: Path) -> FinetuneJob:
    folder.mkdir()
    return FinetuneJob(folder, folder, folder, folder, "training", {}, None, "base", 4, 1)


@pytest.fixture(scope="module")
def watched(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Jobs and who watched their controllers, of which two froze: all at once, for they mostly sleep."""
    root = tmp_path_factory.mktemp("jobs")
    jobs = {name: job_in(root / name) for name in ("frozen", "frozen, store silent", "beating")}

    def leave(path: Any, *rest: Any) -> None:
        if "silent" in str(path):
            raise OSError("the store does not answer")
        write_text(path, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pace, "write_text", leave)
        watches = {name: HeartbeatWatch(job, within_s=5.0, beat_s=1.0) for name, job in jobs.items()}
        with watches["frozen"], watches["frozen, store silent"]:
            with watches["beating"]:
                actors = {name: controller() for name in jobs}
                runs = {
                    name: actor.run.remote(watches[name].heartbeat, freezes=name != "beating")
                    for name, actor in actors.items()
                }
                assert ray.get(runs.pop("beating"), timeout=60) > 0
                assert watches["beating"].heartbeat.heard()
                ray.kill(actors["beating"])
            for run in runs.values():
                with pytest.raises(ray.exceptions.RayActorError):
                    ray.get(run, timeout=60)
    return {name: (jobs[name], watches[name]) for name in jobs}


def test_a_frozen_controller_is_killed_and_the_reason_left(watched: Watched) -> None:
    job, _ = watched["frozen"]
    assert job.last_word_path.read_text().startswith("Ray Train's controller gave no sign of life for ")


def test_a_frozen_controller_is_killed_where_the_reason_cannot_be_left(watched: Watched) -> None:
    job, _ = watched["frozen, store silent"]
    assert not job.last_word_path.exists()


def test_a_controller_that_beats_is_left_alone_and_leaves_nothing(watched: Watched) -> None:
    job, watch = watched["beating"]
    for _ in range(50):
        if not watch.heartbeat.heard():
            break
        time.sleep(0.2)
    assert not watch.heartbeat.heard()
    assert not job.last_word_path.exists()
