"""A task's turns: each of its stages is admitted by what it needs, among those of all other tasks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from emloc_ray.batch.admission import Admission, Amount, Need, Standing
from emloc_ray.stages.cluster import Resources


@dataclass(frozen=True)
class Expected:
    """What the planner expects of a stage: seconds, and bytes that one worker holds."""

    seconds: float = 0.0
    worker_bytes: int = 0


class TaskTurns:
    """The turns of one task of a batch."""

    overlaps = False  # each stage asks for itself

    def __init__(
        self,
        standing: Standing,
        admission: Admission,
        expected: Mapping[str, Expected],
        stopped: Callable[[], bool],
        waits: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """``expected``: the task's stages in order; ``waits`` hears of a stage that begins to wait."""
        self.standing, self.admission, self.expected = standing, admission, expected
        self.stopped, self.waits = stopped, waits

    @contextlib.contextmanager
    def take(self, stage: str, asked: Resources, bag: bool) -> Iterator[Resources]:
        """Waits among all tasks' stages for what was asked for, or where it is a ``bag`` of tasks for some of it."""
        expected = self.expected.get(stage, Expected())
        each = Amount(asked.cpus_per_worker, asked.gpus_per_worker, expected.worker_bytes)
        need = Need(each, asked.num_workers, 1 if bag else asked.num_workers)
        standing = dataclasses.replace(self.standing, remaining=self.remaining(stage))
        self.waits(stage)
        with self.admission.admitted(standing, stage, need, self.stopped) as workers:
            yield dataclasses.replace(asked, num_workers=workers)

    def remaining(self, stage: str) -> float:
        """Seconds that the task is expected to take from a stage on; of all its stages where that is not among them."""
        names = list(self.expected)
        begin = names.index(stage) if stage in names else 0
        return sum(self.expected[name].seconds for name in names[begin:])
