"""Results as Markdown tables, and the README's tables made of the JSON in ``pipelines/results/``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.errors import ConfigError

_MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_NONE = "–"


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The published results, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def with_tables(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """A page whose every ``<!-- table: NAME -->`` … ``<!-- end of table -->`` holds that result's table.

    Raises:
        ConfigError: where it names a result that was not published.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in results:
            known = ", ".join(results) or "none"
            raise ConfigError(
                f"The page has a table {name}, and pipelines/results holds {known}: publish it, or take it out."
            )
        return f"{match[1]}{render(results[name])}\n{match[3]}"

    return _MARKED.sub(table, text)


def marked(text: str) -> set[str]:
    """The names of a page's tables."""
    return {match["name"] for match in _MARKED.finditer(text)}


def render(result: Mapping[str, Any]) -> str:
    """A result's table, by its ``kind``."""
    return _KINDS[result["kind"]](result)


def _ablation(result: Mapping[str, Any]) -> str:
    """A line for each row of an ablation: per cent of the gap closed, mean ± sample standard deviation over seeds in each
    data set, ± standard error over seeds of the mean over all data sets."""
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    keys, datasets = list(rows[0]["label"]), list(rows[0]["datasets"])
    against = next((row["against"]["label"] for row in rows if "against" in row), None)
    several = len(datasets) > 1
    counted = any(row.get("bits_per_weight", {}).get("mean") is not None for row in rows)  # older results have none
    header = [*map(_short, keys), *(["bits a weight"] if counted else [])]
    header += [*(f"{name}, %" for name in datasets), *(["all, %"] if several else [])]
    header += ["served small, %", *([_against(result)] if against else []), "training, GiB planned", "training, s"]
    lines = []
    for row in rows:
        cells = [_value(row["label"][key]) for key in keys]
        if counted:
            bits = row["bits_per_weight"]["mean"]
            cells.append(_NONE if bits is None else f"{bits:.2f}")
        cells += [_percent(row["datasets"][name]["gap_closed"], "sd") for name in datasets]
        cells += [_percent(row["all"]["gap_closed"], "sem")] if several else []
        cells.append(_percent(row["all"]["gap_closed_by_emulator"], None))
        cells += [_difference(row.get("against"))] if against else []
        memory, seconds = row["training_bytes"]["mean"], row["training_s"]
        cells += [_NONE if memory is None else f"{memory / 2**30:.2f}", _seconds(seconds["mean"], seconds["sd"])]
        lines.append(cells)
    return markdown(header, lines)


def _against(result: Mapping[str, Any]) -> str:
    compared = result["config"]["compare_with"]
    return "against " + ", ".join(
        _value(value) if key == "method" else f"{_short(key)} {_value(value)}" for key, value in compared.items()
    )


def _percent(summary: Mapping[str, Any], error: str | None) -> str:
    if error is None:
        return _NONE if summary["mean"] is None else f"{100 * summary['mean']:.1f}"
    text = _NONE if summary["mean"] is None else f"{100 * summary['mean']:.1f}"
    if summary[error] is not None:
        text += f" ± {100 * summary[error]:.1f}"
    whole = summary["n"] + summary["missing"]
    return text if not summary["missing"] else f"{text} ({summary['n']} of {whole})"


def _seconds(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return _NONE
    return f"{mean:.0f}" if sd is None else f"{mean:.0f} ± {sd:.0f}"


def _difference(summary: Mapping[str, Any] | None) -> str:
    if summary is None or summary["mean"] is None:
        return _NONE
    text = f"{100 * summary['mean']:+.1f}"
    if summary["sem"] is not None:
        text += f" ± {100 * summary['sem']:.1f}"
    return text if summary["p"] is None else f"{text} (p = {summary['p']:.2g})"


def _bare_emulators(result: Mapping[str, Any]) -> str:
    """Losses by ranks and factors, the least of each ratio in bold."""
    rows = result["rows"]
    ratios = list(rows[0]["losses"])
    least = {ratio: min(row["losses"][ratio] for row in rows) for ratio in ratios}
    lines = []
    for row in rows:
        losses = [(f"{row['losses'][ratio]:.3f}", row["losses"][ratio] == least[ratio]) for ratio in ratios]
        lines.append([row["ranks"], row["factors"], *(f"**{text}**" if best else text for text, best in losses)])
    return markdown(["ranks", "factors", *(f"ratio {ratio}" for ratio in ratios)], lines)


def _whole_run(result: Mapping[str, Any]) -> str:
    """A run against LoRA on the original."""
    lines = [
        [
            row["what"],
            f"{row['loss']:.3f}",
            f"{100 * row['gap_closed']:.1f} %",
            _NONE if row["exact_match"] is None else f"{100 * row['exact_match']:.0f} %",
        ]
        for row in result["rows"]
    ]
    return markdown(["", "held-out loss", "gap closed", "exact match"], lines)


def _peaks(result: Mapping[str, Any]) -> str:
    """Fine-tuning the emulator against inference of the original, by rows of a batch."""
    batches = list(result["rows"][0]["mib"])
    lines = [
        [row["model"], *(f"{ours:,.0f} of {baseline:,.0f} MiB" for ours, baseline in row["mib"].values())]
        for row in result["rows"]
    ]
    return markdown(["", *(f"{count} row{'s' if count != '1' else ''}" for count in batches)], lines)


def _within_inference(result: Mapping[str, Any]) -> str:
    """What each stage's largest worker held, with the budget and without, and its time."""
    inference = result["inference"]
    lines = [
        [
            row["stage"],
            *(f"{held:,.0f}" for held in (row["planned"], *row["measured"])),
            *(f"{seconds:,.0f}" for seconds in row["seconds"]),
        ]
        for row in result["rows"]
    ]
    lines.append(["inference", *(f"{inference[key]:,.0f}" for key in ("planned", "measured")), "", "", ""])
    return markdown(["", "planned, MiB", "held, MiB", "without budget, MiB", "s", "without budget, s"], lines)


def _methods(result: Mapping[str, Any]) -> str:
    """What each method takes, beside the share of the gap that it closes."""
    lines = [
        [
            row["method"].replace("_", " "),
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['gap_closed']:.1f}",
            _seconds(row["made_s"], None),
            f"{row['tokens_per_s']:.0f}",
            f"{row['held_mib']:,.0f}",
            f"{row['planned_mib']:,.0f}",
        ]
        for row in result["rows"]
    ]
    header = ["method", "bits a weight", "gap closed, %", "made, s", "tokens/s", "training, MiB", "planned, MiB"]
    return markdown(header, lines)


