"""Reporters hear how a run goes: they show it, log it, trace it, write its page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from emloc_ray.io.runs.secret_values import hide_secrets

if TYPE_CHECKING:
    from emloc_ray.io.runs.directory import RunDirectory


Awaited = Literal["resources", "another"]
"""What a stage waits for: workers, or another run, which makes the same."""


class Reporter:
    """Hears how a run goes; what a subclass leaves out does nothing."""

    def wait(self, stage: str, awaited: Awaited | None = None) -> None:
        """A stage is next, and has not begun."""

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins; returns its progress callback, which takes the units done and all units."""
        return lambda done, total: None

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has finished."""

    def skip(self, stage: str) -> None:
        """A stage was done before."""

    def note(self, text: str) -> None:
        """A remark for the user."""

    def detail(self, text: str) -> None:
        """A few words on how the running stage is doing; each call replaces the last one's."""

    def changed(self, run: RunDirectory) -> None:
        """The run's manifest and metrics.json have changed."""


class Reporters(Reporter):
    """Several reporters as one, called in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def wait(self, stage: str, awaited: Awaited | None = None) -> None:
        """Calls each."""
        for reporter in self.reporters:
            reporter.wait(stage, awaited)

    def start(self, stage: str) -> Callable[[int, int], None]:
        """Returns a callback that calls each one's."""
        callbacks = [reporter.start(stage) for reporter in self.reporters]

        def progress(done: int, total: int) -> None:
            for callback in callbacks:
                callback(done, total)

        return progress

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """Calls each."""
        for reporter in self.reporters:
            reporter.finish(stage, result, usage)

    def skip(self, stage: str) -> None:
        """Calls each."""
        for reporter in self.reporters:
            reporter.skip(stage)

    def note(self, text: str) -> None:
        """Calls each, without secrets."""
        for reporter in self.reporters:
            reporter.note(hide_secrets(text))

    def detail(self, text: str) -> None:
        """Calls each."""
        for reporter in self.reporters:
            reporter.detail(text)

    def changed(self, run: RunDirectory) -> None:
        """Calls each."""
        for reporter in self.reporters:
            reporter.changed(run)
