"""When a training's worker ends itself, and what is told of it."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.exceptions import ActorDiedError, WorkerCrashedError

from emloc_ray.errors import DataError, StageError
from emloc_ray.io.store.atomic import write_json
from emloc_ray.stages.finetune import finetune, watchdog
from emloc_ray.stages.finetune.group_callbacks import FailureLog
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import NEWEST
from emloc_ray.stages.finetune.watchdog import Watchdog
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.tasks import Resources

MINUTE, HOUR = 60.0, 3600.0
QUIET = SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False)
SAVES = SimpleNamespace(should_evaluate=False, should_save=True, should_training_stop=False)
JOB = FinetuneJob(Path("e"), Path("t"), Path("o"), Path("s"), "name", {}, None, "base", 4, 1, max_failures=1)
WORD = "it gave nothing for 31 min after step 6, where 2.0 s is usual"


class Training:
    """A worker by a pretended clock: what it does between the looks of its watchdog, of which there is one a minute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, planned_s: float) -> None:
        self.now, self.at_step, self.said = 0.0, 0, list[str]()
        self.watchdog = Watchdog(planned_s, self.said.append, look_s=MINUTE)
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)

    def steps(self, count: int, seconds: float, then: Any = QUIET) -> Iterator[None]:
        """Steps of so many seconds each, after which it does something else, where ``then`` says so."""
        for _ in range(count):
            self.watchdog.on_step_begin(None, None, QUIET)
            yield from self.nothing(seconds)
            self.at_step += 1
            self.watchdog.on_step_end(None, SimpleNamespace(global_step=self.at_step), then)

    def nothing(self, seconds: float) -> Iterator[None]:
        """The time goes by."""
        for _ in range(round(seconds / MINUTE)):
            self.now += MINUTE
            yield

    def watched(self, *parts: Iterator[None]) -> list[str]:
        """Why the watchdog ended it, where it did."""
        looks = (None for part in parts for _ in part)
        over: Any = SimpleNamespace(wait=lambda _: next(looks, "over") == "over")
        self.watchdog.over = over
        self.watchdog.watch()
        return self.said


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    return lambda planned_s=MINUTE: Training(monkeypatch, planned_s)


def test_a_step_that_does_not_come_ends_the_worker(training: Callable[..., Training]) -> None:
    quick = training()
    assert quick.watched(quick.steps(6, MINUTE), quick.nothing(29 * MINUTE)) == []
    assert quick.watched(quick.nothing(3 * MINUTE)) == []  # watched anew
    assert quick.watched(quick.nothing(HOUR)) == ["it gave nothing for 31 min after step 6, where 60 s is usual"]
    slow = training()  # steps on the original, whose weights come from a disk
    assert slow.watched(slow.steps(5, 20 * MINUTE), slow.nothing(6.6 * HOUR)) == []
    slow = training()
    assert slow.watched(slow.steps(5, 20 * MINUTE), slow.nothing(6.8 * HOUR)) == [
        "it gave nothing for 6.7 h after step 5, where 20 min is usual"
    ]


def test_first_steps_and_what_is_no_step_may_take_longer(training: Callable[..., Training]) -> None:
    begins = training()
    assert begins.watched(begins.nothing(5.9 * HOUR), begins.steps(4, MINUTE), begins.nothing(5.9 * HOUR)) == []
    scores = training()
    parts = scores.steps(9, MINUTE), scores.steps(1, MINUTE, SAVES), scores.nothing(5.9 * HOUR), scores.steps(3, MINUTE)
    assert scores.watched(*parts, scores.nothing(20 * MINUTE)) == []
    assert scores.watched(scores.steps(1, MINUTE), scores.nothing(HOUR)) == [
        "it gave nothing for 31 min after step 14, where 60 s is usual"
    ]
    never = training()
    assert never.watched(never.nothing(7 * HOUR)) == [
        "it gave nothing for 6.0 h after its start, where 60 s was planned for all of the stage"
    ]
    long = training(planned_s=2 * HOUR)
    assert long.watched(long.nothing(19 * HOUR)) == []
    unplanned = training(planned_s=0.0)
    assert unplanned.watched(unplanned.nothing(99 * HOUR)) == []


def test_a_process_that_was_stopped_goes_on(training: Callable[..., Training]) -> None:
    stopped = training()

    def for_long() -> Iterator[None]:
        stopped.now += 99 * HOUR
        yield

    assert stopped.watched(stopped.steps(6, MINUTE), for_long(), stopped.steps(3, MINUTE)) == []


def test_it_watches_while_its_block_lasts() -> None:
    with Watchdog(0.0, print) as known:
        assert known.thread.is_alive()
    assert not known.thread.is_alive()


