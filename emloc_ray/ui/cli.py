"""The command line: ``emloc-ray VERB CONFIG [key.path=value …]``."""

from __future__ import annotations

import functools
import io
import os
import shlex
import sys
import time
from enum import Enum
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from emloc_ray.config.steps import RESULTS, VERBS
from emloc_ray.errors import ConfigError, EmlocError
from emloc_ray.ui.batch_verbs import KEYS, asking, batch, cache_app, cancel, show_batch
from emloc_ray.ui.config_verbs import ConfigPath, init, prepare_config, preview, schema, validate
from emloc_ray.ui.result_verbs import RunPath, chat, fetch, gguf, place_of, push, report, run_of, starting
from emloc_ray.ui.run_status import show_status
from emloc_ray.ui.shell import AcceptVersions, Overrides, Verbs, Yes, agrees, console, flag, guarded, same_command

app = typer.Typer(
    cls=Verbs,
    name="emloc-ray",
    help="Fine-tune a large model through a small emulator of it, on Ray (EMLoC, arXiv 2506.12015).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_BEFORE, _RUNS = "Before a run", "Runs"


Verb = Enum("Verb", {verb: verb for verb in VERBS}, type=str)  # type: ignore[misc]
_LAST = Verb(VERBS[-1])


@app.callback()
def _options(
    shows_version: Annotated[
        bool,
        flag("--version", help="Print the version and exit.", is_eager=True, callback=lambda asked: _version(asked)),
    ] = False,
) -> None:
    pass


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"emloc-ray {version('emloc-ray')}")
        raise typer.Exit


Fresh = Annotated[bool, flag("--fresh", help="Delete what an earlier run left in run_dir, then start.")]
Quiet = Annotated[bool, flag("--quiet", "-q", help="Print errors alone.")]


app.command(rich_help_panel=_BEFORE)(init)
app.command(rich_help_panel=_BEFORE)(validate)
app.command(rich_help_panel=_BEFORE)(preview)


@app.command(rich_help_panel=_BEFORE)
@guarded
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    memory_budget: Annotated[
        str | None,
        typer.Option("--memory-budget", help="Choose what to train on within this, such as 24GiB, and plan that."),
    ] = None,
) -> None:
    """Show shapes, ranks and parameters, and every stage's memory, disk, time and resources; load no weights."""
    from emloc_ray.config.reading import load_config
    from emloc_ray.planning.budget import check_holding
    from emloc_ray.planning.plan import check_stages
    from emloc_ray.ui import api
    from emloc_ray.ui.terminal import plan_lines, plan_tables, quiet_libraries

    if memory_budget is not None and not memory_budget.strip():
        raise ConfigError("--memory-budget is empty: give a size, such as 24GiB.")
    read = load_config(config, overrides or ())
    with console.status("Planning from the config, the model's shapes and the first rows …"):
        quiet_libraries()
        planned = api.plan(read, memory_budget=memory_budget)
    for table in plan_tables(planned):
        console.print(table)
    for line in plan_lines(planned, api.plan_without_budget):
        console.print(escape(line), soft_wrap=True)
    if planned.choice is not None:
        whose = "the config's own" if memory_budget is None else "those of what is recommended"
        asked = f"emloc-ray run {shlex.quote(str(config))}"
        line = f"The stages above are {whose}; {asked} does what is recommended with these overrides:"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print(
            "  " + shlex.join([*(overrides or ()), *planned.choice.overrides]),
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    check_holding(planned.prepared)
    check_stages(planned)


@app.command(rich_help_panel=_BEFORE)
@guarded
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION | KEY]", help="One section or key; all by default.")
    ] = None,
) -> None:
    """Show every key of a config: its values, its default, its meaning."""
    from emloc_ray.config.keys import config_keys
    from emloc_ray.ui.terminal import keys_tables

    for table in keys_tables(config_keys(section)):
        console.print(table)


app.command(rich_help_panel=_BEFORE)(schema)


