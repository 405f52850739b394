"""How long pieces of a stage's work take, and the end of those that take much longer: they may hang for ever."""

import contextlib
import faulthandler
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.turns import Still
from emloc_ray.text import duration

_LOOK_S = 1.0  # between two looks for what takes too long, and for what such a task gave meanwhile
_LAST_PIECES = 1000  # whose seconds are kept: a stage has hundreds of thousands, and each look sorts them
_LAST_S = 60.0  # for a last word
# A piece is ended where it takes so many times the median of a few, and not before so many seconds, in which
# a slot's sums, which it writes now and then within a unit, reach a slow disk.
_TIMES_USUAL, _FEW_PIECES, PATIENCE_S = 20, 5, 1800.0
# Where there are fewer, it is ended where it takes so many times what the whole stage was planned to take,
# and not before so many seconds: plans err, and machines are shared.
_TIMES_PLANNED, _PATIENCE_WITH_PLANS_S = 10, 6 * 3600.0


class Ended(NamedTuple):
    """A task that was ended, and why."""

    task: Any
    why: str


def bound(took: Sequence[float], planned_s: float) -> tuple[float, str] | None:
    """The seconds that a piece may take at most, and the figure that they follow from, as text: how long other pieces ``took``,
    or what was planned. None where nothing is known. ``planned_s``: as for :class:`Pace`."""
    if len(took) >= _FEW_PIECES:
        usual = statistics.median(took)
        return max(PATIENCE_S, _TIMES_USUAL * usual), f"{duration(usual)} is usual"
    if planned_s:
        against = f"{duration(planned_s)} was planned for all of the stage"
        return patience(planned_s), against
    return None


def patience(planned_s: float) -> float:
    """The seconds that what was planned to take ``planned_s`` in all may give nothing."""
    return max(_PATIENCE_WITH_PLANS_S, _TIMES_PLANNED * planned_s)


def silence(waited_s: float, against: str, after: str = "") -> str:
    """Why a piece was ended, ``after`` what it gave last."""
    return f"it gave nothing for {duration(waited_s)}{after and f' after {after}'}, where {against}"


class Overdue(Exception):
    """Work has given nothing for much longer than it does; says for how long."""


class WholePace:
    """How long all tasks of a stage together have given nothing, where single tasks cannot be watched. :meth:`check` is called
    every second."""

    def __init__(self, planned_s: float = 0.0) -> None:
        """``planned_s``: as for :class:`Pace`."""
        self._planned_s, self._still = planned_s, Still(0)
        self._took: deque[float] = deque(maxlen=_LAST_PIECES)

    def check(self, done: int) -> None:
        """Notes how many pieces are done. Raises Overdue where no further one was done for longer than :func:`bound` allows."""
        took = self._still.look(done)
        if took is not None:
            self._took.append(took)
        known = bound(self._took, self._planned_s)
        if known is not None and self._still.seconds > known[0]:
            raise Overdue(silence(self._still.seconds, known[1]))


class Pace:
    """When each running task last yielded something, and the seconds between what tasks yield."""

    def __init__(self, planned_s: float = 0.0) -> None:
        """``planned_s``: the seconds that all of it was planned to take; 0 where that is not known."""
        self._planned_s = planned_s
        self._gave: dict[Any, float] = {}  # when each task yielded last
        self._since: dict[Any, float] = {}  # when it, or all together, last gave a sign
        self._starting: set[Any] = set()
        self._left: object = None
        self._looked = -math.inf
        self._took: deque[float] = deque(maxlen=_LAST_PIECES)

    def gave(self, task: Any, starts: bool = False) -> None:
        """Notes that a task has yielded a piece; the first time, that it has begun. ``starts``: what follows is no piece yet, and
        may take as long as a piece may where few are known."""
        now = time.monotonic()
        if task in self._gave and task not in self._starting:
            self._took.append(now - self._gave[task])
        self._gave[task] = self._since[task] = now
        (self._starting.add if starts else self._starting.discard)(task)

    def see(self, left: object) -> None:
        """Notes what tasks have left so far beside what they yield; another value than before says that all of them go on."""
        if left != self._left:
            self._left, now = left, time.monotonic()
            self._since = dict.fromkeys(self._since, now)

    def over(self, task: Any) -> None:
        """Forgets a task that has ended, or was lost."""
        self._gave.pop(task, None)
        self._since.pop(task, None)
        self._starting.discard(task)

    def end_overdue(self) -> list[Ended]:
        """Cancels tasks whose current piece takes much longer than pieces usually do, or than the whole stage was planned to: a
        GPU driver or a file system may hang for ever. Returns them with the reason.

        Leaves alone a task that has yielded nothing yet, as it may wait for a worker, and one whose result waits to be taken, as
        this process may have been stopped. Looks at most once a second.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return []
        self._looked = now
        piece = bound(self._took, self._planned_s)
        start = bound([], self._planned_s) if self._starting else None
        ended = []
        for task, since in list(self._since.items()):
            known = start if task in self._starting else piece
            if known is not None and now - since > known[0] and not ray.wait([task], timeout=_LOOK_S)[0]:
                ray.cancel(task, force=True)
                ended.append(Ended(task, silence(time.monotonic() - since, known[1])))
                self.over(task)
        return ended


def end_process(word: Path, why: str) -> None:
    """Leaves ``why`` in a file, and in this worker's log where each thread is, and ends this process, which hears nothing."""
    faulthandler.dump_traceback(file=2)
    leave_word(word, why)
    os._exit(1)


def leave_word(word: Path, why: str) -> None:
    """Writes ``why`` to a file, or gives up after a minute, for a store may not answer."""

    def leave() -> None:
        with contextlib.suppress(Exception):
            write_text(word, why)

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(_LAST_S)
