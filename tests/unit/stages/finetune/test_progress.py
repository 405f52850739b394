"""How far a training is: told in a small file, whatever its log has grown to."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faulting.s3 import uri

from emloc_ray.io.formats.json_lines import append_object, read_objects
from emloc_ray.io.store import objects
from emloc_ray.io.store.atomic import write_json
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.stages.finetune import finetune as stage
from emloc_ray.stages.finetune import trainer
from emloc_ray.stages.finetune.finetune import Watcher, other_try
from emloc_ray.stages.finetune.group_callbacks import read_small_file
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import NEWEST
from emloc_ray.stages.finetune.trainer import StepKeeper
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.tasks import Resources

JOB = FinetuneJob(Path("e"), Path("t"), Path("o"), Path("s"), "name", {}, None, "base", 4, 1)
CPU = torch.device("cpu")


def at(step: int) -> Any:
    return SimpleNamespace(
        global_step=step, is_world_process_zero=True, max_steps=4, compute_steps=lambda args, max_steps: None
    )


@pytest.fixture
def session() -> Any:
    return SimpleNamespace(rank=0, world_size=1, is_leaving=lambda: False, save=lambda folder, step: None)


def test_steps_between_two_lines_of_the_log_are_seen(tmp_path: Path, session: Any) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path, tokens_a_step=10.0)
    keeper, seen, said = StepKeeper(job, session, poll_s=0), list[int](), list[str]()

    def look() -> None:
        with Watcher(job, lambda done, total: seen.append(done), print, poll_s=60, detail=said.append):
            pass  # looks once at its end

    look()
    keeper.on_train_begin(None, at(1), None)
    look()
    keeper.on_log(None, at(2), None, logs={"loss": 1.25, "learning_rate": 2e-4})
    keeper.sync_norm_and_stop(None, CPU, step=3)
    look()
    keeper.on_train_end(None, at(4), None)
    look()
    assert seen == [0, 1, 3, 4]
    assert said == ["loss 1.250, learning rate 0.0002"] * 2


def test_a_training_that_goes_on_begins_at_its_checkpoint(tmp_path: Path, session: Any) -> None:
    """While its worker still loads the model."""
    job, seen = dataclasses.replace(JOB, storage_dir=tmp_path), list[int]()
    write_json(job.place / NEWEST, {"folder": "checkpoint-3"})
    for _ in range(2):
        with Watcher(job, lambda done, total: seen.append(done), print, poll_s=60):
            pass
        StepKeeper(job, session).on_train_begin(None, at(4), None)
    assert seen == [3, 4]


def test_a_look_reads_as_much_of_a_long_log_as_of_a_short_one(
    tmp_path: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path)
    for step in range(1000):
        append_object(job.log_path, {"step": step, "loss": 1.0})
    StepKeeper(job, session).on_train_begin(None, at(7), None)
    read: list[int] = []

    def content(path: Path) -> bytes:
        found = path.read_bytes() if path.is_file() else b""
        read.append(len(found))
        return found

    monkeypatch.setattr(stage, "read_small_file", content)
    with Watcher(job, lambda done, total: None, print, poll_s=60):
        pass
    assert 0 < sum(read) < 100


def test_a_try_of_other_inputs_that_was_broken_off_is_told(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path)
    assert other_try(job) is None
    dataclasses.replace(job, name="other").log_path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n')
    assert str(other_try(job)).endswith("have changed since the try that reached step 20.")
    job.log_path.write_text("")
    assert other_try(job) is None  # it goes on


def test_a_store_is_given_the_log_with_a_checkpoint_and_not_a_line_at_a_time(
    tmp_path: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, given = dataclasses.replace(JOB, storage_dir=tmp_path), list[Path]()
    monkeypatch.setattr(trainer, "publish", given.append)
    monkeypatch.setattr(trainer, "is_stored", lambda path: True)
    monkeypatch.setattr(trainer, "STORE_POLL_S", math.inf)
    keeper = StepKeeper(job, session, poll_s=0)
    for step in range(1000):
        keeper.sync_norm_and_stop(None, CPU, step)
        keeper.on_log(None, at(step), None, logs={"loss": 1.0})
    assert not given
    keeper.on_save(SimpleNamespace(output_dir=str(tmp_path)), at(1000), None)
    assert given[-1] == job.log_path


def test_a_driver_elsewhere_reads_both_from_the_store(s3_port: int, node_cache: Path, session: Any) -> None:
    job = dataclasses.replace(JOB, storage_dir=mirror(uri(s3_port, "far/run")) / "training")
    keeper, seen = StepKeeper(job, session), list[int]()
    keeper.on_train_begin(None, at(3), None)
    keeper.on_log(None, at(4), None, logs={"loss": 1.0})
    keeper.on_save(SimpleNamespace(output_dir=str(node_cache)), at(4), None)
    for path in (job.step_path, job.log_path):
        path.unlink()  # as on a node that has neither
    with Watcher(job, lambda done, total: seen.append(done), print, poll_s=60):
        pass
    assert seen == [3]
    assert read_objects(read_small_file(job.log_path)) == [{"step": 4, "loss": 1.0}]


def test_a_store_that_does_not_answer_ends_no_training(
    session: Any, node_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its worker's step, nor the driver's look at it."""
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    job = dataclasses.replace(JOB, storage_dir=mirror(uri(9, "away/run")) / "training")
    keeper = StepKeeper(job, session, poll_s=0)
    assert keeper.sync_norm_and_stop(1.0, CPU, step=3) == 1.0
    monkeypatch.setattr(trainer, "STORE_POLL_S", 0.0)
    assert keeper.sync_norm_and_stop(1.0, CPU, step=4) == 1.0
    looked: list[object] = []

    def bounded(tasks: object, limit: int, losses: Losses, look: Any, *_: object) -> list[Any]:
        looked.extend([look(0, 1), losses.last_word(), losses.reached()])
        return [{}]

    monkeypatch.setattr(stage, "bounded", bounded)
    stage.run_alone(job, Resources(), print, lambda: None)
    assert looked == [b"", "", b""]
