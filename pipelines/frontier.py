"""The frontier as a picture: the share of LoRA's gap that methods close against the bits that a weight of their model takes.

    python pipelines/frontier.py          # pipelines/frontier.svg, of pipelines/results/frontier*.json

A model each has a panel. Methods of one kind are joined by a line. The results are of docstrings, and come of
``configs/ablations/frontier.yaml``, of ``equal_bytes.yaml`` and ``rivals.yaml``, whose methods have more seeds, and of
``refined_budgets.yaml`` and ``refined_more_bits.yaml``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
PICTURE = HERE / "frontier.svg"
# And the names of their results.
MODELS = {
    "SmolLM2 135M": ("frontier", "equal_bytes", "rivals", "refined_budgets", "refined_more_bits"),
    "Gemma 3 270M": ("frontier_gemma", "rivals_gemma", "refined_budgets_gemma"),
}
DATASET = "summaries"
# What joins a kind's methods, and whether the kind is ours.
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "one budget over ranks and bits": (("budget_1.1", "budget_2.4", "budget_4.15"), True),
    "one budget, refined": (("budget_1.1_refined", "budget_2.4_refined"), True),
    "one budget, healed": (("budget_1.1_healed",), True),
    "low rank in NF4": (("quarter_nf4", "factors_nf4"), True),
    "low rank": (("quarter", "factors"), True),
    "low rank, refined": (("factors_refined",), True),
    "2 bits and rank 8": (("int2_rank8",), True),
    "2, 3, 4 and 8 bits (GPTQ)": (("int2", "int3", "int4", "int8"), True),
    "half and a quarter left by pruning, in NF4": (("pruned_quarter_nf4", "pruned_half_nf4"), False),
    "half left by pruning, aligned, in NF4": (("pruned_half_nf4_aligned",), False),
    "the paper's emulator in NF4": (("emloc_quarter_nf4", "emloc_nf4"), False),
    "2 and 3 bits, CLoQ's start": (("int2_cloq", "int3_cloq"), False),
    "NF4, LoftQ's start": (("nf4_loftq",), False),
    "NF4 (QLoRA)": (("nf4",), False),
    "LoRA on the original": (("lora",), False),
}

Point = tuple[float, float]


def points(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Of each kind the bits a weight and the per cent of the gap closed, means over data sets and seeds, fewest bits first.

    Raises:
        ValueError: a method belongs to no kind.
    """
    unknown = {record["method"] for record in records} - {name for names, _ in KINDS.values() for name in names}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no kind of pipelines/frontier.py has it: add it to KINDS.")
    lines: dict[str, list[Point]] = {}
    for kind, (names, _) in KINDS.items():
        of_methods = [[record for record in records if record["method"] == name] for name in names]
        lines[kind] = sorted(
            (mean(r["bits_per_weight"] for r in own), 100 * mean(r["gap_closed"] for r in own))
            for own in of_methods
            if own
        )
    return {kind: line for kind, line in lines.items() if line}


def draw(models: Mapping[str, Mapping[str, Sequence[Point]]], path: Path) -> None:
    """Writes the picture as SVG: of each model the lines of its kinds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"  # the same bytes from the same figures
    from matplotlib import pyplot

    size = (6 * len(models), 6)
    figure, panels = pyplot.subplots(1, len(models), figsize=size, sharey=True, squeeze=False, layout="constrained")
    colours = {kind: matplotlib.colormaps["tab20"](number) for number, kind in enumerate(KINDS)}
    for axes, (model, lines) in zip(panels[0], models.items(), strict=True):
        for kind, line in lines.items():
            ours = KINDS[kind][1]
            bits, closed = zip(*line, strict=True)
            style = {"marker": "o" if ours else "s", "linestyle": "-" if ours else "--"}
            axes.plot(bits, closed, color=colours[kind], label=kind, **style)
        axes.set_title(model)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set_xlabel("bits a weight of the model that is trained on")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("gap closed, % (LoRA on the original = 100)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(path, metadata={"Date": None, "Description": figures(models)})
    pyplot.close(figure)


def figures(models: Mapping[str, Mapping[str, Sequence[Point]]]) -> str:
    """A hash of what is drawn, which the picture carries: a test holds it against the results."""
    rounded = {
        model: {kind: [(round(bits, 3), round(closed, 3)) for bits, closed in line] for kind, line in lines.items()}
        for model, lines in models.items()
    }
    return hashlib.sha256(json.dumps(rounded).encode()).hexdigest()


def published() -> dict[str, dict[str, list[Point]]]:
    """What the published results say, by model."""
    return {model: points(records(names)) for model, names in MODELS.items()}


def records(names: Sequence[str]) -> list[Any]:
    """The cells of published results on docstrings, each once."""
    cells = [cell for name in names for cell in json.loads((HERE / "results" / f"{name}.json").read_text())["records"]]
    return [*{(cell["method"], cell["seed"]): cell for cell in cells if cell["dataset"] == DATASET}.values()]


if __name__ == "__main__":
    draw(published(), PICTURE)
