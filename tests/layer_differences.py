"""``Δ = W − W_E`` of a layer as a matrix, which the package never makes: what tests hold the correction to."""

from __future__ import annotations

import torch
from torch import Tensor

from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter_files import LoraModule
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.emulator_weights import emulator_weight


def layer_difference(spec: LinearSpec, original: Checkpoint, emulator: Checkpoint) -> Tensor | None:
    """``Δ (out, in)`` in float32; None where the emulator keeps the layer as it is."""
    stored = emulator_weight(emulator, spec.name, spec.in_features)
    return None if stored is None else spec.read_weight(original).float() - stored.rows()


def assert_covariance_corrects(
    weight: Tensor, stored: Tensor, before: LoraModule, after: LoraModule, gram: Tensor | None, name: str
) -> None:
    """``W x + s C A x = W_E x + s B A x`` for ``x = (G + damping) Aᵀ``, under which ``covariance`` is exact; without a Gram for
    ``x = Aᵀ``."""
    x = torch.linalg.svd(before.lora_a.double(), full_matrices=False).Vh.T
    if gram is not None:
        gram = gram.double()
        x = gram @ x + 1e-4 * (x.T @ gram @ x).diagonal().mean() * x
    served = weight @ x + after.scale * (after.lora_b.double() @ (after.lora_a.double() @ x))
    meant = stored @ x + before.scale * (before.lora_b.double() @ (before.lora_a.double() @ x))
    assert float((served - meant).norm() / ((weight - stored) @ x).norm()) < 1e-2, name
