"""How long pieces of a stage's work take, and the end of those that take much longer: they may hang for ever."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import ray

_LOOK_S = 1.0
# A piece is ended where it takes so many times the median of a few, and not before so many seconds, in which
# a slot's sums, which it writes now and then within a unit, reach a slow disk.
_TIMES_USUAL, _FEW_PIECES, _PATIENCE_S = 20, 5, 1800.0


class Ended(NamedTuple):
    """A task that was ended, how long it had given nothing, and the median of what others took; in seconds."""

    task: Any
    waited_s: float
    usual_s: float


class Pace:
    """When each task at work gave something last, and the seconds between what tasks gave."""

    def __init__(self) -> None:
        self._since: dict[Any, float] = {}
        self._took: list[float] = []

    def gave(self, task: Any) -> None:
        """Notes that a task has given what it was at, or, the first time, that it has begun."""
        now = time.monotonic()
        if task in self._since:
            self._took.append(now - self._since[task])
        self._since[task] = now

    def over(self, task: Any) -> None:
        """Forgets a task that has ended, or was lost."""
        self._since.pop(task, None)

    def end_overdue(self) -> list[Ended]:
        """Ends the tasks that have been at one piece for much longer than pieces take: a driver of a GPU, or a file system, may
        hang for ever.

        Not one that has begun nothing yet, which waits for a worker; nor what waits to be taken: this process itself may have
        been stopped for that long.
        """
        if len(self._took) < _FEW_PIECES:
            return []
        usual, now = statistics.median(self._took), time.monotonic()
        bound = max(_PATIENCE_S, _TIMES_USUAL * usual)
        late = [task for task, since in self._since.items() if now - since > bound]
        ended = []
        for task in late:
            if not ray.wait([task], timeout=_LOOK_S)[0]:
                ray.cancel(task, force=True)
                ended.append(Ended(task, time.monotonic() - self._since.pop(task), usual))
        return ended
