"""The command line's verbs for what a run made: ``report``, ``fetch``, ``push``, ``gguf`` and ``chat``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from emloc_ray.errors import ConfigError
from emloc_ray.ui.batch_verbs import asking, state_now
from emloc_ray.ui.shell import console, flag, guarded

if TYPE_CHECKING:
    from emloc_ray.io.runs.directory import RunDirectory


def place_of(run_dir: str) -> str:
    """A run's place, or the one that a config names; raises ConfigError where that names none."""
    from emloc_ray.config.reading import read_values, with_variables

    path = Path(run_dir)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return run_dir
    place = with_variables(read_values(path))[0].get("run_dir")
    if not place:
        raise ConfigError(f"{run_dir}: run_dir is missing: set it.")
    return str(place)


def run_of(run_dir: str) -> RunDirectory:
    """The run at a place, or that of a config. Raises ConfigError where it is none, or has not begun."""
    from emloc_ray.config.reading import is_batch, read_values
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.io.store.lock_file import NAME as LOCK

    place = place_of(run_dir)
    run = RunDirectory(place)
    try:
        return run.existing()
    except ConfigError:
        if holder := starting(run):
            raise ConfigError(f"{run.place}: {holder} starts it, and no stage has begun: ask again later.") from None
        if is_begun(run):
            raise
        if place != run_dir:
            verb = "batch" if is_batch(read_values(Path(run_dir))) else "run"
            raise ConfigError(f"{run_dir} has no run in {place} yet: emloc-ray {verb} {run_dir} starts one.") from None
        if LOCK in run.names():
            raise ConfigError(f"{run.place} is of a run that did not start: give its command again.") from None
        raise


def is_begun(run: RunDirectory) -> bool:
    """Whether a run has written its manifest, which comes before its first stage."""
    from emloc_ray.io.store.object_store import MANIFEST

    return MANIFEST in run.names()


def starting(run: RunDirectory) -> str | None:
    """The process that holds a run which has not begun, as while Ray starts."""
    return None if is_begun(run) else run.holder()


RunPath = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="A run's directory, its place on an object store, or its config.")
]


@guarded
def report(run_dir: RunPath) -> None:
    """Write report.html of a run or a batch, finished or not; of a batch summary.parquet too."""
    from emloc_ray.runs.batch.summary import write_summary
    from emloc_ray.ui.batch_page import write_batch_report
    from emloc_ray.ui.page import write_report

    with asking(run_dir):
        run = run_of(run_dir)
        state = state_now(run)
    if state is not None:
        write_summary(run, state)
    written = write_report(run) if state is None else write_batch_report(run, state)
    console.print(escape(str(written)), soft_wrap=True)


@guarded
def fetch(
    run_uri: Annotated[str, typer.Argument(metavar="RUN_URI", help="A run's place on an object store.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only this part, such as adapter (the last one) or merged; repeat it for several."),
    ] = None,
) -> None:
    """Copy a run, or parts of it, from an object store to a local directory; results come with their cards."""
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.io.runs.fetch import fetch
    from emloc_ray.io.store.places import below
    from emloc_ray.ui.cards import write_cards
    from emloc_ray.ui.publishing import part_folder
    from emloc_ray.ui.terminal import progress_bar

    with asking(run_uri):
        run = run_of(run_uri)
    notes: list[str] = []
    with progress_bar(console, "Fetching", in_bytes=True) as progress:
        files = fetch(run, directory, part or (), progress, part_folder, notes.append)
    is_batch = run.manifest().get("kind") == "batch"
    for copy in sorted((directory / "tasks").glob("*")) if is_batch else [directory]:
        result = RunDirectory(below(run.place, "tasks", copy.name)) if is_batch else run
        if is_begun(result):  # else it was removed there, or is no task's
            write_cards(result, copy)
    for sentence in (*notes, f"{len(files)} files written to {directory}"):
        console.print(escape(sentence), soft_wrap=True)


class ResultOption(str, Enum):
    """Which result of a run is handed on."""

    adapter = "adapter"
    merged = "merged"


Trusting = Annotated[bool, flag("--trust-remote-code", help="Run code that came with the run's model.")]
Chosen = Annotated[ResultOption, typer.Option("--part", help="The adapter for the original, or the merged model.")]


@guarded
def push(
    run_dir: RunPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The repository on the hub: OWNER/NAME.")],
    part: Chosen = ResultOption.adapter,
    private: Annotated[bool, flag("--private", help="Where it is made: for you alone.")] = False,
) -> None:
    """Upload a run's adapter or merged model, with its card, to the Hugging Face hub."""
    from emloc_ray.ui import publishing

    publishing.push(console, run_of(run_dir), name, part.value, private)


@guarded
def gguf(
    run_dir: RunPath,
    part: Chosen = ResultOption.merged,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="The file; left out: in the run's directory, or here."),
    ] = None,
    outtype: Annotated[
        str, typer.Option("--outtype", help="As llama.cpp's converter has it: f16, bf16, q8_0, …")
    ] = "bf16",
    trust_remote_code: Trusting = False,
) -> None:
    """Write a run's merged model or adapter as a GGUF file, by llama.cpp's converter."""
    from emloc_ray.ui import publishing

    publishing.export_gguf(console, run_of(run_dir), part.value, output, outtype, trust_remote_code)


@guarded
def chat(
    run_dir: RunPath,
    plain: Annotated[bool, flag("--plain", help="Prompts as they are, in no template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")] = 256,
    trust_remote_code: Trusting = False,
) -> None:
    """Ask the original and the fine-tuned model the same, side by side."""
    from emloc_ray.ui.chat import Pair, talk
    from emloc_ray.ui.publishing import MODEL, local_copy, result_name
    from emloc_ray.ui.terminal import quiet_libraries

    quiet_libraries()
    run = run_of(run_dir)
    with local_copy(console, run, result_name(run, "adapter"), MODEL) as root:
        with console.status("Loading the original and the adapter …"):
            pair = Pair.of(run, root, plain, max_new_tokens, trust_remote_code)
        talk(console, pair)
