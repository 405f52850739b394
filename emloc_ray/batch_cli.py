"""The command line's verbs for many tasks: ``batch``, ``cancel``, and ``cache`` with ``list`` and ``prune``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from emloc_ray.errors import ConfigError, StageError

if TYPE_CHECKING:
    from emloc_ray.batch.driver import Handed

BatchPath = Annotated[Path, typer.Argument(metavar="BATCH", help="A YAML file that names a base config and tasks.")]
BatchDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="The batch's run_dir.")]
CachePlace = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's place, such as RUN_DIR/cache.")]


def run_batch(console: Console, path: Path, overrides: list[str], dry_run: bool) -> None:
    """Checks a batch whole, then runs it, or hands its new tasks to the process that runs it already.

    Raises:
        StageError: where a task failed; the others went on.
    """
    from emloc_ray.batch import driver
    from emloc_ray.batch.table import BatchView, batch_table, reasons
    from emloc_ray.batch.tasks import read_batch
    from emloc_ray.console import count_progress, duration

    batch = read_batch(path, overrides)
    with count_progress(console, "Checking every task") as progress:
        prepared = driver.prepare_batch(batch, progress)
    seconds = sum(stage.seconds for task in batch.tasks for stage in prepared.work.expected(task).values())
    place = prepared.run.place
    console.print(
        f"[bold]{prepared.run.name}[/]: {len(batch.tasks)} tasks, about {duration(seconds)} one after another if nothing is"
        f" shared or done yet; in {place}",
        soft_wrap=True,
    )
    if dry_run:
        return
    with console.status("Handing new tasks to the process that runs this batch"):
        handed = driver.hand_over(prepared)
    if handed is not None:
        console.print(_told(handed), soft_wrap=True, markup=False)
        return
    with BatchView(console) as view:
        state = driver.run_batch(prepared, view.show, view.tell)
    console.print(batch_table(state))
    lost = state.count("failed", "late")
    if lost:
        again = f"{lost} of {len(state.tasks)} tasks did not end well: the same command does them again."
        raise StageError("\n".join([*reasons(state), again]))
    console.print(f"Results in {place}: summary.parquet, report.html, tasks/", soft_wrap=True)


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
    return f"{len(names)} task{'' if len(names) == 1 else 's'} ({some})"


def show_batch(console: Console, run: Any, watch: bool) -> None:
    """The table of a batch, once or again and again until it is over."""
    from rich.live import Live

    from emloc_ray.batch.state import read_state
    from emloc_ray.batch.table import batch_table, reasons

    def table() -> Table:
        state = read_state(run)
        assert state is not None
        return batch_table(state)

    if watch:
        with Live(table(), console=console, auto_refresh=False) as live:
            while run.holder() is not None:
                live.update(table(), refresh=True)
                time.sleep(1)
    console.print(table())
    holder = run.holder()
    console.print(f"Running: {holder}" if holder else "Not running.")
    state = read_state(run)
    for line in reasons(state) if state else ():
        console.print(line, soft_wrap=True, markup=False)


def cancel_tasks(console: Console, place: str, names: list[str], undo: bool) -> None:
    """Asks the process that runs a batch, or will run it next, to end some tasks, or to take them up again."""
    from emloc_ray.batch.driver import cancel
    from emloc_ray.io.run_directory import RunDirectory

    if undo and RunDirectory(place).holder() is not None:
        raise ConfigError(f"{place} is being run: a cancelled task is taken up again by the next emloc-ray batch.")
    live = cancel(RunDirectory(place).existing(), names, undo)
    what = "taken up again" if undo else "cancelled"
    when = (
        "now"
        if live
        else "when emloc-ray batch is run again"
        if undo
        else "and left out when emloc-ray batch is run again"
    )
    console.print(f"{', '.join(names)}: {what} {when}.", soft_wrap=True)


def list_cache(console: Console, place: str) -> None:
    """The entries of a cache, those used last first."""
    from emloc_ray.console import gib
    from emloc_ray.io.artifact_cache import ArtifactCache

    entries = sorted(ArtifactCache(place).entries(), key=lambda entry: entry.used_at, reverse=True)
    table = Table(
        title=f"{len(entries)} entries, {gib(sum(entry.bytes for entry in entries)).strip()}", title_justify="left"
    )
    for column in ("stage", "key", "size", "made by", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        table.add_row(entry.stage, entry.key[:12], gib(entry.bytes).strip(), entry.origin, used)
    console.print(table)


def prune_cache(console: Console, place: str, max_size: str) -> None:
    """Removes what was used longest ago until the rest fits."""
    from pydantic import TypeAdapter, ValidationError

    from emloc_ray.config import Size
    from emloc_ray.console import gib
    from emloc_ray.io.artifact_cache import ArtifactCache

    try:
        size = 0 if max_size.strip() == "0" else int(TypeAdapter(Size).validate_python(max_size))
    except ValidationError as error:
        raise ConfigError(f"--max-size {max_size!r} is no size: give a number and a unit, such as 50GiB.") from error
    removed = ArtifactCache(place).prune(size)
    freed = gib(sum(entry.bytes for entry in removed)).strip()
    console.print(f"{len(removed)} entries removed, {freed}. Runs keep what they took from them.")
