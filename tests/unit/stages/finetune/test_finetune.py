"""How a training is led and what is said of it, as far as it can be told without one."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from transformers import TrainerControl, TrainerState

from emloc_ray.errors import StageError, Stopped, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.stages.finetune import finetune as stage
from emloc_ray.stages.finetune import group_callbacks
from emloc_ray.stages.finetune.finetune import Watcher, finetune, mean_loss, run_alone, run_group, runner_of
from emloc_ray.stages.finetune.group_callbacks import FailureLog, GroupRelease, StartWatch
from emloc_ray.stages.finetune.heartbeat import HeartbeatWatch
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.trainer import StepKeeper
from emloc_ray.stages.finetune.training import of_ranks
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.spans import Span, listening
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.ray.usage import Usage

JOB = FinetuneJob(Path("e"), Path("t"), Path("o"), Path("s"), "name", {}, None, "base", 4, 1)
OUTCOME = {
    "stopped": False,
    "failure": "",
    "steps": 4,
    "resumed": True,
    "train_loss": 1.0,
    "trainable_parameters": 1,
    "spans": [],
}


def test_one_worker_runs_alone_unless_deepspeed_wants_a_group() -> None:
    assert runner_of(JOB, Resources(1)) is run_alone
    assert runner_of(JOB, Resources(2)) is run_group
    assert runner_of(dataclasses.replace(JOB, zero_config={"zero_optimization": {}}), Resources(1)) is run_group


@pytest.mark.parametrize(("code", "raised"), [(0, KeyboardInterrupt), (143, SystemExit)], ids=["Ctrl-C", "SIGTERM"])
def test_a_group_that_is_broken_off_ends_as_its_signal_asks(
    code: int, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train makes an exit of Ctrl-C, the run itself one of SIGTERM."""

    def fit(trainer: TorchTrainer) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    with pytest.raises(raised):
        run_group(dataclasses.replace(JOB, storage_dir=tmp_path), Resources(2), print, lambda: None)


@pytest.mark.parametrize(
    ("arguments", "planned_s", "timeout_s"),
    [({}, 60.0, 6 * 3600), ({"ddp_timeout": 7200}, 3600.0, 36000), ({"ddp_timeout": 90000}, 60.0, 90000)],
)
def test_ranks_wait_for_one_another_as_long_as_asked_and_as_their_watchdogs_do(
    arguments: dict[str, Any], planned_s: float, timeout_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def make(*_: Any, torch_config: Any, **__: Any) -> Any:
        made.append(torch_config)
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=OUTCOME))

    monkeypatch.setattr(stage, "TorchTrainer", make)
    job = dataclasses.replace(JOB, storage_dir=tmp_path, training_arguments=arguments)
    finetune(job, Resources(2, planned_s=planned_s))
    assert [(config.backend, config.timeout_s) for config in made] == [("gloo", timeout_s)]


def test_a_resumed_training_s_loss_is_that_of_all_its_steps() -> None:
    # Steps of losses 1 to 5, logged after the second, the third and the fifth.
    history = [{"step": 2, "loss": 1.5}, {"step": 3, "loss": 3.0}, {"step": 5, "loss": 4.5}]
    assert mean_loss(history) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        ({}, False),
        ({"report_to": "none"}, False),
        ({"report_to": ["tensorboard"]}, False),
        ({"report_to": ["tensorboard", "wandb"]}, True),
        ({"report_to": "mlflow"}, True),
        ({"full_determinism": True}, True),
        ({"tf32": True}, True),
        ({"use_liger_kernel": True}, True),
        ({"torch_compile_mode": "default"}, True),
        ({"weight_decay": 0.1}, False),
    ],
)
def test_a_process_that_the_next_training_would_find_changed_ends(arguments: dict[str, Any], ends: bool) -> None:
    assert dataclasses.replace(JOB, training_arguments=arguments).leaves_traces == ends


def test_an_unexpected_error_is_told_once_and_a_stop_is_heard_after_it(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path)
    notes: list[str] = []
    looks: list[int] = []

    def progress(done: int, total: int) -> None:
        looks.append(done)
        if len(looks) < 4:
            raise KeyError("a bug of a reporter")
        raise Stopped("stopped")

    with Watcher(job, progress, notes.append, poll_s=0.01):
        deadline = time.monotonic() + 20
        while not job.stop_path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert job.stop_path.read_text() == "stopped"
    assert notes == ["finetune: a look at the training failed (KeyError: 'a bug of a reporter')."]


