"""Which task of a batch goes first with a shared stage: the one that has begun it, where another would begin it from zero."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from emloc_ray.config.steps import STEP_NAMES
from emloc_ray.errors import Stopped

Tries = Mapping[str, tuple[str, float]]
"""By stage, of what a task has begun and not finished: the fingerprint of its inputs, and the seconds that it took."""
_LOOK_S = 0.1


class Begun:
    """The tasks that have begun a stage, of those with the same inputs the one that took longest; safe for many threads."""

    def __init__(
        self, tries: Mapping[str, Tries] | None = None, is_running: Callable[[str], bool] = lambda task: False
    ) -> None:
        """``tries`` by task."""
        all_tries = (
            (spent, task, (stage, inputs))
            for task, of_task in (tries or {}).items()
            for stage, (inputs, spent) in of_task.items()
        )
        self._first = {begun: task for _, task, begun in sorted(all_tries)}
        self.tasks = frozenset(self._first.values())
        self._is_running = is_running
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def turn(self, task: str, stage: str, inputs: str, stopped: Callable[[], bool]) -> Iterator[None]:
        """The block is the task's turn at a stage of these inputs; waits while another one that has begun it runs and has not
        had its own. Raises Stopped where ``stopped`` turns true meanwhile.

        No two wait for each other: who waits at a stage goes first with no other inputs of it, nor with a stage before.
        """
        self.pass_on(task, stage, inputs)
        while (first := self._first.get((stage, inputs), task)) != task and self._is_running(first):
            if stopped():
                raise Stopped(f"Task {task} was stopped while {first} goes first with {stage}.")
            time.sleep(_LOOK_S)
        try:
            yield
        finally:
            self.pass_on(task, stage)

    def pass_on(self, task: str, stage: str, inputs: str | None = None) -> None:
        """A task goes first no more with the stages up to this one, but for this one of these ``inputs``."""
        so_far = STEP_NAMES[: STEP_NAMES.index(stage) + 1]
        with self._lock:
            for begun in [begun for begun, first in self._first.items() if first == task]:
                if begun[0] in so_far and begun != (stage, inputs):
                    del self._first[begun]
