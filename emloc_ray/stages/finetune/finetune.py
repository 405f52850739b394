"""Finetune: Ray Train's TorchTrainer around the Hugging Face Trainer with PEFT on the emulator; one worker in a task."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from emloc_ray.errors import EmlocError, NumericsError, StageError, Stopped, TakenOver
from emloc_ray.io.formats.json_lines import read_objects
from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.node_cache import discard, exists, is_stored, sizes
from emloc_ray.stages.finetune.group_callbacks import (
    FailureLog,
    GroupRelease,
    StartWatch,
    StopBeforeStart,
    read_small_file,
)
from emloc_ray.stages.finetune.heartbeat import HeartbeatWatch
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import NEWEST, claim_try_folder, step_of
from emloc_ray.stages.finetune.trainer import STORE_POLL_S
from emloc_ray.stages.finetune.training import train_alone, train_loop
from emloc_ray.stages.ray import pace
from emloc_ray.stages.ray.losses import SILENT, Losses, Tell, explain, hopeless, last_line, own_error, unheard
from emloc_ray.stages.ray.spans import tell_span
from emloc_ray.stages.ray.tasks import LOOK_S, Progress, Resources, bounded, newest, silent
from emloc_ray.text import Rate

_POLL_S = 0.5
_BEGIN_S = 300.0  # a worker's imports and a large emulator's loading take less


# How a training runs; its last argument raises where it is to be left at once.
Runner = Callable[[FinetuneJob, Resources, Tell, Callable[[], None]], dict[str, Any]]


def finetune(
    job: FinetuneJob,
    resources: Resources,
    progress: Progress = silent,
    tell: Tell = unheard,
    runner: Runner | None = None,
    detail: Tell = unheard,
) -> dict[str, Any]:
    """Trains the adapter on the emulator and writes it to ``job.out_dir`` in PEFT's format.

    A lost worker restarts the group from its newest checkpoint, at most ``max_failures`` times. So does running the stage again
    with the same ``name``, as after the loss of Ray Train's own process. One worker runs alone and several as a group, unless a
    ``runner`` is given. ``detail`` hears loss, learning rate and tokens a second as they change.

    Raises NumericsError, naming the step, where loss or gradients stop being numbers; StageError where memory ran out, which a
    restart would not change; and what ``progress`` raised to stop the training, after a checkpoint.
    """
    job.storage_dir.mkdir(parents=True, exist_ok=True)
    if other := other_try(job):
        tell(other)
    job = replace(job, planned_s=resources.planned_s, folder=claim_try_folder(job.storage_dir))
    for left in (job.stop_path, job.step_path, job.begun_path, job.out_of_memory_path, job.last_word_path):
        discard(left)
    with Watcher(job, progress, tell, detail=detail) as watcher:
        outcome = (runner or runner_of(job, resources))(job, resources, tell, watcher.check)
    if outcome.get("out_of_memory"):
        raise explain(MemoryError(), job.stage)
    if outcome["stopped"] and watcher.stop is not None:
        raise watcher.stop
    if outcome["failure"]:
        raise NumericsError(outcome["failure"])
    # Steps that a lost worker had logged and its successor did again count once.
    logged = {line["step"]: line for line in read_objects(read_small_file(job.log_path))}
    history = sorted(logged.values(), key=lambda line: line["step"])
    scores = {line["step"]: line for line in read_objects(read_small_file(job.validation_path))}
    ordered = sorted(scores.values(), key=lambda line: line["step"])
    keeps_best = job.validation is not None and job.validation.keeps_best
    goes_by = "loss" if job.validation is None else job.validation.goes_by
    return {
        "num_workers": resources.num_workers,
        "steps": outcome["steps"],
        "train_loss": mean_loss(history) if outcome["resumed"] and history else outcome["train_loss"],
        "history": [{"step": line["step"], "loss": line["loss"]} for line in history],
        "trainable_parameters": outcome["trainable_parameters"],
        # A resumed training's rate counts rows that an earlier try had read.
        "sequences_per_second": None if outcome["resumed"] else outcome["sequences_per_second"],
        **({"validation": {"history": ordered, "keeps_best": keeps_best, "goes_by": goes_by}} if ordered else {}),
    }


def other_try(job: FinetuneJob) -> str | None:
    """Says so where a try that was broken off had other inputs: none of its steps are gone on from."""
    logs = [path for path in sizes(job.storage_dir) if path.name.endswith(job.log_path.name.removeprefix(job.name))]
    if not logs or job.log_path in logs:
        return None
    reached = max((line["step"] for path in logs for line in read_objects(read_small_file(path))), default=0)
    return f"{job.stage} begins anew: its settings or inputs have changed since the try that reached step {reached}."


def mean_loss(history: Sequence[dict[str, Any]]) -> float:
    """The mean loss over all steps, from means since the entry before. The Trainer's own covers its last try alone."""
    ends = [line["step"] for line in history]
    steps = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    return sum(count * line["loss"] for count, line in zip(steps, history, strict=True)) / ends[-1]


