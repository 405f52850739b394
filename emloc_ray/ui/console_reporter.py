"""What a console shows of a run while it goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from emloc_ray.runs.reporter import Reporter
from emloc_ray.text import Rate, duration, size

if TYPE_CHECKING:
    from emloc_ray.stages.stage import Stage


@functools.cache
def _stages() -> dict[str, Stage]:
    from emloc_ray.stages.order import STEPS  # a table of results needs no torch

    return {stage.name: stage for stage in STEPS}


class _Count(MofNCompleteColumn):
    """Units done of all; nothing as long as nobody knows how many there are."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


class ConsoleReporter(Reporter):
    """Shows a run: a bar for each stage on a terminal that draws any, elsewhere a line where a stage begins and ends, and now and
    then."""

    def __init__(self, console: Console, interval_s: float = 30.0) -> None:
        """``interval_s``: seconds between two lines of a stage, where there is no terminal."""
        self.console, self.interval_s = console, interval_s
        self._detail = ""
        self.bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=24 if console.width >= 100 else 10),
            _Count(),
            TimeElapsedColumn(),
            # By its ratio it gets the width that the others leave.
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            console=console,
            transient=True,
            expand=True,
        )
        self.task: TaskID | None = self.bars.add_task("Waiting for Ray", total=None, said="")

    def __enter__(self) -> ConsoleReporter:
        if self.console.is_interactive:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def paused(self, asks: Callable[[Sequence[str]], bool]) -> Callable[[Sequence[str]], bool]:
        """What asks, without bars meanwhile."""

        def ask(sentences: Sequence[str]) -> bool:
            self.bars.stop()
            answer = asks(sentences)
            self.__enter__()
            return answer

        return ask

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        title, pace, self._detail = _stages()[stage].title, Rate(), ""
        said_at = time.monotonic()
        self._remove()
        if self.console.is_interactive:
            self.task = self.bars.add_task(title, total=None, said="")
        else:
            self.console.print(f"{title} …", highlight=False)

        def progress(done: int, total: int) -> None:
            nonlocal said_at
            now = time.monotonic()
            said = [pace.left(done, total, now), self._detail]
            if self.task is not None:
                self.bars.update(
                    self.task, completed=done, total=max(total, 1), said=escape(", ".join(filter(None, said)))
                )
            elif now >= said_at + self.interval_s:
                said_at = now
                line = ", ".join(filter(None, [f"{done} of {total}", *said]))
                self.console.print(f"  {title}: {escape(line)}", highlight=False, soft_wrap=True)

        return progress

    def detail(self, text: str) -> None:
        """How what runs now is going: shown with its progress."""
        self._detail = text

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """Shows a stage's result, wall time and peak memory."""
        self._remove()
        outcome = f"from the cache, made by {result['taken_from']}" if result.get("taken_from") else None
        outcome = outcome or _stages()[stage].summary(result)
        line = f"[green]✓[/] {_stages()[stage].title:<20} {duration(usage['wall_s']):>8}  {size(usage['peak_pss_bytes']):>8}"
        self.console.print(f"{line}  {escape(outcome)}".rstrip(), highlight=False, soft_wrap=True)

    def _remove(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def skip(self, stage: str) -> None:
        """Says that a stage was done before."""
        self._remove()
        self.console.print(f"[dim]· {_stages()[stage].title:<20} done before, inputs unchanged[/]", highlight=False)

    def note(self, text: str) -> None:
        """Shows a remark."""
        self.console.print(f"[yellow]![/] {escape(text)}", highlight=False, soft_wrap=True)
