"""How much of the gap to LoRA on the original ways to train closed where they were measured: pipelines/results."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PREDICTIONS = {"objective": "predictions"}
_BY_PREDICTIONS = {"allocation": "sensitivity", **_PREDICTIONS}


@dataclass(frozen=True)
class Measured:
    """A row of a table: SmolLM2-135M-Instruct, 60 steps on docstring summaries, means over three seeds; on weights that no 4-bit
    grid restores, and over three tasks, of ``refined`` over three seeds, of ``refined_more_bits``, ``refined_budgets`` and
    ``equal_bytes`` (with ``equal_bytes_tasks``) over five.

    ``gap_closed``: (original − method) / (original − LoRA on the original) in held-out loss, 1 at the most: what is above it is
    within the error. ``method`` of ``file`` has it. An emulator counts as ``healed`` where it was, by a third of its steps.
    """

    file: str
    method: str
    ratio: float | None
    gap_closed: float
    quantization: str = "none"
    healed: bool = False
    refined: bool = False
    made: Mapping[str, str] = field(default_factory=dict)  # other settings of the emulator than the defaults
    bits: float | None = None  # a weight, of a budget in place of a ratio

    @property
    def size(self) -> float:
        """Its bits a weight or its ratio."""
        return self.bits or self.ratio or 0.0

    @property
    def where(self) -> str:
        """The size of its emulator, in words that follow the figure; nothing where the original is trained."""
        if self.bits is not None:
            return f" at {self.bits:g} bits"
        return "" if self.ratio in (None, 1) else f" at {self.ratio:g}"


MEASURED = (
    Measured("baselines", "lora", 1.0, 1.0),
    Measured("equal_bytes", "nf4", 1.0, 0.961, "nf4"),
    Measured("equal_bytes", "int4", 1.0, 1.0, "int4"),
    Measured("equal_bytes", "int3", 1.0, 0.990, "int3"),
    Measured("equal_bytes", "int2", 1.0, 0.915, "int2"),
    Measured("allocation", "uniform", 0.5, 0.722),
    Measured("allocation", "uniform", 0.25, 0.529),
    Measured("allocation", "sensitivity_predictions", 0.5, 0.887, made=_BY_PREDICTIONS),
    Measured("allocation", "sensitivity_predictions", 0.25, 0.736, made=_BY_PREDICTIONS),
    Measured("allocation", "healed", 0.5, 0.903, healed=True, made=_BY_PREDICTIONS),
    Measured("allocation", "healed", 0.25, 0.812, healed=True, made=_BY_PREDICTIONS),
    Measured("storage", "pivoted", 0.5, 0.915, made={**_BY_PREDICTIONS, "storage": "pivoted"}),
    Measured("refined", "half_refined_75", 0.5, 0.932, refined=True, made=_BY_PREDICTIONS),
    Measured("refined", "quarter_refined_75", 0.25, 0.843, refined=True, made=_BY_PREDICTIONS),
    Measured("baselines", "emloc_nf4", 0.5, 0.800, "nf4", healed=True, made=_BY_PREDICTIONS),
    Measured("equal_bytes", "budget_4.15", None, 1.0, made=_PREDICTIONS, bits=4.15),
    Measured("equal_bytes", "budget_2.4", None, 0.947, made=_PREDICTIONS, bits=2.4),
    Measured("equal_bytes", "budget_1.1", None, 0.703, made=_PREDICTIONS, bits=1.1),
    Measured("refined_more_bits", "budget_2.4_refined", None, 0.962, refined=True, made=_PREDICTIONS, bits=2.4),
    Measured("refined_budgets", "budget_1.1_refined", None, 0.857, refined=True, made=_PREDICTIONS, bits=1.1),
    Measured("equal_bytes", "budget_1.1_healed", None, 0.732, healed=True, made=_PREDICTIONS, bits=1.1),
)

# Shares of the steps of LoRA on the original, and of its gap: 6, 12, 24 and 60 steps of ``equal_time``.
FEWER_STEPS = ((0.0, 0.0), (0.1, 0.615), (0.2, 0.807), (0.4, 0.916), (1.0, 1.0))

REFINED_STEPS = 75  # of each block, in all rows that are refined
_MADE = {"allocation": "uniform", "objective": "activations", "storage": "factors"}


def measured_for(emulator: Any) -> Measured | None:
    """The measured figures of such an emulator at its ratio or budget of bits, or at the next smaller one; None where none was
    measured. One refined by fewer steps than were measured has those of one that is not, by as many the higher of both."""
    ratio, made = emulator.compression_ratio, {key: getattr(emulator, key) for key in _MADE}
    if emulator.budget is not None:
        rows, asked = [row for row in MEASURED if row.bits is not None], emulator.budget_bits or 0.0
    else:
        rows, asked = [row for row in MEASURED if row.ratio and row.quantization == emulator.quantization], ratio
        if ratio == 1:
            return next((row for row in rows if row.ratio == 1), None)
    healed = emulator.heals is not None
    alike = [row for row in rows if row.healed == healed and {**_MADE, **row.made} == made and row.size <= asked]
    steps = 0 if emulator.refines is None else emulator.refines.steps
    kinds = (False, True) if steps >= REFINED_STEPS else (False,)
    nearest = [
        max((row for row in alike if row.refined is kind), key=lambda row: row.size, default=None) for kind in kinds
    ]
    return max((row for row in nearest if row is not None), key=lambda row: row.gap_closed, default=None)


def closed_by(share: float) -> float:
    """What a share of a training's steps closes, of the gap that all of them do: as LoRA on the original was measured, linear in
    between."""
    for (fewer, low), (more, high) in itertools.pairwise(FEWER_STEPS):
        if share <= more:
            return low + (high - low) * (share - fewer) / (more - fewer)
    return 1.0
