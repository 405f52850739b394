"""The command line's verbs for a config before its run: ``validate``, ``preview``, ``init`` and ``schema``."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from emloc_ray.errors import ConfigError
from emloc_ray.text import counted, duration, listed, size
from emloc_ray.ui.batch_verbs import batch
from emloc_ray.ui.shell import Overrides, console, guarded

if TYPE_CHECKING:
    from emloc_ray.planning.alternatives import Choice
    from emloc_ray.planning.first_rows import FirstRows
    from emloc_ray.planning.plan import Plan
    from emloc_ray.planning.prepared import Prepared

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]


def prepare_config(path: Path, overrides: list[str] | None, console: Console = console) -> Prepared:
    """A config that is checked against its model and data, its batches as small as its budget asks for."""
    from emloc_ray.config.reading import load_config

    config = load_config(path, overrides or ())
    with console.status("Checking the config, the model and the data …"):
        from emloc_ray.planning.batches import shrink_batches
        from emloc_ray.planning.prepared import prepare
        from emloc_ray.ui.terminal import quiet_libraries

        quiet_libraries()
        return shrink_batches(prepare(config))


@guarded
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check the config, the model and the data's first rows as tokens: list every error and remark, start nothing."""
    from emloc_ray.config.reading import is_batch, load_config, read_mapping

    if config.is_file() and is_batch(
        read_mapping(config, f"Config {config}", "it needs at least run_dir, model and data")
    ):
        batch(config, overrides, dry_run=True)
        return
    try:
        load_config(config, overrides or ())
    except ConfigError as error:
        later = "\nThe model and the data are checked once this is fixed." if config.is_file() else ""
        raise ConfigError(f"{error}{later}") from error
    for line in validation_lines(prepare_config(config, overrides), str(config)):
        console.print(escape(line), soft_wrap=True)


def validation_lines(prepared: Prepared, name: str) -> Iterator[str]:
    """What a config was seen to mean: the whole in one line, then its rows, then every remark that the run would make. Raises
    ConfigError where the first rows cannot be tokenized, or the model cannot be held."""
    from emloc_ray.planning.budget import check_holding
    from emloc_ray.planning.first_rows import first_rows
    from emloc_ray.planning.plan import check_stages, make_plan
    from emloc_ray.planning.prepared import splits_of
    from emloc_ray.runs.remarks import of_settings, said_once
    from emloc_ray.stages.order import STEPS

    check_holding(prepared)
    splits = splits_of(prepared.config)
    rows = [first for split in splits if (first := first_rows(prepared, split)) is not None]
    plan = make_plan(STEPS, prepared)
    check_stages(plan)
    yield f"{name} is valid: {_linears(prepared)}; {_training(prepared, plan)}."
    for first in rows:
        yield f"{_of_rows(first)}{_read_of(prepared, first)}."
    yield from filter(None, (first.no_end for first in rows if first.split == "train"))
    yield from _unchecked(prepared, splits)
    yield from of_settings(prepared, plan.worker_bytes)
    cpus = 0 if prepared.config.ray.joins else os.cpu_count() or 1  # of a Ray that is joined none are known yet
    yield from said_once([prepared.config], cpus)


def _unchecked(prepared: Prepared, splits: Iterable[str]) -> Iterator[str]:
    """What only the run sees, with why."""
    source, data = prepared.source, prepared.config.data
    if source.hub_id is not None:
        yield f"Not checked: the weights of {source.hub_id}, which the run downloads."
    if source.gguf_file is not None:
        yield f"Not checked: the weights in {source.gguf_file}, which the run converts."
    named = [getattr(data, split) for split in splits]
    if places := [place for split in named if split is not None for place in split.hub]:
        yield f"Not checked: all but the first rows of {listed(places)}, which the run downloads."
    if data.generate is not None:
        yield f"Not checked: all but the first rows of data.generate {data.generate}, which the run makes."


def _linears(prepared: Prepared) -> str:
    layout = prepared.layout
    quantized = f" {len(layout.quantized_linears)} in {layout.quantization}," if layout.quantization != "none" else ""
    compressed = layout.ranks if layout.budget is None else layout.compressed
    return f"{len(compressed)} of {len(layout.specs)} linears compressed,{quantized} {len(layout.adapted)} adapted"


def _training(prepared: Prepared, plan: Plan) -> str:
    from emloc_ray.planning.memory import MemoryModel
    from emloc_ray.planning.work import rows_a_step

    batch = rows_a_step(prepared.config.finetune)
    peak = max(held for stage, held in plan.worker_bytes.items() if stage != "inference")
    tokens = batch * prepared.lengths.mean
    return (
        f"{plan.steps}; training reads {counted(batch, 'row')} (about {tokens:,.0f} tokens) a step;"
        f" {MemoryModel(prepared).adapter_parameters:,} trainable parameters, peak {size(peak)} a worker,"
        f" about {duration(plan.seconds)}"
    )


