"""The command line's verbs for many tasks: ``batch``, ``cancel``, ``cache list`` and ``cache prune``."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from rich.text import Text

from emloc_ray.errors import ConfigError, EmlocError, StageError
from emloc_ray.text import counted, duration, size
from emloc_ray.ui.shell import AcceptVersions, Overrides, Yes, agrees, console, flag, guarded, sentence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emloc_ray.io.runs.cache import ArtifactCache
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.runs.batch.driver import PreparedBatch
    from emloc_ray.runs.batch.state import BatchState

BatchPath = Annotated[Path, typer.Argument(metavar="BATCH", help="A YAML file that names a base config and tasks.")]
KEYS = (
    "Keys of BATCH: base (a config), run_dir, tasks (a list, a table or a directory), grid (key: values), max_concurrent,"
    " limits (cpus, gpus, memory), cache (path, max_size). Of a task: name, base, priority, and all that a config has. On"
    " the command line, BATCH's own keys are for it, a config's for every task."
)
CachePlace = Annotated[str, typer.Argument(metavar="CACHE", help="A cache's place, such as RUN_DIR/cache.")]
cache_app = typer.Typer(help="List or shrink the cache that runs of a batch share.", no_args_is_help=True)


@guarded
def batch(
    config: BatchPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, flag("--dry-run", help="Check every task and stop.")] = False,
    accept_versions: AcceptVersions = False,
    yes: Yes = False,
) -> None:
    """Run many tasks over one cluster; a second time, run new and failed ones."""
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.runs.batch import driver
    from emloc_ray.runs.batch.tasks import read_batch
    from emloc_ray.runs.changes import check_accepted
    from emloc_ray.ui.batch_table import BatchView, batch_table, reasons
    from emloc_ray.ui.page import PageReporter
    from emloc_ray.ui.terminal import progress_bar, quiet_libraries

    quiet_libraries()
    read = read_batch(config, overrides or ())
    if not dry_run:
        driver.check_free(RunDirectory(read.config.run_dir))
    with progress_bar(console, "Checking every task") as progress:
        prepared = driver.prepare_batch(read, progress, PageReporter(), accept_versions)
    seconds = sum(prepared.work.planned(task).seconds for task in read.tasks)
    place = prepared.run.place
    console.print(
        f"[bold]{escape(prepared.run.name)}[/]: {counted(len(read.tasks), 'task')}, about {duration(seconds)} one after another"
        f" if nothing is shared or done yet; in {escape(place)}",
        soft_wrap=True,
    )
    for remark in filter(None, (driver.lacking_disk(prepared), driver.lacking_cache(prepared))):
        console.print(f"[yellow]![/] {escape(remark)}", soft_wrap=True)
    changes = [] if yes else prepared.work.changes(read.tasks)
    if dry_run:
        _say_all(prepared, changes)
        return
    check_accepted(changes, functools.partial(agrees, console))
    with BatchView(console) as view:
        try:
            state = driver.run_batch(prepared, view.show, view.tell, accept_changes=True)
        except (KeyboardInterrupt, SystemExit):
            _write_so_far(prepared.run)
            raise
    console.print(batch_table(state, width=console.width))  # first: the disk may be full
    problems = [*reasons(state), *_write_results(prepared.run, state)]
    if failed := state.count("failed"):
        problems.append(f"{failed} of {counted(len(state.tasks), 'task')} failed: the same command tries again.")
    if problems:
        raise StageError("\n".join(problems))
    console.print(f"Results in {place}: summary.parquet, report.html, tasks/", soft_wrap=True, markup=False)


def _say_all(prepared: PreparedBatch, changes: Sequence[str]) -> None:
    """What a dry run says of a batch whose tasks are checked: what would change, and every remark. Raises ConfigError where the
    first rows of a task are bad."""
    from emloc_ray.runs.remarks import said_once

    work, tasks = prepared.work, prepared.batch.tasks
    work.check_rows()
    for change in changes:
        console.print(f"[yellow]![/] {escape(change)}.", soft_wrap=True)
    cpus = 0 if prepared.batch.ray.joins else os.cpu_count() or 1  # of a Ray that is joined none are known yet
    for remark in (*work.remarks(tasks), *said_once(map(work.config, tasks), cpus)):
        console.print(escape(remark), soft_wrap=True)
    if prepared.run.store is not None:
        copied = sum(map(work.shared_bytes, tasks))
        console.print(
            f"A store has no links: each task gets its own copy of what tasks share, {size(copied)} in all;"
            " calibration.keep: none deletes a task's Grams once its adapter is corrected.",
            soft_wrap=True,
        )
    console.print("The batch is valid; nothing was started.")


def _write_results(run: RunDirectory, state: BatchState) -> list[str]:
    """Writes the summary and the page; a sentence for each that cannot be written."""
    from emloc_ray.runs.batch.summary import write_summary
    from emloc_ray.ui.batch_page import write_batch_report

    problems = []
    for write in (write_summary, write_batch_report):
        try:
            write(run, state)
        except (EmlocError, OSError) as error:
            problems.append(sentence(error))
    return problems


def _write_so_far(run: RunDirectory) -> None:
    """Writes the results of a batch that was stopped, where its state can be read."""
    with contextlib.suppress(EmlocError, OSError):
        if (state := state_now(run)) is not None:
            _write_results(run, state)


def asking(place: str) -> Status:
    """Says on a terminal that a place is being asked: an object store that is out of reach takes a minute."""
    return console.status(escape(f"Asking {place} …"))


def state_now(run: Any) -> BatchState | None:
    """The state of a batch, with running tasks only while a process runs it; None for the directory of a run."""
    from emloc_ray.runs.batch.state import BatchState, is_batch, read_state
    from emloc_ray.ui.batch_table import at_rest

    if not is_batch(run):
        return None
    is_running = run.holder() is not None  # asked before the state, as the batch may end in between
    state = read_state(run) or BatchState(time.time())  # which a batch writes once Ray has started
    return state if is_running else at_rest(state)


def show_batch(run: Any, watch: bool) -> None:
    """Shows the table of a batch, with ``watch`` as it goes until it is over."""
    from emloc_ray.ui.batch_table import BatchView, batch_table, reasons

    with BatchView(console) as view:
        while watch and not console.quiet and run.holder() is not None and (state := state_now(run)) is not None:
            view.show(state)
            time.sleep(1)
    state, holder = state_now(run), run.holder()
    assert state is not None
    console.print(batch_table(state, width=console.width))
    for line in (f"Running: {holder}" if holder else "Not running.", *reasons(state)):
        console.print(line, soft_wrap=True, markup=False)


@guarded
def cancel(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The batch's run_dir.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="The tasks' names.")],
    undo: Annotated[bool, flag("--undo", help="Have the next emloc-ray batch run them.")] = False,
) -> None:
    """End tasks of a batch; the others continue."""
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.runs.batch import state

    with asking(run_dir):
        is_running = state.cancel(RunDirectory(run_dir), tasks, undo)
    if is_running:
        effect = "cancelled; a running task ends as soon as its stage can stop"
    else:
        effect = f"the next emloc-ray batch {'runs' if undo else 'skips'} {'it' if len(tasks) == 1 else 'them'}"
    console.print(f"{', '.join(tasks)}: {effect}.", soft_wrap=True, markup=False)


@cache_app.command("list")
@guarded
def list_cache(cache: CachePlace) -> None:
    """List a cache's entries, those used last first."""
    with asking(cache):
        entries = _cache(cache).entries()
    held = sum(entry.bytes for entry in entries)
    table = Table(
        title=f"{counted(len(entries), 'entry', 'entries')}, {size(held)}",
        title_justify="left",
    )
    for column in ("stage", "key", "size", "made by", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        table.add_row(entry.stage, entry.key[:12], size(entry.bytes), Text(entry.origin), used)
    console.print(table)


@cache_app.command("prune")
@guarded
def prune_cache(
    cache: CachePlace,
    max_size: Annotated[str, typer.Option("--max-size", help="What may stay, such as 50GiB; 0: nothing.")],
) -> None:
    """Remove the entries used longest ago, until the rest fits."""
    from pydantic import TypeAdapter, ValidationError

    from emloc_ray.config.base import Size

    try:
        most = 0 if max_size.strip() == "0" else int(TypeAdapter(Size).validate_python(max_size))
    except ValidationError as error:
        raise ConfigError(f"--max-size {max_size!r} is no size: give a number and a unit, such as 50GiB.") from error
    with asking(cache):
        removed = _cache(cache).prune(most)
    freed = sum(entry.bytes for entry in removed)
    console.print(
        f"{counted(len(removed), 'entry', 'entries')} removed, {size(freed)}. Runs keep what they took from them."
    )


def _cache(place: str) -> ArtifactCache:
    from emloc_ray.io.runs.cache import ArtifactCache

    cache = ArtifactCache(place)
    if not cache.is_made():
        raise ConfigError(f"{place} holds no artifact cache: name the place of one, such as RUN_DIR/cache.")
    return cache
