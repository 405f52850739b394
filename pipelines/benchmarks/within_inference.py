"""The quickstart by its default budget: what each stage's workers held, against inference of the original."""

from __future__ import annotations

from pathlib import Path

import ray

import emloc_ray
from benchmarks.figures import CONFIG, Figures, figure, write_result
from benchmarks.stage_memory import probe
from emloc_ray.config.schema import RunConfig
from emloc_ray.planning.memory import BASE_BYTES
from emloc_ray.stages.ray.session import connection
from emloc_ray.stages.ray.spans import timed
from emloc_ray.stages.ray.tasks import remote_task

MIB = 2**20


def within(out: Path) -> Figures:
    """Each stage's largest worker and its plan, above what imports take, against a process that runs inference of a row.

    Also the seconds of each stage, and those of the same run with ``memory_budget: null``.
    """
    bounded, free = (
        emloc_ray.load_config(CONFIG, [f"run_dir={out / name}", *budget]) for name, budget in _RUNS.items()
    )
    imports = _imports(bounded)
    runs = [emloc_ray.run(config, fresh=True) for config in (bounded, free)]
    size = ("--rows", "1", "--length", str(bounded.data.max_seq_length))
    inference = probe("inference", Path(bounded.run_dir, "model"), *size)["peak"] / MIB
    planned = {name: (held - BASE_BYTES) / MIB for name, held in runs[0]["planned_memory"].items()}
    rows, figures = [], {}
    for stage in (name for name in planned if name != "inference"):
        # A stage that imports less than all may hold less than imports take.
        peaks = [max(1.0, run["stages"][stage]["peak_rss_bytes"] - imports) / MIB for run in runs]
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


def _imports(config: RunConfig) -> float:
    """Bytes of a worker that has imported what stages do, and has done nothing."""

    def idle() -> int:
        from emloc_ray.stages.evaluate import evaluate  # noqa: F401
        from emloc_ray.stages.finetune import training  # noqa: F401

        return timed(lambda: None)().peak_bytes

    with connection(config.ray.address, lean_memory=True, **config.ray.init_options):
        return float(ray.get(remote_task(idle).remote()))
