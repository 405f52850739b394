"""The frontier as a picture: the share of LoRA's gap that methods close against the bits that a weight of their model takes.

    python pipelines/frontier.py          # pipelines/frontier.svg, of pipelines/results/frontier.json

Methods of one kind are joined by a line. ``results/frontier.json`` comes of ``configs/ablations/frontier.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
RESULT, PICTURE = HERE / "results" / "frontier.json", HERE / "frontier.svg"
# What joins a kind's methods, and whether the kind is ours.
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "one budget over ranks and bits": (("budget_1.1", "budget_2.4"), True),
    "low rank in NF4": (("quarter_nf4", "factors_nf4"), True),
    "low rank": (("quarter", "factors"), True),
    "low rank, refined": (("factors_refined",), True),
    "2 bits and rank 8": (("int2_rank8",), True),
    "2, 3, 4 and 8 bits (GPTQ)": (("int2", "int3", "int4", "int8"), True),
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


def draw(lines: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Writes the picture as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"  # the same bytes from the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind, line in lines.items():
        ours = KINDS[kind][1]
        bits, closed = zip(*line, strict=True)
        axes.plot(bits, closed, marker="o" if ours else "s", linestyle="-" if ours else "--", label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("bits a weight of the model that is trained on")
    axes.set_ylabel("gap closed, % (LoRA on the original = 100)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(points(json.loads(RESULT.read_text())["records"]), PICTURE)
