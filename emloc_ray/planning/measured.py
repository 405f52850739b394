"""How much of the gap to LoRA on the original ways to train closed where they were measured: pipelines/results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_BY_PREDICTIONS = {"allocation": "sensitivity", "objective": "predictions"}


@dataclass(frozen=True)
class Measured:
    """A row of a table: SmolLM2-135M-Instruct, 60 steps on docstring summaries, means over three seeds; of ``frontier`` one seed,
    on weights that no 4-bit grid restores.

    ``gap_closed``: (original − method) / (original − LoRA on the original) in held-out loss. ``method`` of ``file`` has it. An
    emulator counts as ``healed`` where it was, by a third of its steps.
    """

    file: str
    method: str
    ratio: float
    gap_closed: float
    quantization: str = "none"
    healed: bool = False
    made: Mapping[str, str] = field(default_factory=dict)  # other settings of the emulator than the defaults


MEASURED = (
    Measured("baselines", "lora", 1.0, 1.0),
    Measured("baselines", "nf4_lora", 1.0, 0.980, "nf4"),
    Measured("frontier", "int3", 1.0, 0.974, "int3"),
    Measured("frontier", "int2", 1.0, 0.922, "int2"),
    Measured("allocation", "uniform", 0.5, 0.722),
    Measured("allocation", "uniform", 0.25, 0.529),
    Measured("allocation", "sensitivity_predictions", 0.5, 0.887, made=_BY_PREDICTIONS),
    Measured("allocation", "sensitivity_predictions", 0.25, 0.736, made=_BY_PREDICTIONS),
    Measured("allocation", "healed", 0.5, 0.903, healed=True, made=_BY_PREDICTIONS),
    Measured("allocation", "healed", 0.25, 0.812, healed=True, made=_BY_PREDICTIONS),
    Measured("storage", "pivoted", 0.5, 0.915, made={**_BY_PREDICTIONS, "storage": "pivoted"}),
    Measured("baselines", "emloc_nf4", 0.5, 0.800, "nf4", True, _BY_PREDICTIONS),
)

_MADE = {"allocation": "uniform", "objective": "activations", "storage": "factors"}


def measured_for(emulator: Any) -> Measured | None:
    """What was measured of such an emulator at its ratio, or at the next smaller one; None where nothing was."""
    ratio, made = emulator.compression_ratio, {key: getattr(emulator, key) for key in _MADE}
    rows = [row for row in MEASURED if row.quantization == emulator.quantization]
    if ratio == 1:
        return next((row for row in rows if row.ratio == 1), None)
    healed = emulator.heals is not None
    alike = [row for row in rows if row.healed == healed and {**_MADE, **row.made} == made and row.ratio <= ratio]
    return max(alike, key=lambda row: row.ratio, default=None)
