"""Shows a batch: a live table on a terminal; elsewhere a line when a task begins and ends."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from emloc_ray.runs.batch.state import BatchState, TaskState
from emloc_ray.text import NO_BREAK, duration, size

_STYLES = {"done": "green", "failed": "red", "cancelled": "dim", "running": "cyan", "waiting": "dim"}
_COLUMNS = ("task", "state", "loss", "held-out", "memory", "time", "remarks")
_LEFT_OUT_FIRST = ("remarks", "memory", "loss")  # where the width is too small for all columns
_ORDER = ("running", "failed", "done", "cancelled", "waiting")
_MARGIN = 8  # lines of a terminal outside the table
_MIN_NAME = 30  # letters that a long name gets before columns are left out


def batch_table(state: BatchState, rows: int | None = None, now: float | None = None, width: int = 200) -> Table:
    """The tasks, running and failed ones first: ``rows`` of them and a count of the rest. Leaves out columns where long names
    fill the ``width``."""
    now = time.time() if now is None else now
    table = Table(title=counts(state), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    tasks = sorted(state.tasks, key=lambda task: _ORDER.index(task.status))
    shown = tasks if rows is None else tasks[:rows]
    cells = [_cells(task, now) for task in shown]
    widths = {name: max([len(name), *(len(row[name]) for row in cells)]) + 2 for name in _COLUMNS}
    kept = list(_COLUMNS)
    for name in _LEFT_OUT_FIRST:
        if sum(widths[column] for column in kept[1:]) + min(widths["task"], _MIN_NAME) > width:
            kept.remove(name)
    for name in kept:
        if name in ("task", "state"):
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[name] for name in kept))
    if len(shown) < len(tasks):
        table.caption = f"and {len(tasks) - len(shown)} more"
    return table


def _cells(task: TaskState, now: float) -> dict[str, Text]:
    began_at = task.stage_began_at if task.status == "running" and task.active else None
    spent = task.seconds + (0.0 if began_at is None else now - began_at)
    return {
        "task": Text(task.name),
        "state": Text(status_text(task), style=_STYLES[task.status]),
        "loss": Text("" if task.train_loss is None else f"{task.train_loss:.3f}"),
        "held-out": Text(held_out(task)),
        "memory": Text(size(task.planned_bytes).replace(" ", NO_BREAK)),
        "time": Text(duration(spent).replace(" ", NO_BREAK) if spent else ""),
        "remarks": Text(str(task.notes or "")),
    }


def at_rest(state: BatchState) -> BatchState:
    """The state of a batch that no process runs: tasks that ran when it was killed wait for the next run."""
    tasks = (replace(t, status="waiting", active=False) if t.status == "running" else t for t in state.tasks)
    return replace(state, tasks=tuple(tasks))


def status_text(task: TaskState) -> str:
    """A task's stage with its progress, or its end, or where it was interrupted."""
    if task.status == "running" and task.stage:
        units = "" if task.units is None else f" {task.units[0]}/{task.units[1]}"
        whose = "another's " if task.waits_for == "another" else ""
        return f"{task.stage}{units}" if task.active else f"waits for {whose}{task.stage}"
    if task.status == "waiting" and task.stage:
        return f"interrupted in {task.stage}"
    return f"{task.status} in {task.stage}" if task.status in ("failed", "cancelled") and task.stage else task.status


def held_out(task: TaskState) -> str:
    """The held-out loss, of the original and of the result as it is served; empty before the evaluation."""
    if task.original_loss is None or task.served_loss is None:
        return ""
    return f"{task.original_loss:.3f}{NO_BREAK}→{NO_BREAK}{task.served_loss:.3f}"


def counts(state: BatchState) -> str:
    """The number of tasks of each status, in words."""
    number: Counter[str] = Counter(task.status for task in state.tasks)
    return ", ".join(f"{number[status]} {status}" for status in _ORDER if number[status]) or "no tasks yet"


def reasons(state: BatchState) -> list[str]:
    """A sentence for each task that did not end well."""
    return [f"{t.name}: {t.status}{f' in {t.stage}' if t.stage else ''}: {t.reason}" for t in state.tasks if t.reason]


class BatchView:
    """Shows a batch as it goes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_interactive else None
        self._statuses: dict[str, str] = {}
        self._shown_at = 0.0

    def __enter__(self) -> BatchView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, state: BatchState) -> None:
        """Shows the state as it is now."""
        for task in state.tasks:
            before = self._statuses.get(task.name)
            self._statuses[task.name] = task.status
            changed = before not in (None, task.status)
            if changed and (task.is_over or self._live is None) and task.status != "waiting":
                self.tell(_line(task))
        if self._live is not None and time.monotonic() - self._shown_at > 0.5:
            self._shown_at = time.monotonic()
            rows = max(4, self.console.height - _MARGIN)
            self._live.update(batch_table(state, rows, width=self.console.width), refresh=True)

    def tell(self, text: str) -> None:
        """Prints a line above the table."""
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def _line(task: TaskState) -> str:
    if task.status == "running":
        return f"… {task.name} begins"
    mark = "✓" if task.status == "done" else "✗"
    losses = f", loss {held_out(task)}" if held_out(task) else ""
    shared = f", {', '.join(task.taken)} from the cache" if task.taken else ""
    reason = f": {task.reason}" if task.reason else ""
    return f"{mark} {task.name} {task.status} in {duration(task.seconds)}{losses}{shared}{reason}"