def runner_of(job: FinetuneJob, resources: Resources) -> Runner:
    """One worker trains alone, but for DeepSpeed, which needs a group."""
    return run_alone if resources.num_workers == 1 and job.zero_config is None else run_group


def run_alone(job: FinetuneJob, resources: Resources, tell: Tell, check: Callable[[], None]) -> dict[str, Any]:
    """Trains in one task; a lost worker's successor starts from the newest checkpoint."""
    task = resources.task(train_alone, alone=job.leaves_traces).options(name=f"{job.stage}: {job.name}")

    def submit() -> Any:
        discard(job.begun_path)  # a try that was lost has left it
        return task.remote(job)

    step = newest(lambda: read_small_file(job.step_path), b"")
    is_stopped = newest(lambda: exists(job.stop_path) and not exists(job.begun_path), False)

    def look(done: int, total: int) -> bytes:
        """Ends a training that is stopped while its task waits for a worker, which may never come; else says how far it is."""
        check()
        if is_stopped():
            raise Stopped(f"{job.stage} was stopped before it began.")
        return step()

    losses = Losses(
        job.stage,
        tell,
        job.max_failures,
        reached=newest(lambda: newest_checkpoint(job), b""),
        last_word=newest(lambda: _last_word(job), ""),
    )
    look_s = STORE_POLL_S if is_stored(job.storage_dir) else LOOK_S
    [outcome] = bounded([("the training", submit)], 1, losses, look, look_s, resources.planned_s)
    return dict(outcome)


def run_group(job: FinetuneJob, resources: Resources, tell: Tell, check: Callable[[], None]) -> dict[str, Any]:
    """Trains in a Ray Train group; where its leading process is lost, in another."""
    losses = Losses(job.stage, tell, reached=lambda: newest_checkpoint(job), last_word=lambda: _last_word(job))
    begun_at = time.time()
    with _interruptible():
        while (outcome := _fit(job, resources, losses)) is None:
            check()
    for rank, span in enumerate(outcome["spans"]):
        who = {"stage": job.stage, "worker": f"rank {rank}", "unit": "the training"}
        tell_span(replace(span, begun_at=begun_at, finished_at=time.time(), **who))
    return outcome


def _fit(job: FinetuneJob, resources: Resources, losses: Losses) -> dict[str, Any] | None:
    """What rank 0 returns; None where the process that leads the workers was lost, and another may go on."""
    watch = HeartbeatWatch(job, pace.PATIENCE_S)
    own = [FailureLog(job), StopBeforeStart(job), StartWatch(job, pace.PATIENCE_S), GroupRelease(), watch.heartbeat]
    before = newest_checkpoint(job)
    try:
        with watch, tempfile.TemporaryDirectory() as folder:
            return dict(_trainer(job, resources, own, folder).fit().return_value)
    except ray.train.WorkerGroupError as error:  # what workers raise, or are lost more often than max_failures
        came_on = job.max_failures > 0 and newest_checkpoint(job) != before
        # Of a lost worker its peers' closed connections may be all that is heard.
        if not came_on or own_error(error) is not None or hopeless(error) is not None:
            if word := _last_word(job):
                raise StageError(f"{job.stage}: a worker was lost because {word}: {SILENT}.") from error
            raise
        if word := _last_word(job):
            losses.tell(f"{job.stage}: a worker was lost because {word}; restarted from the last checkpoint.")
            discard(job.last_word_path)
        losses.tell(
            f"{job.stage}: it has made progress since it first failed, so failures are counted from zero again."
        )
        return None
    except (ray.exceptions.RayError, ray.train.ControllerError) as error:
        if isinstance(failure := getattr(error, "controller_failure", None), EmlocError):
            raise failure from error
        watch.release()
        time.sleep(losses.record_lost_worker("the training", error))
        discard(job.last_word_path)  # told by now
        return None