def _selection(result: Mapping[str, Any]) -> str:
    """Two tables: what rows tell of each correction, by labels and by predictions; and what choices on some rows gain."""
    lines, choices = [], []
    for row in result["rows"]:
        method = _value(row["method"])
        for correction in row["corrections"]:
            strength = "" if correction["strength"] == 1 else f" × {correction['strength']:g}"
            cells = [method, f"`{correction['method']}`{strength}"]
            for kind in ("labels", "predicted"):
                gain = correction[kind]
                cells += [f"{gain['gain']:+.2f}", f"{gain['error_at_64']:.2f}", f"{gain['rows_needed']:,.0f}"]
            lines.append([*cells, f"{correction['correlation']:.2f}"])
        for count in row["draws"]["labels"]:
            drawn = {kind: made[count] for kind, made in row["draws"].items()}
            cells = [method, count, f"{row['best']:.2f}", *(f"{made['gained']:+.2f}" for made in drawn.values())]
            choices.append([*cells, *(f"{100 * made['worse']:.0f} %" for made in drawn.values())])
    by = ("by labels", "by predictions")
    told = [f"{what}{kind}" for kind in by for what in ("gained ", "± at 64 rows, ", "rows to ± 0.15, ")]
    chosen = [f"{what}, {kind}" for what in ("gained", "worse than `none`") for kind in (*by, "by both")]
    return "\n\n".join(
        [
            markdown(["emulator", "correction", *told, "correlation"], lines),
            markdown(["emulator", "rows", "best", *chosen], choices),
        ]
    )


def _shapes(result: Mapping[str, Any]) -> str:
    """The plan for the paper's models in GB, the paper's own figures in parentheses."""

    def beside(ours: str, paper: float | None) -> str:
        return ours if paper is None else f"{ours} ({paper:g})"

    lines = []
    for name, row in result["models"].items():
        five = row.get("five_billion")
        tuned = f"{five['finetune']:.1f} at {five['ratio']:.2f}" if five else _NONE
        lora = beside(f"{row['lora_on_the_original']:.1f}", row["paper_lora"])
        lines.append(
            [name, f"{row['weights']:.1f}", f"{row['inference']:.1f}", lora, beside(tuned, row["paper_emloc"])]
        )
    return markdown(["", "weights", "inference", "LoRA on the original", "fine-tuning a 5B emulator, its ratio"], lines)


def _figures(result: Mapping[str, Any]) -> str:
    """Lines of the benchmark: ours beside the baseline that a line's unit names, how many times better, and by how much
    the result's error is larger."""
    lines = []
    for what, figure in (line for part in result["parts"].values() for line in part.items()):
        unit, _, baseline = figure["unit"].removesuffix(")").partition(" (baseline: ")
        error = _NONE if figure["error"] is None else f"{figure['error']:+.1e}"
        ours, theirs = (f"{_short_number(figure[side])} {unit}" for side in ("ours", "baseline"))
        lines.append([what, ours, f"{theirs}: {baseline}", f"{figure['ratio']:.2f} ×", error])
    with_errors = any(line[-1] != _NONE for line in lines)
    header = ["", "here", "beside it", "better", "added error"]
    return markdown(header if with_errors else header[:-1], [line if with_errors else line[:-1] for line in lines])


def _census(result: Mapping[str, Any]) -> str:
    """The types that work, in a line for each kind of model; a line for each that is refused or fails, with the reason; and
    those without a baseline."""
    rows: Mapping[str, Mapping[str, Any]] = result["rows"]
    lines = []
    for kind in ("causal-lm", "image-text"):
        names = [name for name, row in rows.items() if row["kind"] == kind and row["outcome"] == "works"]
        lines.append([f"{len(names)} {kind}", "works", ", ".join(names)])
    others = sorted((row["outcome"], name, row["why"]) for name, row in rows.items() if row["outcome"] != "works")
    for outcome in ("refused", "fails"):
        lines += [[name, outcome, why.replace("|", "/")] for found, name, why in others if found == outcome]
    if without := [name for found, name, _ in others if found == "no baseline"]:
        lines.append([f"{len(without)} others", "no baseline", ", ".join(without)])
    return markdown(["type", "outcome", "which, or why not"], lines)


_KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "ablation": _ablation,
    "bare_emulators": _bare_emulators,
    "whole_run": _whole_run,
    "peaks": _peaks,
    "within_inference": _within_inference,
    "methods": _methods,
    "selection": _selection,
    "shapes": _shapes,
    "figures": _figures,
    "census": _census,
}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(key: str) -> str:
    return {"emulator.compression_ratio": "ratio"}.get(key, key.rpartition(".")[2].replace("_", " "))


def _value(value: Any) -> str:
    return _NONE if value is None else str(value).replace("_", " ")
