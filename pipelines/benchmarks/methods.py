"""What each method of the frontier takes, nothing beside it: the making of its emulator, and training on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import frontier
from ablations import runs
from ablations.cell_figures import Cells
from ablations.cells import Ablation, Cell, read_ablation

import emloc_ray
from benchmarks.figures import THREADS, Figures, figure, write_result
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import StageError

MIB = 2**20
GRIDS = Path(__file__).parents[2] / "configs" / "ablations"
# By grid. The first is what the others are compared with.
METHODS: dict[str, tuple[str, ...]] = {
    "frontier.yaml": (
        "lora", "int8", "nf4", "int4", "int3", "int2", "int2_rank8", "budget_4.15", "budget_2.4", "budget_1.1", "factors",
        "factors_refined", "factors_nf4", "quarter_nf4",
    ),
    "refined_budgets.yaml": ("lora", "budget_1.1_refined"),
    "rivals.yaml": ("lora", "emloc_nf4", "pruned_half_nf4"),
}  # fmt: skip
_MAKE = ("calibrate", "gradients", "allocate", "factorize", "refine")
SETTINGS = (
    "compare_with={}",
    "datasets=[summaries]",
    "seeds=[0]",
    "finetune.bf16=true",
    "finetune.gradient_checkpointing=true",
    "finetune.max_steps=12",
    "memory_budget=inference",
    *(f"{stage}.cpus_per_worker={THREADS}" for stage in ("calibration", "emulator", "finetune")),
)


def methods(out: Path) -> Figures:
    """On Ray, nothing taken from a cache: the seconds of all stages that make an emulator, and of a training on it of 12 steps of
    4 rows the tokens a second and the worker's peak above its imports, with the weights, which are mapped, beside the plan.

    The share of the gap is that of the published grids, with all their seeds and steps.
    """
    closed = _gap_closed()
    rows = [
        {"method": method, **measured, "gap_closed": closed[method]}
        for grid, names in METHODS.items()
        for method, measured in _of_grid(out, grid, names)
    ]
    write_result(out / "methods.json", "methods", "methods", rows=rows)
    lora = rows[0]
    return {
        f"peak of training, {row['method']}": figure(
            row["held_mib"], lora["held_mib"], "MiB (baseline: LoRA on the original)"
        )
        for row in rows[1:]
    }


def _of_grid(out: Path, grid: str, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A grid's methods with what was measured; of a method in several grids only where it comes first."""
    root = out / "methods" / grid.removesuffix(".yaml")
    given = [f"run_dir={root}", f"shared={root.parent / 'shared'}", f"methods=[{','.join(names)}]", *SETTINGS]
    ablation = read_ablation(GRIDS / grid, given)
    cells = runs.make_data(ablation, print)
    ablation = runs.unrounded(ablation, print)
    for cell in ablation.cells:
        is_new = cell.method != "lora" or grid == next(iter(METHODS))
        if is_new:
            print(cell.method, flush=True)
            yield cell.method, _measured(ablation, cells, cell)


def _measured(ablation: Ablation, cells: Cells, cell: Cell) -> dict[str, Any]:
    failed: dict[str, str] = {}
    pruned = dict(runs.pruned_models(ablation, cells, [cell] if cell.prune else [], failed, print)).get(cell.name)
    if failed:
        raise StageError(failed[cell.name])
    config: RunConfig = runs.task_of(cell, pruned).config
    metrics = emloc_ray.run(config, until="finetune", fresh=True, accept_changes=True)
    stages, made = metrics["stages"], cell.compresses or pruned is not None
    weights = sum(file.stat().st_size for file in Path(config.run_dir, "emulator").glob("*.safetensors"))
    shutil.rmtree(config.run_dir)
    bits = metrics["emulator"]["bits_per_weight"]
    return {
        "bits_per_weight": bits * (pruned.parameters_kept if pruned else 1.0),
        "made_s": sum(usage["wall_s"] for stage, usage in stages.items() if stage in _MAKE) if made else None,
        "tokens_per_s": metrics["finetune"]["tokens_per_second"],
        "held_mib": (weights + stages["finetune"]["peak_above_imports_bytes"]) / MIB,
        "planned_mib": (metrics["planned_memory"]["finetune"] - metrics["planned_imports_bytes"]) / MIB,
    }


def _gap_closed() -> Mapping[str, float]:
    """Of each method the mean over seeds, of docstrings."""
    by_method: dict[str, list[float]] = {}
    for record in frontier.records(next(iter(frontier.MODELS.values()))):
        by_method.setdefault(record["method"], []).append(record["gap_closed"])
    return {method: mean(values) for method, values in by_method.items()}
