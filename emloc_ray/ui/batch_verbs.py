"""The command line's verbs for many tasks: ``batch``, ``cancel``, and ``cache`` with ``list`` and ``prune``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from emloc_ray.errors import ConfigError, StageError

if TYPE_CHECKING:
    from emloc_ray.io.runs.cache import ArtifactCache
    from emloc_ray.runs.batch.driver import Handed
    from emloc_ray.runs.batch.state import BatchState

BatchPath = Annotated[Path, typer.Argument(metavar="BATCH", help="A YAML file that names a base config and tasks.")]
KEYS = (
    "Keys of BATCH: base (a config), run_dir, tasks (a list, a table or a directory), grid (key: values), max_concurrent,"
    " limits (cpus, gpus, memory), cache (path, max_size). Of a task: name, base, priority, deadline, owner, and all that a"
    " config has. On the command line, BATCH's own keys are for it, a config's for every task."
)
BatchDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="The batch's run_dir.")]
CachePlace = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's place, such as RUN_DIR/cache.")]


def run_batch(console: Console, path: Path, overrides: list[str], dry_run: bool) -> None:
    """Checks a batch whole, then runs it, or hands its new tasks to the process that runs it already.

    Raises:
        StageError: where a task failed; the others went on.
    """
    from emloc_ray.runs.batch import driver
    from emloc_ray.runs.batch.tasks import read_batch
    from emloc_ray.ui.batch_table import BatchView, batch_table, reasons
    from emloc_ray.ui.terminal import count_progress, duration, quiet_libraries

    quiet_libraries()
    batch = read_batch(path, overrides)
    with count_progress(console, "Checking every task") as progress:
        prepared = driver.prepare_batch(batch, progress)
    seconds = sum(stage.seconds for task in batch.tasks for stage in prepared.work.expected(task).values())
    place = prepared.run.place
    console.print(
        f"[bold]{escape(prepared.run.name)}[/]: {_tasks(len(batch.tasks))}, about {duration(seconds)} one after another if"
        f" nothing is shared or done yet; in {escape(place)}",
        soft_wrap=True,
    )
    if dry_run:
        console.print("All is good; nothing was started.")
        return
    with console.status("Handing new tasks to the process that runs this batch"):
        handed = driver.hand_over(prepared)
    if handed is not None:
        console.print(_told(handed), soft_wrap=True, markup=False)
        return
    with BatchView(console) as view:
        state = driver.run_batch(prepared, view.show, view.tell)
    console.print(batch_table(state, width=console.width))
    lost = state.count("failed", "late")
    if lost:
        again = "it" if lost == 1 else "them"
        told = f"{lost} of {_tasks(len(state.tasks))} did not end well: the same command does {again} again."
        raise StageError("\n".join([*reasons(state), told]))
    console.print(f"Results in {place}: summary.parquet, report.html, tasks/", soft_wrap=True, markup=False)


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


@contextlib.contextmanager
def asking(console: Console, place: str) -> Iterator[None]:
    """Says on a terminal that a place is being asked: an object store that is out of reach takes a minute to be known so."""
    with console.status(escape(f"Asking {place} …")):
        yield


def state_now(run: Any) -> BatchState | None:
    """How a batch stands, with the tasks that are running only if somebody runs it; None where it is none."""
    from emloc_ray.runs.batch.state import is_batch, read_state
    from emloc_ray.ui.batch_table import at_rest

    if not is_batch(run):
        return None
    is_run = run.holder() is not None  # before its state: it may end in between
    state = read_state(run)
    return state if state is None or is_run else at_rest(state)


def _told(handed: Handed) -> str:
    new, changed = handed.new, handed.changed
    told = f"{_counted(new)} handed over" if new else "it has been given nothing new"
    if changed:
        told += (
            f"; {_counted(changed)} changed, but waiting or running as before: cancel what is to change, or wait until it is"
            " over, then run the same command again"
        )
    return f"{handed.holder} runs this batch: {told}."


def _counted(names: Sequence[str]) -> str:
    some = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return f"{_tasks(len(names))} ({some})"


def show_batch(console: Console, run: Any, watch: bool) -> None:
    """The table of a batch, once or again and again until it is over."""
    from rich.live import Live

    from emloc_ray.ui.batch_table import batch_table, reasons

    def table() -> Table:
        state = state_now(run)
        assert state is not None
        return batch_table(state, width=console.width)

    if watch:
        with Live(table(), console=console, auto_refresh=False) as live:
            while not console.quiet and run.holder() is not None:
                live.update(table(), refresh=True)
                time.sleep(1)
    console.print(table())
    holder = run.holder()
    console.print(f"Running: {holder}" if holder else "Not running.", markup=False)
    state = state_now(run)
    for line in reasons(state) if state else ():
        console.print(line, soft_wrap=True, markup=False)


def cancel_tasks(console: Console, place: str, names: list[str], undo: bool) -> None:
    """Asks the process that runs a batch, or will run it next, to end some tasks, or to take them up again."""
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.runs.batch.driver import cancel

    with asking(console, place):
        run = RunDirectory(place)
        state, holder = state_now(run), run.holder()
        if undo and holder is not None:
            raise ConfigError(f"{place} is being run: a cancelled task is taken up again by the next emloc-ray batch.")
        statuses = {} if state is None else {task.name: task.status for task in state.tasks}
        for name in names:
            # Where nobody runs the batch, the next that does would do again what failed.
            status = statuses.get(name, "waiting")
            if status == "done" or (holder and status in ("failed", "late", "cancelled")):
                why = "nothing is left to do of it" if status == "done" else f"it is {status} already"
                raise ConfigError(f"{name} cannot be {'taken up again' if undo else 'cancelled'}: {why}.")
        live = cancel(run, names, undo)
    if live:
        told = "asked for; a task that runs ends as soon as its stage can leave off"
    else:
        told = f"to be {'run' if undo else 'left out'} when emloc-ray batch is run again"
    console.print(f"{', '.join(names)}: {told}.", soft_wrap=True, markup=False)


def list_cache(console: Console, place: str) -> None:
    """The entries of a cache, those used last first."""
    from emloc_ray.ui.terminal import gib

    with asking(console, place):
        entries = _cache(place).entries()
    size = gib(sum(entry.bytes for entry in entries)).strip()
    table = Table(title=f"{_entries(len(entries))}, {size}", title_justify="left")
    for column in ("stage", "key", "size", "made by", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        table.add_row(entry.stage, entry.key[:12], gib(entry.bytes).strip(), Text(entry.origin), used)
    console.print(table)


def prune_cache(console: Console, place: str, max_size: str) -> None:
    """Removes what was used longest ago until the rest fits."""
    from pydantic import TypeAdapter, ValidationError

    from emloc_ray.config.base import Size
    from emloc_ray.ui.terminal import gib

    try:
        size = 0 if max_size.strip() == "0" else int(TypeAdapter(Size).validate_python(max_size))
    except ValidationError as error:
        raise ConfigError(f"--max-size {max_size!r} is no size: give a number and a unit, such as 50GiB.") from error
    with asking(console, place):
        removed = _cache(place).prune(size)
    freed = gib(sum(entry.bytes for entry in removed)).strip()
    console.print(f"{_entries(len(removed))} removed, {freed}. Runs keep what they took from them.")


def _cache(place: str) -> ArtifactCache:
    from emloc_ray.io.runs.cache import ArtifactCache

    cache = ArtifactCache(place)
    if not cache.is_made():
        raise ConfigError(f"{place} holds no artifact cache: name the place of one, such as RUN_DIR/cache.")
    return cache


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"
