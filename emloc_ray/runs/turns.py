"""When the stages of a run may start: those of a run that has the cluster for itself do at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Protocol

from emloc_ray.errors import Stopped
from emloc_ray.stages.ray.tasks import Resources

_TERMINATED = 128 + signal.SIGTERM  # a shell's exit code of what SIGTERM ended


class Turns(Protocol):
    """Decides when each stage of a run may start, and with how many workers."""

    def take(self, stage: str, asked: Resources, least: int) -> AbstractContextManager[Resources]:
        """Waits until the stage may start; gives the resources of its run: ``least`` workers or more, up to those asked for.
        Raises Stopped where the run shall end instead."""

    def first(self, stage: str, inputs: str) -> AbstractContextManager[None]:
        """Waits for a run that is to go first with a stage that many share, of the inputs of this fingerprint; the block is this
        run's turn. Raises Stopped where the run shall end instead."""

    def stopped(self) -> bool:
        """Whether the run shall end; polled while a stage runs."""


class AtOnce:
    """The turns of a run that has the cluster for itself. SIGTERM stops the stage that runs: a training saves a checkpoint."""

    def __init__(self, patience_s: float = 25.0) -> None:
        """``patience_s``: how long a stage may take to ask; then, or at a second signal, it is broken off. Kubernetes kills
        after 30 s."""
        self.patience_s = patience_s
        self._signalled = self._heard = False

    @contextlib.contextmanager
    def take(self, stage: str, asked: Resources, least: int) -> Iterator[Resources]:
        """Gives all that was asked for, at once. Raises SystemExit where SIGTERM stopped this stage, or came after the one
        before."""
        if threading.current_thread() is not threading.main_thread():  # which alone is given signals
            yield asked
            return
        before, patience = signal.getsignal(signal.SIGTERM), threading.Timer(self.patience_s, self._break_off)
        patience.daemon = True

        def stop(number: int, frame: FrameType | None) -> None:
            if self._signalled:
                raise SystemExit(_TERMINATED)
            self._signalled = True
            patience.start()

        signal.signal(signal.SIGTERM, stop)
        try:
            if self._signalled:
                raise Stopped(f"{stage} was stopped before it began.")
            yield asked
        except Stopped as error:
            if self._signalled:
                raise SystemExit(_TERMINATED) from error
            raise
        finally:
            patience.cancel()
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def first(self, stage: str, inputs: str) -> AbstractContextManager[None]:
        """Goes first."""
        return contextlib.nullcontext()

    def stopped(self) -> bool:
        """Whether SIGTERM came."""
        self._heard |= self._signalled
        return self._signalled

    def _break_off(self) -> None:
        if not self._heard:
            os.kill(os.getpid(), signal.SIGTERM)
