"""What Ray Train's controller is to do besides: say why a group's workers begin again, and give back what a lost group held.
It imports this alone: all of a training would keep it for seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import ensure, open_artifact, publish
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


class GroupRelease(WorkerGroupCallback, ControllerCallback):
    """Gives back what a group's workers were granted. Ray Train does, but up to 2.60 not where one of them is lost while the
    training is launched on it: the driver kept that then, and the next group waited for it for ever. By Ray's callbacks for its
    developers, which ``RunConfig.callbacks`` takes for such ends."""

    def __init__(self) -> None:
        self.granted: PlacementGroup | None = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Of the group before; a second time does nothing."""
        self._release()

    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[Any]]:
        """Notes what this group was granted."""
        self.granted = ray.get(workers[0].execute_async(get_current_placement_group))
        return {}

    async def before_controller_shutdown(self) -> None:
        """Of the last group."""
        self._release()

    def _release(self) -> None:
        if self.granted is not None:
            remove_placement_group(self.granted)
            self.granted = None