def _of_rows(first: FirstRows) -> str:
    whole = "" if first.num_rows is None else f"{counted(first.num_rows, 'row')} of "
    text = f"data.{first.split}: {whole}format {listed(first.formats)}, about {first.mean_tokens:.0f} tokens each"
    seen = f"of the first {len(first.rows)} rows"
    bad = sum(row is None for _, row in first.rows)
    several = len(first.sequences) - (len(first.rows) - bad)
    counts = [
        f"{first.num_cut} longer than data.max_seq_length {first.limit}" if first.num_cut else "",
        f"{first.num_emptied} left without a token to learn" if first.num_emptied else "",
        f"{bad} bad and skipped" if bad else "",
        f"{several} sequences more, as the chat template rewrites earlier turns" if several > 0 else "",
    ]
    said = ", ".join(filter(None, counts))
    return f"{text}; {seen} {said}" if said else text


_READERS = {"train": "training", "eval": "evaluation"}  # of the splits that are not called by what reads them


def _read_of(prepared: Prepared, first: FirstRows) -> str:
    """How many of a split's rows are read, and for what others are held out; nothing where that is all of them."""
    if first.num_rows is None:
        return ""
    rows, held_out = prepared.num_rows(first.split), prepared.rows_held_out if first.split == "train" else {}
    tokens = prepared.config.calibration.num_calibration_tokens if first.split == "calibration" else None
    counts = [f"{rows:,}" if rows < first.num_rows else "", f"at most {tokens:,} tokens" if tokens else ""]
    said = ", ".join(filter(None, counts))
    others = ", ".join(f"{count:,} for {split}" for split, count in held_out.items())
    reads = f"; {_READERS.get(first.split, first.split)} reads {said}" if said else ""
    return f"{reads} and holds out {others}" if others else reads


@guarded
def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    split: Annotated[
        str, typer.Option("--split", help="train, eval, selection, calibration, healing or validation.")
    ] = "train",
    rows: Annotated[int, typer.Option("--rows", min=1, max=64, help="How many rows.")] = 1,
) -> None:
    """Show the first rows as tokens, those that are learnt marked."""
    from transformers import AutoTokenizer

    from emloc_ray.data.splits import SPLITS
    from emloc_ray.modeling.loading import tokenizer_dir
    from emloc_ray.planning.first_rows import first_rows, marked

    splits = (*SPLITS, "healing", "validation")
    if split not in splits:
        raise ConfigError(f"--split {split} is no split: give one of {', '.join(splits)}.")
    prepared = prepare_config(config, overrides)
    first = first_rows(prepared, split, rows)
    if first is None:
        raise ConfigError(
            f"data.{split} has no rows to show before the run: name a split that has a path, with --split."
        )
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_dir(prepared.source), trust_remote_code=prepared.config.model.trust_remote_code
    )
    everything = prepared.config.finetune.loss_on == "all"
    for place, row in first.rows:
        for tokens in row or ():
            kept = replace(
                tokens,
                input_ids=tokens.input_ids[: first.limit],
                completion_mask=[everything or learnt for learnt in tokens.completion_mask[: first.limit]],
            )
            cut = f", cut to {first.limit}" if len(tokens) > first.limit else ""
            learnt = sum(kept.completion_mask)
            text = Text(f"{place} ({listed(first.formats)}): {len(tokens)} tokens{cut}, {learnt} learnt ⟦so⟧\n", "bold")
            for is_learnt, run in marked(kept, tokenizer):
                shown = "·".join(run)
                text.append(f"⟦{shown}⟧" if is_learnt else shown, "green" if is_learnt else "dim")
            console.print(text, soft_wrap=True)
        if row is None:
            console.print(Text(f"{place}: bad, and skipped", "red"), soft_wrap=True)
    if first.no_end:
        console.print(Text(first.no_end), soft_wrap=True)


