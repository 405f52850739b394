"""The part ``gpu``: with torch, transformers, peft and safetensors alone, on random weights, in the minutes given."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.figures import Figures
from benchmarks.gpu.blocks import blocks
from benchmarks.gpu.linears import on_cpu, on_device
from benchmarks.gpu.ranks import ranks
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.speeds import speeds
from benchmarks.gpu.training import smaller_card, training
from emloc_ray.errors import ConfigError
from emloc_ray.stages.ray.spans import growing_segments

PARTS = (training, ranks, blocks, smaller_card, speeds, on_device, on_cpu)


def gpu(
    out: Path,
    minutes: float = 10.0,
    device: str = "cuda",
    shapes: str = "full",
    write: Callable[[Figures], object] = lambda figures: None,
) -> Figures:
    """Measures, the most telling first; ``gpu.json`` holds all that was found, also where this is broken off. ``write`` gets
    the figures after each part.

    Raises:
        ConfigError: where there is no such device.
    """
    os.environ.update(growing_segments(os.environ))  # peaks are then of the allocator that Ray's workers have
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda needs a GPU that torch sees, and there is none: give --device cpu --shapes tiny."
        )
    session = Session(device, SHAPES[shapes], out, minutes)
    figures: Figures = {}
    for part in PARTS:
        try:
            part(session)
        except Exception as error:  # noqa: BLE001  as one case ends no other
            session.failed(part.__name__, error)
        figures = {f"{name}: {what}": line for name, lines in session.parts.items() for what, line in lines.items()}
        write(figures)
    return figures
