"""Who is told how a run goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Reporter(Protocol):
    """Who is told how a run goes; the command line shows it, a library's user may ignore it."""

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins; gives its progress callback."""

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has ended well."""

    def skip(self, stage: str) -> None:
        """A stage was found done."""

    def note(self, text: str) -> None:
        """Something that a reader should know."""


class SilentReporter:
    """Tells nobody."""

    def start(self, stage: str) -> Callable[[int, int], None]:
        """Gives a callback that does nothing."""
        return lambda done, total: None

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """Nothing."""

    def skip(self, stage: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Reporters:
    """Tells several, in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def start(self, stage: str) -> Callable[[int, int], None]:
        """Gives a callback that tells each one's."""
        callbacks = [reporter.start(stage) for reporter in self.reporters]

        def progress(done: int, total: int) -> None:
            for callback in callbacks:
                callback(done, total)

        return progress

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """Tells each."""
        for reporter in self.reporters:
            reporter.finish(stage, result, usage)

    def skip(self, stage: str) -> None:
        """Tells each."""
        for reporter in self.reporters:
            reporter.skip(stage)

    def note(self, text: str) -> None:
        """Tells each."""
        for reporter in self.reporters:
            reporter.note(text)
