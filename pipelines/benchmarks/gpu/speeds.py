"""The speeds of a GPU that plans are timed by, beside what a plan takes where none is measured."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.session import Session
from emloc_ray.errors import StageError
from emloc_ray.planning.machine import assumed_speeds, measured_speeds

_LINES = {
    "products in bfloat16": ("gpu_flops", 1e12, "TFLOP/s"),
    "products in float32": ("gpu_float32_flops", 1e12, "TFLOP/s"),
    "from pinned memory": ("link", 1e9, "GB/s"),
    "in its memory": ("gpu_memory", 1e9, "GB/s"),
}


def speeds(session: Session) -> None:
    """Nothing where the session is on the CPU."""
    if not session.is_cuda:
        return
    figures = session.measure("speeds", "a plan's", 5, _speeds)
    for what, (name, scale, unit) in _LINES.items():
        if name in figures:
            sides = figures[name] / scale, figures[f"assumed_{name}"] / scale
            session.compare("speeds", what, *sides, f"{unit} (baseline: the data sheet, as plans take it)")


def _speeds() -> dict[str, Any]:
    measured, assumed = measured_speeds(), assumed_speeds()
    if not measured.measured:
        raise StageError("The GPU's speeds cannot be timed here: see that nvidia-smi names it.")
    names = [name for name, *_ in _LINES.values()]
    return {
        **{name: getattr(measured, name) for name in names},
        **{f"assumed_{name}": getattr(assumed, name) for name in names},
    }
