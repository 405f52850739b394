"""What a notebook shows of a run: a line for each stage, with a bar in the one that runs."""

import html
import time
from collections.abc import Callable
from typing import Any

from emloc_ray.runs.reporter import Reporter
from emloc_ray.stages.order import STEPS
from emloc_ray.text import Rate, duration, size

_STAGES = {stage.name: stage for stage in STEPS}


class NotebookReporter(Reporter):
    """Shows a run in one output of a cell, which changes while it runs; needs IPython alone."""

    def __init__(self, show: Callable[[str], None] | None = None, interval_s: float = 0.5) -> None:
        """``show`` takes the HTML that is to stand there, by default in the cell that runs; ``interval_s`` are the seconds
        between two changes at least."""
        self.show, self.interval_s = show or _output(), interval_s
        self._lines: list[str] = []
        self._detail = ""
        self._next = 0.0

    def start(self, stage: str) -> Callable[[int, int], None]:
        """A stage begins."""
        pace, self._detail = Rate(), ""
        self._draw(f"{_STAGES[stage].title} …")

        def progress(done: int, total: int) -> None:
            now = time.monotonic()
            left = pace.left(done, total, now)
            if now >= self._next or done == total:
                parts = [f"{_STAGES[stage].title}: {done} of {total}", left, html.escape(self._detail)]
                bar = f'<progress value="{done}" max="{max(total, 1)}"></progress>'
                self._draw(f"{bar} {', '.join(filter(None, parts))}")

        return progress

    def finish(self, stage: str, result: dict[str, Any], usage: dict[str, Any]) -> None:
        """A stage has finished."""
        said = "from the cache" if result.get("taken_from") else _STAGES[stage].summary(result)
        took = f"{duration(usage['wall_s'])}, {size(usage['peak_pss_bytes'])}"
        self._add(f"✓ {_STAGES[stage].title}, {took}{f': {html.escape(said)}' if said else ''}")

    def skip(self, stage: str) -> None:
        """A stage was done before."""
        self._add(f"· {_STAGES[stage].title}: done before, inputs unchanged")

    def detail(self, text: str) -> None:
        """How what runs now is going."""
        self._detail = text

    def note(self, text: str) -> None:
        """A remark."""
        self._add(f"! {html.escape(text)}")

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._draw()

    def _draw(self, last: str = "") -> None:
        self._next = time.monotonic() + self.interval_s
        self.show("<br>".join([*self._lines, *([last] if last else [])]))


def _output() -> Callable[[str], None]:
    """An output of the cell that runs."""
    from IPython.display import HTML, display

    shown = display(HTML(""), display_id=True)
    return lambda text: shown.update(HTML(text))