@pytest.mark.slow
def test_a_process_ends_with_a_word_and_where_its_threads_are(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, threading, time\n"
        "from emloc_ray.stages.ray.pace import end_process\n"
        "hangs = threading.Event()\n"
        "def end(): hangs.wait(); end_process(pathlib.Path(sys.argv[1]), 'why')\n"
        "def hang(): hangs.set(); time.sleep(600)\n"
        "threading.Thread(target=end).start()\n"
        "hang()"
    )
    word = tmp_path / "storage" / "word.txt"
    done = subprocess.run([sys.executable, "-c", code, str(word)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, word.read_text()) == (1, "why")
    assert "in hang" in done.stderr


def test_a_group_s_log_says_why_a_worker_ended_itself(tmp_path: Path) -> None:
    log = FailureLog(dataclasses.replace(JOB, storage_dir=tmp_path))
    log.job.last_word_path.write_text(WORD)
    log.after_exception(None, {0: RuntimeError("Connection closed by peer")})
    assert log.job.failure_path.read_text() == (
        f"finetune: rank 0 lost its worker because {WORD}; restarted from the last checkpoint (1 of 1).\n"
    )
    assert not log.job.last_word_path.exists()  # told once


def test_a_group_s_log_ends_a_line_that_a_full_disk_cut(tmp_path: Path) -> None:
    log, cut = FailureLog(dataclasses.replace(JOB, storage_dir=tmp_path)), "finetune: rank 1 lost its wor"
    log.job.failure_path.write_text(cut)
    log.after_exception(None, {0: RuntimeError("Connection closed by peer")})
    lines = log.job.failure_path.read_text().splitlines()
    assert [len(lines), lines[0]] == [2, cut]


@pytest.mark.parametrize("heard", [{1: ActorDiedError()}, {0: RuntimeError("Connection closed by peer")}])
def test_a_word_of_a_group_that_came_on_is_not_told_of_the_next(
    heard: dict[int, Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, told = dataclasses.replace(JOB, storage_dir=tmp_path, max_failures=1), list[str]()
    tries = iter(range(3))

    def fit() -> Any:
        number = next(tries)
        if number == 0:
            job.last_word_path.write_text(WORD)
            write_json(job.place / NEWEST, {"folder": "checkpoint-4"})
            raise ray.train.WorkerGroupError("failed", heard)
        if number == 1:
            raise ActorDiedError()
        raise InterruptedError

    monkeypatch.setattr(finetune, "claim_try_folder", lambda _: job.folder)
    monkeypatch.setattr(Losses, "delays", (0.0,))
    monkeypatch.setattr(finetune, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    with pytest.raises(InterruptedError):
        finetune.finetune(job, Resources(2), tell=told.append)
    assert told == [
        f"finetune: a worker was lost because {WORD}; restarted from the last checkpoint.",
        "finetune: it has made progress since it first failed, so failures are counted from zero again.",
        "finetune: the training lost its worker because its process crashed or was killed; restarted (1 of 3).",
    ]


@pytest.mark.parametrize(
    ("error", "comes_on", "tries"),
    [
        (RuntimeError("Connection closed by peer"), True, 2),
        (RuntimeError("Connection closed by peer"), False, 1),
        (DataError("a.jsonl, row 3: no field 'text'."), True, 1),
        (OSError(errno.ENOSPC, "No space left on device"), True, 1),
    ],
)
def test_a_group_that_failed_is_begun_again_where_it_had_come_on_and_another_try_may_do(
    error: Exception, comes_on: bool, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, tried = dataclasses.replace(JOB, storage_dir=tmp_path), list[int]()

    def fit() -> Any:
        tried.append(len(tried))
        if comes_on:
            write_json(job.place / NEWEST, {"folder": "checkpoint-4"})
        raise ray.train.WorkerGroupError("failed", {0: error})

    monkeypatch.setattr(finetune, "claim_try_folder", lambda _: job.folder)
    monkeypatch.setattr(finetune, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fit))
    with pytest.raises(ray.train.WorkerGroupError):
        finetune.finetune(job, Resources(2))
    assert len(tried) == tries


def test_what_hangs_too_often_is_given_up_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = dataclasses.replace(JOB, storage_dir=tmp_path, max_failures=0)
    told: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        job.last_word_path.write_text(WORD)
        raise ray.train.WorkerGroupError("failed", {1: ActorDiedError()})

    monkeypatch.setattr(finetune, "TorchTrainer", lambda *_, **__: SimpleNamespace(fit=fail))
    with pytest.raises(StageError, match=f"^finetune: a worker was lost because {WORD}: see its log in Ray's session"):
        finetune.finetune(job, Resources(2), tell=told.append)

    def lone(*_: Any, **__: Any) -> Any:
        job.last_word_path.write_text(WORD)
        return iter([WorkerCrashedError()])

    def get(given: Exception) -> Any:
        raise given

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lone))
    monkeypatch.setattr(Resources, "task", lambda *_, **__: task)
    monkeypatch.setattr("emloc_ray.stages.ray.tasks.ray.wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
    monkeypatch.setattr("emloc_ray.stages.ray.tasks.ray.get", get)
    with pytest.raises(StageError, match=f"the training lost its worker 1 times, the last time because {WORD}: see"):
        finetune.finetune(job, Resources(1), tell=told.append)
    assert told == []