@pytest.mark.parametrize("begun", [False, True])
def test_a_training_that_does_not_begin_is_told_once(tmp_path: Path, begun: bool) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path)
    if begun:
        job.begun_path.touch()
    notes: list[str] = []
    looks: list[int] = []
    with Watcher(job, lambda done, total: looks.append(done), notes.append, poll_s=0.01, begin_s=0.0):
        while len(looks) < 3:
            time.sleep(0.01)
    assert [note.partition("yet")[0] for note in notes] == (
        [] if begun else ["finetune: no worker has begun to train "]
    )


def test_who_lost_its_run_leaves_no_word_to_the_other_s_training(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "mine")
    run.lock()
    job = dataclasses.replace(JOB, storage_dir=run.path("adapter_training"))
    job.storage_dir.mkdir()
    session: Any = SimpleNamespace(rank=0, world_size=1, is_leaving=lambda: False)
    keeper, log = StepKeeper(job, session, poll_s=0), FailureLog(job)
    (tmp_path / "mine" / ".lock").write_text("process 2 on here\nanother\n")
    for write in (
        lambda: keeper.sync_norm_and_stop(None, torch.device("cpu"), step=1),
        lambda: keeper.on_log(None, SimpleNamespace(global_step=1, is_world_process_zero=True), None, {"loss": 1.0}),
        lambda: log.after_exception(None, {0: RuntimeError("failed")}),
    ):
        with pytest.raises(TakenOver):
            write()

    def stopped(done: int, total: int) -> None:
        raise Stopped("stopped")

    with Watcher(job, stopped, print, poll_s=60) as watcher:
        pass  # looks once at its end
    with pytest.raises(TakenOver):
        watcher.check()
    assert list(job.storage_dir.iterdir()) == []
    run.unlock()


def _steps_until_stopped(rank: int, root: Path, found: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'group'}", rank=rank, world_size=2)
    session: Any = SimpleNamespace(rank=rank, world_size=2, is_leaving=lambda: False)
    keeper = StepKeeper(dataclasses.replace(JOB, storage_dir=root), session, poll_s=0.05)
    control = TrainerControl()
    for step in range(1, 2000):
        if step == 5 and rank == 1:
            keeper.job.stop_path.touch()
        time.sleep(0.001)
        norm = keeper.sync_norm_and_stop(torch.tensor(float(step)), torch.device("cpu"), step)
        keeper.on_step_end(None, TrainerState(global_step=step), control)
        if keeper.stopped:
            break
    found.put((rank, step, norm, control.should_save, control.should_training_stop))


