"""What ``emloc-ray status`` prints of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from emloc_ray.io.runs.directory import RunDirectory


def show_status(console: Console, run: RunDirectory) -> None:
    """Prints a run's stages, its state and its results so far."""
    from emloc_ray.config.steps import STEP_NAMES
    from emloc_ray.io.store.node_cache import exists
    from emloc_ray.io.store.places import below
    from emloc_ray.runs.status import asked_steps, current_stages, status_lines
    from emloc_ray.runs.trace import TRACE
    from emloc_ray.text import duration, size
    from emloc_ray.ui.terminal import evaluation_table, result_lines

    manifest = run.manifest()
    stages, current, metrics = manifest["stages"], current_stages(manifest), run.metrics()
    for stage in STEP_NAMES:
        if stage in current:
            result = stages[stage]["result"]
            if result.get("taken_from"):
                made = f"from the cache, made by {result['taken_from']}"
                console.print(f"[green]✓[/] {stage:<10} {escape(made)}", soft_wrap=True)
                continue
            usage = result["usage"]
            took, peak = duration(usage["wall_s"]), size(usage["peak_pss_bytes"])
            gpu = (
                f", {size(usage['peak_gpu_bytes'])} of a GPU{_planned(metrics, stage)}"
                if "peak_gpu_bytes" in usage
                else ""
            )
            console.print(f"[green]✓[/] {stage:<10} {took:>9}  peak {peak}{gpu}")
        elif stage in stages:
            console.print(f"[dim]· {stage:<10} out of date[/]")
        elif stage in asked_steps(manifest):
            console.print(f"[dim]· {stage:<10} not done[/]")
    for line in status_lines(run):
        console.print(escape(line), soft_wrap=True)
    if exists(run.path(TRACE)):
        console.print(escape(f"Trace of its workers: {below(run.place, TRACE)}, for ui.perfetto.dev"), soft_wrap=True)
    if "evaluation" in metrics:
        console.print(evaluation_table(metrics))
        pages = [name for name in ("report.html", TRACE) if exists(run.path(name))]
        for line in result_lines(metrics, run.place, pages):
            console.print(escape(line), soft_wrap=True)


def _planned(metrics: Mapping[str, Any], stage: str) -> str:
    """What a worker of the stage was planned to take of a GPU."""
    from emloc_ray.text import size

    planned = (metrics.get("planned_gpu_bytes") or {}).get(stage)  # which older versions do not tell apart
    return "" if planned is None else f" (planned {size(planned)})"