@app.command(rich_help_panel=_RUNS)
@guarded
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    begin: Annotated[Verb | None, typer.Option("--from", help="Redo from this stage on.")] = None,
    until: Annotated[Verb, typer.Option("--until", help="Stop after this stage.")] = _LAST,
    fresh: Fresh = False,
    accept_versions: AcceptVersions = False,
    yes: Yes = False,
    quiet: Quiet = False,
) -> None:
    """Run all stages: skip what is done, redo what the config changed, once you agree."""
    shown = Console(quiet=True) if quiet else console
    prepared = prepare_config(config, overrides, shown)  # says that it is at work, also while the rest is imported

    from emloc_ray.planning.plan import make_plan
    from emloc_ray.stages.order import STEPS
    from emloc_ray.text import duration, size
    from emloc_ray.ui import api
    from emloc_ray.ui.console_reporter import ConsoleReporter
    from emloc_ray.ui.terminal import evaluation_table, result_lines

    plan = make_plan(STEPS, prepared)
    shown.print(
        f"[bold]{escape(prepared.run.name)}[/]: {plan.parameters:,} parameters, emulator {plan.emulator_parameters:,};"
        f" {plan.steps}; about {duration(plan.seconds)} and {size(plan.disk_bytes)} of disk if nothing is done yet"
    )
    try:
        with ConsoleReporter(shown) as reporter:
            metrics = api.run(
                prepared.config,
                begin=begin and begin.value,
                until=until.value,
                fresh=fresh,
                reporter=reporter,
                prepared=prepared,
                accept_versions=accept_versions,
                accept_changes=yes or reporter.paused(functools.partial(agrees, shown)),
            )
    except EmlocError as error:
        if not isinstance(error, ConfigError):
            command = same_command({"fresh": fresh, "begin": begin})
            stays = f"Finished stages stay in {prepared.run.place}; {command} continues from there."
            raise type(error)(f"{error}\n{stays}") from error
        raise
    if until is _LAST:
        shown.print(evaluation_table(metrics))
    for line in result_lines(metrics, prepared.run.place):
        shown.print(escape(line), soft_wrap=True)


@app.command(rich_help_panel=_RUNS)
@guarded
def status(
    run_dir: RunPath,
    watch: Annotated[bool, flag("--watch", help="Refresh every second until the run is over.")] = False,
) -> None:
    """Show a run's finished stages, state and results so far; for a batch, its tasks."""
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.runs.batch.state import is_batch

    with asking(run_dir):
        place = RunDirectory(place_of(run_dir))
        holder = starting(place)
    if holder is not None:
        console.print(f"Running: {escape(holder)}; no stage has begun.", soft_wrap=True)
        if not watch:
            return
        while starting(place) is not None:
            time.sleep(1)
    with asking(run_dir):
        run = run_of(run_dir)
        of_many = is_batch(run)
    if of_many:
        show_batch(run, watch)
        return
    while watch and not console.quiet and run.holder() is not None:
        console.clear()
        show_status(console, run)
        time.sleep(1)
    show_status(console, run)


app.command(epilog=KEYS, rich_help_panel=_RUNS)(batch)
app.command(rich_help_panel=_RUNS)(cancel)
app.add_typer(cache_app, name="cache", rich_help_panel=_RUNS)
for _result_verb in (report, chat, push, gguf, fetch):
    app.command(rich_help_panel="Results")(_result_verb)


def _stage_command(verb: Verb, text: str) -> None:
    @app.command(name=verb.value, help=text, rich_help_panel="Up to one stage")
    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        fresh: Fresh = False,
        accept_versions: AcceptVersions = False,
        yes: Yes = False,
        quiet: Quiet = False,
    ) -> None:
        run(config, overrides, until=verb, fresh=fresh, accept_versions=accept_versions, yes=yes, quiet=quiet)


for _name, _result in RESULTS.items():
    _stage_command(Verb(_name), f"Run up to {_result}.")


def main() -> None:
    """The ``emloc-ray`` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks, such as half a surrogate pair, ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    # emloc_ray says in one sentence that the hub cannot be reached.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
