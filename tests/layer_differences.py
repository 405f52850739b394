"""``Δ = W − W_E`` of a layer as a matrix, which the package never makes: what tests hold the correction to."""

from __future__ import annotations

from torch import Tensor

from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.quantization import emulator_weight


def layer_difference(spec: LinearSpec, original: Checkpoint, emulator: Checkpoint) -> Tensor | None:
    """``Δ (out, in)`` in float32; None where the emulator keeps the layer as it is."""
    stored = emulator_weight(emulator, spec.name, spec.in_features)
    return None if stored is None else spec.read_weight(original).float() - stored.rows()
