"""What a console shows: progress bars on a terminal; tables and lines of plans and results."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from emloc_ray.config.keys import KeySection
from emloc_ray.config.steps import VARIANTS, served_variant
from emloc_ray.core.ranks import factor_parameters
from emloc_ray.text import NO_BREAK, counted, describe_choice, described_bits, duration, size

if TYPE_CHECKING:
    from emloc_ray.planning.alternatives import Choice
    from emloc_ray.planning.plan import Plan


_ON_ORIGINAL = "original + adapter "
_LABELS = {  # of the evaluated variants; others have their name
    "emulator_adapter": "emulator + adapter",
    "uncorrected": f"{_ON_ORIGINAL}as trained",
    "corrected": f"{_ON_ORIGINAL}corrected",
    "finished": f"{_ON_ORIGINAL}finished",
}


def quiet_libraries() -> None:
    """Keeps other libraries' warnings off the screen."""
    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def progress_bar(console: Console, what: str, in_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on a terminal; the callback takes how many units are done and how many there are, bytes or things."""
    count = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=32), count, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as bars:
        task = bars.add_task(what)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def keys_tables(sections: Sequence[KeySection]) -> Iterator[Table]:
    """A table for each section of a config."""
    for section in sections:
        title = f"\n{section.name}  [not bold dim]{escape(section.text)}[/]" if section.name else escape(section.text)
        table = Table(
            title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), expand=True
        )
        table.add_column("key", style="bold", no_wrap=True)
        for heading in ("default", "values", "meaning"):
            table.add_column(heading, overflow="fold")
        for key in section.keys:
            default = "[red]required[/]" if key.default is None else escape(key.default)
            table.add_row(key.name, default, escape(key.values), escape(key.text))
        yield table


def plan_tables(plan: Plan) -> list[Table]:
    """The plan as tables: the linears by kind, every stage's resources, the parts of its memory, and what else could be
    trained on."""
    tables = [_shape_table(plan), _stage_table(plan), _memory_table(plan)]
    on_gpu = any(stage.gpus_per_worker for stage in plan.stages if stage.name == "finetune")
    return tables if plan.choice is None else [*tables, _choice_table(plan.choice, on_gpu)]


def _shape_table(plan: Plan) -> Table:
    layout = plan.prepared.layout
    # 80 columns wide.
    table = Table(title="Linears inside the blocks", title_justify="left", caption_justify="left", pad_edge=False)
    for column in ("linears", "out × in", "count", "rank", "parameters", "kept", "share"):
        is_number = column in ("parameters", "kept")  # a number that is cut off is another one
        table.add_column(column, justify="left" if column == "linears" else "right", no_wrap=is_number)
    allocated, in_bits = set(layout.allocated), set(layout.quantized_linears)
    kinds = Counter(
        (
            s.name.rsplit(".", 1)[-1],
            s.out_features,
            s.in_features,
            layout.ranks.get(s.name),
            s.name in in_bits,
            s.name in allocated,
        )
        for s in layout.specs
    )
    for (kind, out_features, in_features, rank, is_in_bits, by_data), count in kinds.items():
        dense = out_features * in_features
        kept = factor_parameters(out_features, in_features, rank, layout.storage)
        known = (
            str(rank) if rank is not None else layout.quantization if is_in_bits else "dense",
            f"{count * dense:,}",
            f"{count * kept:,}",
            f"{kept / dense:.3f}",
        )
        size_of = ("by data", f"{count * dense:,}", "", "") if by_data else known
        table.add_row(kind, f"{out_features} × {in_features}", str(count), *size_of)
    table.add_section()
    targeted, kept = layout.parameters_targeted, layout.parameters_factorized
    whole = plan.emulator_parameters / plan.parameters
    if layout.budget is not None:
        table.add_row("targeted", "", str(len(layout.compressed)), "", f"{targeted:,}", "", "")
        table.caption = (
            f"By data: calibration decides ranks and bits; together they take {size(layout.budget)} at most,"
            f" {8 * layout.budget / targeted:.2f} bits a weight."
        )
        table.add_row("whole model", "", "", "", f"{plan.parameters:,}", "", "")
        return table
    table.add_row(
        "targeted", "", str(len(layout.compressed)), "", f"{targeted:,}", f"{kept:,}", f"{kept / targeted:.3f}"
    )
    if allocated:
        table.caption = f"By data: calibration decides these ranks; together they keep {kept:,} parameters at most."
    table.add_row("whole model", "", "", "", f"{plan.parameters:,}", f"{plan.emulator_parameters:,}", f"{whole:.3f}")
    return table


def _stage_table(plan: Plan) -> Table:
    from emloc_ray.planning.memory import total

    table = Table(title="Stages (predicted)", title_justify="left")
    for column in ("stage", "workers", "CPUs each", "GPUs each", "memory each", "disk", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages:
        table.add_row(
            stage.name,
            str(stage.num_workers),
            f"{stage.cpus_per_worker:g}",
            f"{stage.gpus_per_worker:g}",
            size(stage.worker_bytes),
            size(stage.disk_bytes),
            duration(stage.seconds),
        )
    table.add_section()
    table.add_row("together", "", "", "", "", size(plan.disk_bytes), duration(plan.seconds))
    table.add_row("inference of the original", "1", "", "", size(total(plan.inference)), "", "")
    return table


def plan_lines(plan: Plan, without_budget: Callable[[Plan], Plan]) -> list[str]:
    """What is said below a plan's tables: its steps, where weights come from, what to train on, or what the budget changed."""
    known = [f"Training: {plan.steps}.", gradients_line(plan), *step_lines(plan), scores_line(plan), disk_line(plan)]
    lines = [line for line in known if line is not None]
    if plan.choice is not None:
        return [*lines, plan.choice.sentence]
    bounded = plan.prepared.config.memory_budget is not None
    return lines + (budget_lines(plan, without_budget(plan)) if bounded else [])


def gradients_line(plan: Plan) -> str | None:
    """In how many passes sums of gradients are gathered, and how the original is held for them."""
    from emloc_ray.planning.memory import MemoryModel

    if not plan.prepared.layout.gradient_linears:
        return None
    sums = MemoryModel(plan.prepared).gradient_plan()
    return (
        f"Gradient sums: {counted(len(sums.waves), 'pass', 'passes')} over the rows, the model held"
        f" {sums.hold.replace('_', ' ')}, {counted(sums.batch_size, 'row')} a batch."
    )


def step_lines(plan: Plan) -> list[str]:
    """What an optimizer step of a stage costs where the original's blocks come over a GPU's link or from disk for it."""
    from emloc_ray.planning.memory import MemoryModel

    weights, speeds, lines = MemoryModel(plan.prepared).weights, plan.speeds, []
    for stage in plan.stages:
        speed = speeds.moving(stage.gpus_per_worker > 0, weights)
        if stage.step_bytes and speed < float("inf"):
            source = "from disk" if weights > speeds.host_bytes else "over the GPU's link"
            lines.append(
                f"A step of {stage.name} takes {duration(stage.step_seconds)}: {size(stage.step_bytes)} of the original's weights"
                f" come {source} at {speed / 1e6:,.0f} MB/s."
            )
    return lines


def scores_line(plan: Plan) -> str | None:
    """What scoring the original while the adapter is trained costs."""
    from emloc_ray.planning.memory import MemoryModel
    from emloc_ray.planning.work import num_scores

    scores, of_original = num_scores(plan.prepared)
    if not of_original:
        return None
    stage = next(stage for stage in plan.stages if stage.name == "finetune")
    hold = MemoryModel(plan.prepared).validation_plan().hold.replace("_", " ")
    return (
        f"While training the emulator is scored {counted(scores, 'time')}, the original {of_original}, held {hold} beside it:"
        f" {duration(stage.scoring_seconds)} in all."
    )


def disk_line(plan: Plan) -> str | None:
    """At what speed weights come that this machine's memory does not hold."""
    from emloc_ray.planning.memory import MemoryModel

    weights, speeds = MemoryModel(plan.prepared).weights, plan.speeds
    if weights <= speeds.host_bytes:
        return None
    how = "measured" if speeds.disk_measured else "assumed"
    return (
        f"The original's {size(weights)} do not fit the {size(speeds.host_bytes)} of memory that are free here: they come from"
        f" disk at {speeds.disk / 1e6:,.0f} MB/s ({how}), {duration(weights / speeds.disk)} a pass."
    )


def budget_lines(plan: Plan, free: Plan) -> list[str]:
    """What the budget changed, which stages exceed it, and memory and time of the same run without it."""
    from emloc_ray.runs.remarks import over_budget, smaller_batches

    peaks = [max(stage.worker_bytes for stage in one.stages) for one in (plan, free)]
    lines = [smaller_batches(plan.prepared), over_budget(plan.prepared.config, plan.worker_bytes)]
    if peaks[0] != peaks[1]:
        times = [duration(one.seconds) for one in (free, plan)]
        takes = f"about {times[0]} instead of {times[1]}" if times[0] != times[1] else "as long"
        lines.append(
            f"With memory_budget: null a worker would hold up to {size(peaks[1])} instead of {size(peaks[0])}, and the run take"
            f" {takes}."
        )
    return [line for line in lines if line is not None]


def _memory_table(plan: Plan) -> Table:
    from emloc_ray.planning.memory import total

    table = Table(
        title=f"Memory of one worker (predicted), calibration {plan.calibration_hold.replace('_', ' ')}",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("together", justify="right", no_wrap=True)
    table.add_column("made of")
    named = {stage.name: stage.memory for stage in plan.stages} | {"inference of the original": plan.inference}
    for name, memory in named.items():
        parts = sorted(memory.items(), key=lambda item: -item[1])
        made_of = (f"{part} {size(held)}".replace(" ", NO_BREAK) for part, held in parts)
        table.add_row(name, size(total(memory)), ", ".join(made_of))
    return table


def _choice_table(choice: Choice, on_gpu: bool) -> Table:
    table = Table(
        title=f"What fine-tunes within {size(choice.budget)} a worker (predicted)",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("trained on", "ratio", "rows", "memory each", "a step", "gap closed"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    for one in choice.alternatives:
        name = f"[bold]{one.name}[/]" if one is choice.recommended else one.name
        if one.unneeded:
            table.add_row(name, "", "", "not needed", "", "")
            continue
        finetune, measured = one.config.finetune, one.measured
        rows = f"{finetune.gradient_accumulation_steps} × {finetune.per_device_train_batch_size}"
        closed = "not measured" if measured is None else f"{100 * measured.gap_closed:.0f} %{measured.where}"
        needed = size(one.needed) if one.fits else f"{size(one.needed)}: too much"
        table.add_row(
            name,
            "" if one.config.emulator.budget else f"{one.config.emulator.compression_ratio:g}",
            rows,
            needed,
            duration(one.step_seconds) if one.fits else "",
            closed,
        )
    how = "measured" if choice.speeds.measured else "assumed"
    speeds = f"{choice.speeds.gpu_flops / 1e12:.0f} TFLOPS and the {choice.speeds.link / 1e9:.0f} GB/s of its link are {how}."
    timed = f"A GPU's {speeds}" if on_gpu else "A step is timed by this machine's CPU."
    table.caption = f"Gap closed: of SmolLM2-135M, on one task or three (pipelines/README.md). {timed}"
    return table


def evaluation_table(metrics: dict[str, Any]) -> Table:
    """The variants' losses on the held-out rows, and their gains."""
    evaluation = metrics["evaluation"]
    tokens = evaluation["original"]["num_tokens"]
    table = Table(title=f"Held-out data, {tokens:,} predicted tokens", title_justify="left")
    for column in ("model", "loss (nats/token)", "gain", "token accuracy"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column != "model")
    for row in evaluation_rows(evaluation):
        table.add_row(row["label"], f"{row['loss']:.4f}", f"{row['gain'] or 0:+.4f}", f"{row['token_accuracy']:.3f}")
    return table


def evaluation_rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """The variants that were evaluated, in order, each with its label, its measures and its gain over the original. Variants
    that follow each other with the same measures, to the digits that are shown, are one row."""
    original = evaluation.get("original", {}).get("loss")
    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        measured, label = evaluation.get(variant), _LABELS.get(variant, variant)
        if measured is None:
            continue
        if rows and _as_shown(rows[-1]) == _as_shown(measured):
            rows[-1]["label"] += f" = {label.removeprefix(_ON_ORIGINAL)}"
            rows[-1]["variants"].append(variant)
            continue
        gain = None if original is None or variant == "original" else original - measured["loss"]
        rows.append({"label": label, "variants": [variant], "gain": gain, **measured})
    return rows


def _as_shown(measured: dict[str, Any]) -> str:
    return f"{measured['loss']:.4f} {measured['token_accuracy']:.3f}"


def describe_matches(exact: Mapping[str, Any]) -> str:
    """The shares of exact matches in words: ``12.5% before, 50.0% after``."""
    return f"{exact['original']:.1%} before, {exact[served_variant(exact)]:.1%} after"


_DEFAULTS = {"allocation": "uniform", "objective": "activations", "storage": "factors"}
_RESULTS = {
    "adapter": "adapter/ (PEFT)",
    "adapter_finished": "adapter_finished/ (PEFT)",
    "merged": "merged/ (transformers)",
}
_BEFORE_RESULTS = {
    "adapter_emulator": "adapter_emulator/ (as trained)",
    "emulator": "emulator/",
    "calibration": "calibration/",
}


def _artifacts(metrics: dict[str, Any]) -> list[str]:
    """The artifacts to use: the adapter and the merged model, or the newest one before them."""
    held = metrics["disk_bytes"]
    results = [text for name, text in _RESULTS.items() if name in held]
    if results and "evaluate" in metrics["stages"] and "merged" not in held:
        results.append("no merged/: the adapter changes no weight")
    return results or [text for name, text in _BEFORE_RESULTS.items() if name in held][:1]


def result_lines(
    metrics: dict[str, Any], run_dir: str, pages: Sequence[str] = ("report.html", "trace.json")
) -> list[str]:
    """The run's outcome in a few lines, below the table: what changed, how to load it, what it cost, how it was made.
    ``pages``: those that lie beside its artifacts."""
    lines = []
    if gap := metrics.get("gap_closed"):
        lines.append(
            f"Gap closed: {gap.get('finished', gap['corrected']):.1%} of the way to LoRA on the original"
            f" (loss {gap['upper_bound_loss']:.4f}, {gap['upper_bound']})"
        )
    if exact := metrics.get("exact_match"):
        lines.append(f"Exact match: {describe_matches(exact)} (greedy, {counted(exact['num_prompts'], 'prompt')})")
    opens = metrics.get("auto_class", "AutoModelForCausalLM")
    if "merged" in metrics["disk_bytes"]:
        lines.append(f'Load it: transformers.{opens}.from_pretrained("{run_dir}/merged")')
    stages = metrics["stages"]
    peak = max(stage["peak_pss_bytes"] for stage in stages.values())
    wall = sum(stage["wall_s"] for stage in stages.values())
    disk = sum(metrics["disk_bytes"].values())
    num_taken = sum("taken_from" in stage for stage in stages.values())
    shared = f" and {counted(num_taken, 'stage')} from the cache" if num_taken else ""
    lines.append(f"Cost: {duration(wall)}{shared}, peak memory of all processes {size(peak)}, disk {size(disk)}")
    if "correction" in metrics:
        choice = metrics["correction"]
        as_trained = choice.get("as_trained")
        lines.append(f"Correction: {f'none. {as_trained}' if as_trained else describe_choice(choice)}")
    if emulator := metrics.get("emulator"):
        share = emulator["parameters"] / emulator["original_parameters"]
        lines.append(
            f"Emulator: {emulator['parameters']:,} of {emulator['original_parameters']:,} parameters ({share:.0%});"
            f" {emulator['parameters_kept']:.3f} of the targeted linears"
            + (
                f"; in {bits}, {size(emulator['bytes'])}"
                if (bits := described_bits(emulator.get("quantization", "none")))
                else ""
            )
        )
        if forms := emulator.get("forms"):
            taken = ", ".join(f"{count} × {kind}" for kind, count in forms.items())
            lines.append(
                f"Its linears: {taken}; {emulator['bits_per_weight']:.2f} bits a weight"
                f" (budget {emulator['budget']}), {size(emulator['bytes'])} in all"
            )
        chosen = [f"{key} {emulator[key]}" for key, value in _DEFAULTS.items() if emulator.get(key, value) != value]
        lines += [f"Its ranks and factors: {', '.join(chosen)}"] if chosen else []
    lines.append(f"Artifacts in {run_dir}: {', '.join([*_artifacts(metrics), *pages])}")
    return lines