@guarded
def schema() -> None:
    """Print the JSON Schema of a config, for editors."""
    from emloc_ray.config.emulator import DECIDED
    from emloc_ray.config.keys import BASE
    from emloc_ray.config.schema import RunConfig

    schema = RunConfig.model_json_schema()
    schema["properties"]["base"] = {"type": "string", "description": BASE.text}
    schema["properties"]["model"] = {"anyOf": [schema["properties"]["model"], {"type": "string"}]}
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)  # a base may hold them
    split = schema["$defs"]["SplitConfig"]
    schema["$defs"]["SplitConfig"] = {
        "anyOf": [split, {"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    }
    emulator = schema["$defs"]["EmulatorConfig"]["properties"]
    for keys, value in ((DECIDED, None), (("healing", "refinement"), False)):
        for key in keys:
            emulator[key] = {"anyOf": [emulator[key], {"const": value}]}
    typer.echo(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2))


@guarded
def init(
    model: Annotated[str | None, typer.Option("--model", help="A hub id, a directory or a .gguf file.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The rows to train on: a file, a glob, hf:DATASET.")
    ] = None,
    memory_budget: Annotated[str | None, typer.Option("--memory-budget", help="Of one worker, such as 24GiB.")] = None,
    output: Annotated[Path, typer.Option("--output", help="The config to write.")] = Path("emloc.yaml"),
) -> None:
    """Write a config for a model and data, with what the plan recommends; asks for what is missing."""
    from emloc_ray.config.reading import parse_config, put, read_override
    from emloc_ray.planning.plan import within_budget
    from emloc_ray.planning.prepared import prepare
    from emloc_ray.runs.remarks import max_positions
    from emloc_ray.stages.order import STEPS

    model = _asked("--model", model, "a hub id, a directory or a .gguf file")
    data = _asked("--data", data, "a file, a glob or hf:DATASET")
    if output.exists():
        raise ConfigError(f"{output} is there already: remove it, or name another with --output.")
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(
            f"{output} cannot be written: --output needs a directory that is there and can be written to."
        )
    values: dict[str, Any] = {
        "run_dir": f"runs/{output.stem}",
        "model": {"source": model},
        "data": {"train": {"path": data}},
    }
    if memory_budget is not None:
        values["memory_budget"] = memory_budget
    with console.status("Checking the model and the data …"):
        prepared = prepare(parse_config(values))
        if (positions := max_positions(prepared)) and positions < prepared.config.data.max_seq_length:
            values["data"]["max_seq_length"] = positions
            prepared = prepare(parse_config(values))
        try:
            choice = within_budget(prepared, STEPS)
        except ConfigError:
            if memory_budget is not None:
                raise
            choice = None
    for override in choice.overrides if choice else ():
        key, value = read_override(override)
        if key != ("memory_budget",) or memory_budget is not None:  # left out it gives way where a stage needs more
            put(values, key, value, override)
    output.write_text(_commented(values, output, prepared), "utf-8")
    written = f"{output} is written: emloc-ray validate {shlex.quote(str(output))} checks it."
    console.print(f"{written} {_chosen(choice, memory_budget)}", soft_wrap=True, markup=False)


def _chosen(choice: Choice | None, memory_budget: str | None) -> str:
    """What a new config trains on, and the budget that this was chosen by."""
    if choice is None:
        return (
            "Nothing trains within what inference of the original takes, so it has half of the ranks: --memory-budget SIZE"
            " chooses by what a worker has."
        )
    own = (
        ""
        if memory_budget
        else " That is what inference of the original takes: --memory-budget SIZE chooses by another."
    )
    return choice.sentence + own


def _asked(option: str, given: str | None, what: str) -> str:
    if given is not None:
        return given
    if not console.is_terminal:
        raise ConfigError(f"{option} is missing: give it: emloc-ray asks only on a terminal.")
    return str(typer.prompt(f"{option.removeprefix('--')} ({what})"))


_COMMENTS = {
    "run_dir": "where everything goes",
    "memory_budget": "what one worker may hold",
    "model": "the original: a hub id, a directory or a .gguf file",
    "data": "the task's rows; emloc-ray preview shows them as tokens",
    "emulator": "the compressed model that is trained on",
    "finetune": "any of transformers' TrainingArguments goes here too",
}


def _commented(values: dict[str, Any], path: Path, prepared: Prepared) -> str:
    from emloc_ray.io.formats.yaml_text import write_yaml

    defaults, emulator = prepared.config, values.get("emulator", {})
    ratio = {} if emulator.get("budget") else {"compression_ratio": defaults.emulator.compression_ratio}
    values = {
        **values,
        "data": {**values["data"], "max_seq_length": defaults.data.max_seq_length},
        "adapter": {"r": defaults.adapter.r, "lora_alpha": defaults.adapter.lora_alpha},
        "emulator": {**ratio, **emulator},
        "finetune": {
            "num_train_epochs": defaults.finetune.num_train_epochs,
            "learning_rate": defaults.finetune.learning_rate,
            **values.get("finetune", {}),
        },
    }
    lines = [f"# emloc-ray run {path}", "# Every key: emloc-ray keys", ""]
    for key, value in values.items():
        if key in _COMMENTS:
            lines.append(f"# {_COMMENTS[key]}")
        lines.append(write_yaml({key: value}).rstrip())
    return "\n".join(lines) + "\n"
