"""What Ray Train's controller calls. :class:`FailureLog` logs why workers begin again. :class:`StopBeforeStart` ends a group
that waits while the training is stopped, :class:`StartWatch` one that does not start. :class:`GroupRelease` gives a lost
group's resources back. The controller imports this alone: all of a training would keep it for seconds."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from emloc_ray.errors import StageError, Stopped
from emloc_ray.io.formats.json_lines import append_line
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import discard, ensure, exists, open_newest, publish
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.ray.losses import is_lost, is_preempted, last_line, reason
from emloc_ray.stages.ray.pace import end_process
from emloc_ray.text import duration

LOOK_S = 1.0
_FOR_PLACES_S, _MOST_FOR_PLACES_S = 60.0, 24 * 3600.0  # Ray Train's default; of more, infinity too, so much


def read_small_file(path: Path) -> bytes:
    """Reads a file that workers write, without keeping a copy on this node; empty where there is none."""
    try:
        with open_newest(path) as (stream, *_):
            return stream.read()
    except FileNotFoundError:
        return b""


def _note(job: FinetuneJob, text: str) -> None:
    """Adds a line to what the driver reads of a group's failures."""
    path = job.failure_path
    check_lock(path)  # which ends a group that is late, rather than have it begin again
    ensure(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, f"{job.stage}: {text}")
    publish(path)


class FailureLog(ray.train.UserCallback):
    """Writes down, where the driver reads it, why the workers begin again; Ray Train calls it in a process of its own."""

    def __init__(self, job: FinetuneJob) -> None:
        self.job = job
        self.failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One line for each failure of the group that it recovers from: of a worker that was lost, or of the first. A worker
        whose peer was killed may be the first to fail, over the connection to it."""
        taken_back = any(is_preempted(error) for error in worker_exceptions.values())  # which Ray Train counts apart
        self.failures += not taken_back
        if self.failures > self.job.max_failures:
            return
        lost = [rank for rank, error in worker_exceptions.items() if is_lost(error)]
        rank = min(lost or worker_exceptions)
        error = worker_exceptions[rank]
        word = read_small_file(self.job.last_word_path).decode()
        why = f"lost its worker because {word or reason(error)[0]}" if lost or word else f"failed ({last_line(error)})"
        again = f"restarted from the last checkpoint ({self.failures} of {self.job.max_failures})"
        if taken_back:
            why, again = (
                "lost its worker because its node was taken back",
                "restarted elsewhere from the last checkpoint",
            )
        _note(self.job, f"rank {rank} {why}; {again}.")
        discard(self.job.last_word_path)  # told by now


class StopBeforeStart(WorkerGroupCallback):
    """Ends a training that is stopped while its group waits for its resources, which may never come. Ray Train 2.60 asks for
    them anew after each RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S (60 s), for ever, and goes on after no error but its own."""

    def __init__(self, job: FinetuneJob) -> None:
        self.job = job

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Raises Stopped where the driver has asked for it, TakenOver where another process holds the run by now."""
        check_lock(self.job.stop_path)
        if exists(self.job.stop_path):
            raise Stopped(f"{self.job.stage} was stopped before its workers began.")


class StartWatch(WorkerGroupCallback, ControllerCallback):
    """Bounds how long a group may take to start.

    Ray Train 2.60 waits for a group's places for 60 s a try, and asks a training worker for an answer for 600 s. In between it
    waits for ever: a worker that freezes there is never given up. This callback ends the controller's process, and with it the
    workers; the driver starts another. Workers load no model by then, so one bound does for every size.

    A worker that is lost there is replaced by Ray Train for ever, and without a word. This callback tells of each, and gives up
    after ``max_failures`` in a row.
    """

    def __init__(self, job: FinetuneJob, within_s: float) -> None:
        self.job, self.within_s = job, within_s
        self.failures, self.ends = 0, False
        self.started: threading.Event | None = None  # of the group that is being started

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Watches for as long as it may wait for places and ``within_s`` beside."""
        while self.ends:  # its workers are gone, and it shall ask for no places for others
            time.sleep(LOOK_S)
        self._over()
        self.started = threading.Event()
        threading.Thread(target=self._watch, args=(self.started,), daemon=True).start()

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """All have started, which is progress."""
        self._over()
        self.failures = 0

    async def before_controller_shutdown(self) -> None:
        """There is nothing to watch any more."""
        self._over()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Writes down why a group begins again of which a worker was lost while it started. Raises StageError where that
        happened more than ``max_failures`` times in a row."""
        error = current_state.training_failed_error if isinstance(current_state, ReschedulingState) else None
        if error is None or not is_lost(error):  # as where it waits for places
            return
        self.failures += not is_preempted(error)
        why, what_to_do = reason(error)
        if self.failures > self.job.max_failures:
            raise StageError(
                f"{self.job.stage}: a worker was lost before it began {self.failures} times, the last time because {why}:"
                f" {what_to_do}."
            )
        again = "restarted" if is_preempted(error) else f"restarted ({self.failures} of {self.job.max_failures})"
        _note(self.job, f"a worker was lost before it began because {why}; {again}.")

    def _over(self) -> None:
        if self.started is not None:
            self.started.set()

    def _watch(self, started: threading.Event) -> None:
        """By counting its looks, for this process may have been stopped itself."""
        asked_s = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _FOR_PLACES_S))
        for_places_s = min(asked_s, _MOST_FOR_PLACES_S)
        for _ in range(round((for_places_s + self.within_s) / LOOK_S)):
            if started.wait(LOOK_S):
                return
        self.ends = True
        why = f"its workers did not start within {duration(self.within_s)}"
        end_process(self.job.last_word_path, why)


class GroupRelease(WorkerGroupCallback, ControllerCallback):
    """Removes the placement group of a group's workers. Ray Train 2.60 keeps it until the driver ends where a worker is lost
    while the training is launched on it; the next group would wait for its CPUs for ever. These callbacks are Ray's for
    developers, which ``RunConfig.callbacks`` accepts."""

    def __init__(self) -> None:
        self.granted: PlacementGroup | None = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Removes that of the group before; where it is gone already, that does nothing."""
        self._release()

    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[Any]]:
        """Asks a worker for this group's."""
        self.granted = ray.get(workers[0].execute_async(get_current_placement_group))
        return {}

    async def before_controller_shutdown(self) -> None:
        """Removes that of the last group."""
        self._release()

    def _release(self) -> None:
        if self.granted is not None:
            remove_placement_group(self.granted)
            self.granted = None
