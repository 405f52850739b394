"""When a stage may start, and with how many workers: at once in a run of its own, in turn where many share a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Resources


class Turns(Protocol):
    """Whom a run asks before each stage that it does."""

    def take(self, stage: str, asked: Resources, least: int) -> AbstractContextManager[Resources]:
        """Waits until the stage may start; gives what it may use while it runs.

        It may be fewer workers than it asked for, but not fewer than ``least``.

        Raises:
            Stopped: where the run is to end instead.
        """

    def stopped(self) -> bool:
        """Whether the run is to end: asked again and again while a stage runs."""


class AtOnce:
    """The turns of a run that has its cluster to itself."""

    @contextlib.contextmanager
    def take(self, stage: str, asked: Resources, least: int) -> Iterator[Resources]:
        """At once, all that was asked for."""
        yield asked

    def stopped(self) -> bool:
        """Never: who runs it interrupts it."""
        return False
