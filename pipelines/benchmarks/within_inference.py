"""A run of all stages by its default budget: what each stage's workers held, against inference of the original."""

from __future__ import annotations

from pathlib import Path

import emloc_ray
from benchmarks.figures import LOW_RANK, Figures, figure, write_result
from benchmarks.memory import probe

MIB = 2**20


def within(out: Path) -> Figures:
    """Each stage's largest worker and its plan, above what imports take, against a process that runs inference of a row.

    Also the seconds of each stage, and those of the same run with ``memory_budget: null``.
    """
    bounded, free = (
        emloc_ray.load_config(LOW_RANK, [f"run_dir={out / name}", *budget]) for name, budget in _RUNS.items()
    )
    runs = [emloc_ray.run(config, fresh=True) for config in (bounded, free)]
    inference = probe("inference", Path(bounded.run_dir, "model"), 1, bounded.data.max_seq_length)["peak"] / MIB
    imports = runs[0]["planned_imports_bytes"]
    planned = {name: (held - imports) / MIB for name, held in runs[0]["planned_memory"].items()}
    rows, figures = [], {}
    for stage in (name for name in planned if name != "inference"):
        peaks = [run["stages"][stage].get("peak_above_imports_bytes", MIB) / MIB for run in runs]
        seconds = [run["stages"][stage]["wall_s"] for run in runs]
        rows.append({"stage": stage, "measured": peaks, "planned": planned[stage], "seconds": seconds})
        figures[f"{stage} within inference, peak"] = figure(
            peaks[0], inference, "MiB (baseline: inference of the original)"
        )
    write_result(
        out / "within.json",
        "within_inference",
        "within",
        inference={"measured": inference, "planned": planned["inference"]},
        rows=rows,
    )
    return figures


_RUNS = {"within-default": (), "within-null": ("memory_budget=null",)}