def test_several_workers_hear_a_stop_between_logged_steps_and_end_at_the_same_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    ranks = [context.Process(target=_steps_until_stopped, args=(rank, tmp_path, found)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = sorted(found.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert first[1:] == second[1:]
    assert 5 <= first[1] < 1999
    assert first[2:] == (float(first[1]), True, True)


def _peaks_of_two(rank: int, root: Path, found: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{root / 'group'}", rank=rank, world_size=2)
    found.put(of_ranks(Span("", f"process {rank}", "", 0.0, 1.0, gpu_peak_bytes=10 + rank)))


def test_a_group_s_peaks_are_those_of_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    ranks = [context.Process(target=_peaks_of_two, args=(rank, tmp_path, found)) for rank in range(2)]
    for process in ranks:
        process.start()
    first, second = (found.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert first == second
    assert [span.gpu_peak_bytes for span in first] == [10, 11]
    trained = SimpleNamespace(fit=lambda: SimpleNamespace(return_value={"spans": first}))
    monkeypatch.setattr("emloc_ray.stages.finetune.finetune.TorchTrainer", lambda *_, **__: trained)
    usage = Usage(JOB.stage)
    with listening(usage.hear):
        run_group(dataclasses.replace(JOB, storage_dir=tmp_path), Resources(2), print, lambda: None)
    assert usage.largest_gpu_bytes == 11


def test_a_group_that_waits_for_cpus_hears_that_it_is_stopped(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    held = ray.util.placement_group([{"CPU": 2}])  # all that there are
    ray.get(held.ready())

    def progress(done: int, total: int) -> None:
        raise Stopped("the batch is being stopped")

    try:
        with pytest.raises(Stopped, match="finetune was stopped before its workers began"):
            finetune(dataclasses.replace(JOB, storage_dir=tmp_path), Resources(2), progress)
    finally:
        ray.util.remove_placement_group(held)


def test_a_group_that_loses_a_worker_at_its_launch_gives_back_what_it_was_granted(
    ray_session: None, tmp_path: Path
) -> None:
    class LosesWorker(WorkerGroupCallback):  # here, as Ray Train's controller cannot import this module
        def after_worker_group_start(self, worker_group: Any) -> None:
            ray.kill(worker_group.get_workers()[0].actor)

    trainer = TorchTrainer(
        lambda: None,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(
            name="lost",
            storage_path=str(tmp_path),
            callbacks=[GroupRelease(), LosesWorker()],  # type: ignore[list-item]
        ),
    )
    with pytest.raises(ray.train.ControllerError):
        trainer.fit()
    groups = ray.util.placement_group_table().values()
    assert groups
    assert {group["state"] for group in groups} == {"REMOVED"}


def test_a_group_that_does_not_start_ends_with_its_controller_and_gives_back_what_it_was_granted(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    job = dataclasses.replace(JOB, storage_dir=tmp_path)

    class FreezesWorker(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            group_callbacks.LOOK_S = 0.1  # the looks that are left, one after another
            os.kill(worker_group.get_workers()[0].metadata.pid, signal.SIGSTOP)

    watch = HeartbeatWatch(job, 1800.0)
    trainer = TorchTrainer(
        lambda: None,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(
            name="frozen",
            storage_path=str(tmp_path),
            callbacks=[StartWatch(job, 15.0), watch.heartbeat, FreezesWorker()],  # type: ignore[list-item]
        ),
    )
    with pytest.raises(ray.exceptions.ActorDiedError), watch:
        trainer.fit()
    others = ray.util.placement_group([{"CPU": 0.5}])
    watch.release()
    assert ray.util.placement_group_table(others)["state"] != "REMOVED"
    ray.util.remove_placement_group(others)
    assert job.last_word_path.read_text() == "its workers did not start within 15 s"
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}
    again = ray.util.placement_group([{"CPU": 2}])
    assert again.wait(120)
    ray.util.remove_placement_group(again)


def test_workers_that_are_lost_before_they_train_are_told_of_and_given_up_in_the_end(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path, max_failures=2)
    watch = StartWatch(job, 1800.0)

    def begin_again(kind: type[Exception], cause: Exception | None = None) -> None:
        failure = kind("started badly") if cause is not None else WorkerGroupStartupTimeoutError(2)
        failure.__cause__ = cause
        watch.after_controller_state_update(None, ReschedulingState(ray.train.ControllerError(failure)))

    silent = ray.exceptions.ActorUnavailableError("keepalive watchdog timeout", None)
    begin_again(WorkerGroupStartupTimeoutError)  # it waits for places
    begin_again(WorkerGroupStartupFailedError, silent)
    begin_again(WorkerGroupStartupFailedError, ray.exceptions.ActorDiedError())
    watch.after_worker_group_training_start(None)
    begin_again(WorkerGroupStartupFailedError, silent)
    assert job.failure_path.read_text().splitlines() == [
        "finetune: a worker was lost before it began because it does not answer; restarted (1 of 2).",
        "finetune: a worker was lost before it began because its process crashed or was killed; restarted (2 of 2).",
        "finetune: a worker was lost before it began because it does not answer; restarted (1 of 2).",
    ]
    begin_again(WorkerGroupStartupFailedError, silent)
    with pytest.raises(
        StageError, match="a worker was lost before it began 3 times, the last time because it does not answer"
    ):
        begin_again(WorkerGroupStartupFailedError, silent)


def test_a_group_that_was_ended_for_it_did_not_start_is_told_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, told, watched = dataclasses.replace(JOB, storage_dir=tmp_path), list[str](), list[float]()
    losses = iter([ray.exceptions.ActorDiedError(), ray.exceptions.ActorDiedError()])

    def fit(loss: Exception | None) -> Any:
        if loss is None:
            return SimpleNamespace(return_value=OUTCOME)
        if len(watched) == 1:  # the second time it was something else
            job.last_word_path.write_text("its workers did not start within 30 min")
        raise loss

    def make(*_: Any, run_config: Any, **__: Any) -> Any:
        watched.extend(callback.within_s for callback in run_config.callbacks if isinstance(callback, StartWatch))
        return SimpleNamespace(fit=lambda: fit(next(losses, None)))

    monkeypatch.setattr(Losses, "delays", (0.0,))
    monkeypatch.setattr(stage, "TorchTrainer", make)
    finetune(job, Resources(2), tell=told.append)
    assert watched == [1800.0] * 3
    assert told == [
        "finetune: the training lost its worker because its workers did not start within 30 min; restarted (1 of 3).",
        "finetune: the training lost its worker because its process crashed or was killed; restarted (2 of 3).",
    ]
