"""A task's turns: each of its stages is admitted by what it needs, among those of all other tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from emloc_ray.runs.batch.admission import Admission, Amount, Need, Standing
from emloc_ray.stages.ray.tasks import Resources


@dataclass(frozen=True)
class Expected:
    """What the planner expects of a stage: seconds, and bytes that one worker holds of its node's memory."""

    seconds: float = 0.0
    worker_bytes: int = 0


class Makers:
    """Which task makes what others wait for: it goes with the highest priority among them.

    Otherwise tasks between the two would hold up the higher through the lower (priority inheritance: Sha, Rajkumar and
    Lehoczky 1990).
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self._lock = threading.Lock()
        self._makers: dict[str, str] = {}
        self._waiting: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def waits_for(self, key: str, priority: int) -> Iterator[None]:
        """A task of this priority waits for a key's artifact, while the block lasts."""
        with self._lock:
            self._waiting.setdefault(key, []).append(priority)
            maker = self._makers.get(key)
        if maker is not None:
            self.admission.lift(maker, priority)
        try:
            yield
        finally:
            with self._lock:
                self._waiting[key].remove(priority)
                if not self._waiting[key]:
                    del self._waiting[key]

    @contextlib.contextmanager
    def makes(self, key: str, task: str) -> Iterator[None]:
        """A task makes it, while the block lasts."""
        with self._lock:
            self._makers[key] = task
        try:
            yield
        finally:
            with self._lock:
                self._makers.pop(key, None)

    def lifted(self, standing: Standing) -> Standing:
        """A task's standing with its own priority, or that of whoever waits for what it makes."""
        with self._lock:
            keys = [key for key, maker in self._makers.items() if maker == standing.task]
            waiting = [priority for key in keys for priority in self._waiting.get(key, ())]
        return dataclasses.replace(standing, priority=max([standing.priority, *waiting]))


class TaskTurns:
    """The turns of one task of a batch."""

    def __init__(
        self,
        standing: Standing,
        admission: Admission,
        makers: Makers,
        expected: Mapping[str, Expected],
        stopped: Callable[[], bool],
        waits: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """``expected``: the task's stages in order; ``waits`` hears of a stage that begins to wait."""
        self.standing, self.admission, self.makers, self.expected = standing, admission, makers, expected
        self.stopped, self.waits = stopped, waits

    @contextlib.contextmanager
    def take(self, stage: str, asked: Resources, least: int) -> Iterator[Resources]:
        """Waits among all tasks' stages for what was asked for, or where it is a bag of tasks for some of it."""
        expected = self.expected.get(stage, Expected())
        each = Amount(asked.cpus_per_worker, asked.gpus_per_worker, expected.worker_bytes)
        need = Need(each, asked.num_workers, least)
        standing = dataclasses.replace(self.standing, remaining=self.remaining(stage))
        self.waits(stage)
        with self.admission.admitted(standing, stage, need, self.stopped, self.makers.lifted) as workers:
            yield dataclasses.replace(asked, num_workers=workers)

    def waits_for(self, key: str) -> AbstractContextManager[None]:
        """Lends its priority to whoever makes that."""
        return self.makers.waits_for(key, self.standing.priority)

    def makes(self, key: str) -> AbstractContextManager[None]:
        """Borrows the priority of those who wait for it."""
        return self.makers.makes(key, self.standing.task)

    def remaining(self, stage: str) -> float:
        """Seconds that the task is expected to take from a stage on; of all its stages where that is not among them."""
        names = list(self.expected)
        begin = names.index(stage) if stage in names else 0
        return sum(self.expected[name].seconds for name in names[begin:])