def _trainer(job: FinetuneJob, resources: Resources, callbacks: Sequence[Any], folder: str) -> Any:
    """Ray Train's trainer. It needs a ``folder``, which nobody reads: the session keeps the checkpoints. Ranks wait for one
    another for ``ddp_timeout``, and at least as long as a watchdog does for one that starts, scores or saves."""
    timeout_s = max(job.training_arguments.get("ddp_timeout") or 0, pace.patience(job.planned_s))
    return TorchTrainer(
        train_loop,  # type: ignore[arg-type]
        train_loop_config={"job": job, "threads": resources.threads, "device": resources.device},
        torch_config=TorchConfig("nccl" if resources.gpus_per_worker else "gloo", timeout_s=math.ceil(timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": resources.cpus_per_worker,
                **({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
                **({"memory": resources.memory_per_worker} if resources.memory_per_worker else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=job.name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
            callbacks=list(callbacks),
        ),
    )


def newest_checkpoint(job: FinetuneJob) -> bytes:
    """What names the checkpoint to go on from; empty where there is none."""
    return read_small_file(job.place / NEWEST)


def kept_steps(job: FinetuneJob) -> int:
    """How many steps that checkpoint has."""
    named = newest_checkpoint(job)
    return max(0, step_of(json.loads(named)["folder"])) if named else 0


def _last_word(job: FinetuneJob) -> str:
    return read_small_file(job.last_word_path).decode()


def _lines(path: Path) -> list[str]:
    return read_small_file(path).decode(errors="replace").splitlines()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train takes Ctrl-C for itself, exits from inside its handler and leaves that behind: gives Python's back."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if error.code:  # a SIGTERM's, which the run itself makes of it
            raise
        raise KeyboardInterrupt from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


class Watcher:
    """Polls what the workers tell while the training blocks the driver, and shows how far it is and what was lost."""

    def __init__(
        self,
        job: FinetuneJob,
        progress: Progress,
        tell: Tell,
        poll_s: float | None = None,
        detail: Tell = unheard,
        begin_s: float = _BEGIN_S,
    ) -> None:
        """``begin_s``: seconds after which it is reported that no worker has begun."""
        self.job, self.progress, self.tell, self.detail = job, progress, tell, detail
        self.pace = Rate()
        self.newest: dict[str, Any] = {}  # of what rank 0 left in the step file
        self.num_shown = len(_lines(job.failure_path))
        self.stop: EmlocError | None = None
        self.stop_requested = False
        self.failed_looks: set[str] = set()
        self.begin_deadline: float | None = (
            time.monotonic() + begin_s
        )  # None once a worker has begun, or its delay was told
        self.poll_s = poll_s or (STORE_POLL_S if is_stored(job.storage_dir) else _POLL_S)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.over.wait(self.poll_s):
            self._look()
        self._look()

    def _look(self) -> None:
        """Never raises: it passes on the stop and reports failures."""
        try:
            self._show()
        except (EmlocError, OSError):
            pass  # a store that does not answer now is asked again
        except Exception as error:  # noqa: BLE001  see above
            text = f"{self.job.stage}: a look at the training failed ({type(error).__name__}: {last_line(error)})."
            if text not in self.failed_looks:
                self.failed_looks.add(text)
                with contextlib.suppress(Exception):
                    self.tell(text)

    def _show(self) -> None:
        if objects := read_objects(read_small_file(self.job.step_path)):
            self.newest = objects[-1]
        elif not self.newest:
            self.newest = {"done": kept_steps(self.job)}
        if self.stop is None:
            try:
                if "loss" in self.newest:
                    self.detail(self._detail_line(self.newest))
                self.progress(self.newest["done"], self.job.max_steps)
            except EmlocError as error:
                self.stop = error
        if self.stop is not None and not self.stop_requested:
            if not isinstance(self.stop, TakenOver):  # the other's training reads the same file
                try:
                    write_text(self.job.stop_path, str(self.stop))
                except TakenOver as error:
                    self.stop = error
            self.stop_requested = True
        if self.begin_deadline is not None:
            self._look_for_begin(self.begin_deadline)
        failures = _lines(self.job.failure_path)
        for text in failures[self.num_shown :]:
            self.tell(text)
        self.num_shown = len(failures)

    def _look_for_begin(self, latest: float) -> None:
        begun, late = exists(self.job.begun_path), time.monotonic() > latest
        if late and not begun:
            self.tell(
                f"{self.job.stage}: no worker has begun to train yet: it may wait for CPUs, GPUs or memory (`ray status` shows"
                " them), for the emulator's files, or for a node that does not answer."
            )
        if late or begun:
            self.begin_deadline = None

    def _detail_line(self, line: dict[str, Any]) -> str:
        rate = self.pace.rate(line["done"], time.monotonic())
        parts = [f"loss {line['loss']:.3f}"]
        parts += [f"learning rate {line['learning_rate']:.2g}"] if "learning_rate" in line else []
        parts += [f"{rate * self.job.tokens_a_step:,.0f} tokens/s"] if rate and self.job.tokens_a_step else []
        return ", ".join(parts)

    def check(self) -> None:
        """Raises what says that another process holds the run by now, where one does."""
        if isinstance(self.stop, TakenOver):
            raise self.stop

    def __enter__(self) -> Watcher:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
