"""The end of a training's worker whose next step does not come: its peers, and who waits for them, would wait for ever."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import TrainerCallback

from emloc_ray.stages.ray.pace import bound, silence

_RECENT_STEPS = 100


class _At(NamedTuple):
    """What a worker did last, and since when it is at a step (monotonic clock); None where it is at something else."""

    after: str
    since: float | None


class Watchdog(TrainerCallback):
    """Ends this process where a step takes so much longer than other steps that it hangs (:func:`bound`). A start, a score or a
    checkpoint may take as long as a piece may where few are known.

    It comes after the callbacks that ask for scores and checkpoints. It counts its own looks rather than read a clock, so a
    process that was stopped for long goes on.
    """

    def __init__(self, planned_s: float, end: Callable[[str], None], look_s: float = 1.0) -> None:
        """``planned_s``: as for :class:`~emloc_ray.stages.ray.pace.Pace`; ``end`` hears why."""
        self._planned_s, self._end, self._look_s = planned_s, end, look_s
        self._at = _At("its start", None)
        self._took: collections.deque[float] = collections.deque(maxlen=_RECENT_STEPS)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was no step is over."""
        if self._at.since is None:
            self._at = _At(self._at.after, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Another step is done, and the next begins, or something else does."""
        now = time.monotonic()
        if self._at.since is not None:
            self._took.append(now - self._at.since)
        others = control.should_evaluate or control.should_save or control.should_training_stop
        self._at = _At(f"step {state.global_step}", None if others else now)

    def watch(self) -> None:
        """Looks until the block is over; its thread runs this."""
        seen, looks = self._at, 0
        while not self.over.wait(self._look_s):
            at = self._at
            looks = looks + 1 if at is seen else 0
            seen, waited_s = at, looks * self._look_s
            known = bound([] if at.since is None else [*self._took], self._planned_s)
            if known is not None and waited_s > known[0]:
                self._end(silence(waited_s, known[1], at.after))
                return

    def __enter__(self) -> Watchdog:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()
