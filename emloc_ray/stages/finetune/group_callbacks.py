"""What Ray Train's controller calls: one callback logs why workers begin again, one ends a group that waits where it is
stopped, one releases what a lost group held. The controller imports this alone: all of a training would keep it for seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from emloc_ray.errors import Stopped
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import ensure, exists, open_artifact, publish
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.ray.losses import is_lost, is_preempted, last_line, reason


def content(path: Path) -> bytes:
    """Reads a file that workers write, without a copy on this node; empty where there is none."""
    try:
        with open_artifact(path) as (stream, _):
            return stream.read()
    except FileNotFoundError:
        return b""


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
        word = content(self.job.last_word_path).decode()
        why = f"lost its worker because {word or reason(error)[0]}" if lost or word else f"failed ({last_line(error)})"
        again = f"restarted from the last checkpoint ({self.failures} of {self.job.max_failures})"
        if taken_back:
            why, again = (
                "lost its worker because its node was taken back",
                "restarted elsewhere from the last checkpoint",
            )
        path = self.job.failure_path
        check_lock(path)  # which ends a group that is late, rather than have it begin again
        ensure(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{self.job.stage}: rank {rank} {why}; {again}.\n")
        publish(path)


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
