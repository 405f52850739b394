"""An adapter's modules one by one: what each sees of the difference between emulator and original, and as corrected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from emloc_ray.core.correction import (
    Candidate,
    CanonicalLora,
    Difference,
    apply_correction,
    canonical_form,
    clamp_columns,
    correction,
    difference,
    shortfall,
)
from emloc_ray.core.products import row_norms, seen_rows
from emloc_ray.core.updates import LowRankUpdate
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter, LoraModule
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.quantization import emulator_weight

_TINY = torch.finfo(torch.float64).tiny


class _Magnitude:
    """DoRA's magnitudes of one linear for the original: ``g ‖W + s B A‖``, with ``g = m / ‖W_E + s B_t A_t‖`` as trained.

    DoRA serves ``m / ‖W + s B A‖ · (W + s B A)``, row by row, and was trained with ``W_E`` for ``W``. With the magnitudes
    as trained, every row would be shrunk to the length that the emulator's row had, by an untrained adapter too. With
    these the gain ``g`` of each row is what was trained, and what is left between the two, ``Δ``, is the correction's.
    """

    def __init__(
        self, trained: Tensor, form: CanonicalLora, scale: float, weight: Tensor, delta: Tensor | None
    ) -> None:
        self.trained = None if delta is not None else trained
        self.form, self.scale = form, scale
        self.base, self.cross = seen_rows(weight, form.q)
        if delta is not None:
            base, cross = seen_rows(weight - delta, form.q)
            self.gain = trained.double() / row_norms(base, cross, form.q.T, form.b, scale).clamp_min(_TINY)

    def with_update(self, b: Tensor) -> Tensor:
        """For the update ``s b Qᵀ``; as trained where the layer stayed dense."""
        if self.trained is not None:
            return self.trained
        return (self.gain * row_norms(self.base, self.cross, self.form.q.T, b, self.scale)).float()


class CorrectableModule:
    """One adapted linear: its update in LoRA's form and what that sees of the difference.

    ``lack`` is the share of the update's norm that the form leaves out.
    """

    def __init__(self, lora: LoraModule, delta: Tensor | None, gram: Tensor | None, lack: float = 0.0) -> None:
        self.lora, self.lack = lora, lack
        self.form: CanonicalLora = canonical_form(lora.lora_a, lora.lora_b)
        self.seen: Difference | None = None if delta is None else difference(delta, self.form.q, gram)
        self.rows: _Magnitude | None = None

    def applied(self, candidate: Candidate, dampening_frac: float) -> Tensor:
        """C as clamped and multiplied by its strength ``(out, k)``; zero where the layer stayed dense."""
        if self.seen is None:
            return torch.zeros_like(self.form.b)
        method = (
            candidate.method if self.seen.delta_gq is not None or candidate.method != "covariance" else "projection"
        )
        raw = correction(self.seen, method, self.lora.scale, dampening_frac)
        return candidate.strength * clamp_columns(raw, self.form.b, candidate.clamp)

    def corrected(self, candidate: Candidate, dampening_frac: float) -> LoraModule:
        """The module's corrected update; as trained where nothing is taken out."""
        if candidate.method == "none" or self.seen is None:
            return self.lora
        applied = self.applied(candidate, dampening_frac)
        lora_a, lora_b = apply_correction(self.form, applied, self.lora.lora_a.shape[0])
        return LoraModule(self.lora.name, lora_a, lora_b, self.lora.scale)

    def magnitude(self, candidate: Candidate, dampening_frac: float) -> Tensor | None:
        """DoRA's magnitude beside the corrected update; None of another method."""
        if self.rows is None:
            return None
        return self.rows.with_update(self.form.b - self.applied(candidate, dampening_frac))

    def shortfalls(self, candidate: Candidate, dampening_frac: float) -> dict[str, float] | None:
        """``‖(Δ − s C A_c) G^½‖_F`` before and after."""
        if self.seen is None:
            return None
        applied = self.applied(candidate, dampening_frac)
        before = shortfall(self.seen, torch.zeros_like(applied), self.lora.scale)
        return {"before": before, "after": shortfall(self.seen, applied, self.lora.scale)}


def layer_difference(spec: LinearSpec, original: Checkpoint, emulator: Checkpoint) -> Tensor | None:
    """``Δ = W − W_E (out, in)`` in float32 with the factors as stored, few bits included; None where the emulator keeps the
    layer as it is."""
    stored = emulator_weight(emulator, spec.name, spec.in_features)
    return None if stored is None else spec.read_weight(original).float() - stored


def read_modules(
    adapter: Adapter,
    specs: Sequence[LinearSpec],
    original: Checkpoint,
    emulator: Checkpoint,
    grams: GramStore | None,
    update_tolerance: float,
) -> Iterator[CorrectableModule]:
    """Yields every module of the adapter, those that share a Gram one after another, so that it is read once."""
    placed = {spec.name: spec for spec in specs}
    known = {}
    if grams is not None:
        known = {name: grams.stored(name) for name in adapter.names if name in grams and grams.num_tokens(name) > 0}
    gram_of = {name: (str(stored.file), stored.name) for name, stored in known.items()}
    last, gram = None, None
    for name in sorted(adapter.names, key=lambda name: gram_of.get(name, ("", ""))):
        spec = placed[name]
        delta = layer_difference(spec, original, emulator)
        if delta is not None and gram_of.get(name) != last:
            gram = None  # before the next is read: only one is held
            last, gram = gram_of.get(name), known[name].read() if name in known else None
        lora, lack = _in_lora_form(adapter, spec, update_tolerance)
        module = CorrectableModule(lora, delta, gram, lack)
        if adapter.kind == "decomposed":
            weight = spec.read_weight(original).float()
            module.rows = _Magnitude(adapter.magnitude(name), module.form, lora.scale, weight, delta)
        yield module


def _in_lora_form(adapter: Adapter, spec: LinearSpec, tolerance: float) -> tuple[LoraModule, float]:
    """``s B A`` itself; of an update of up to full rank its dominant subspace, and the share of its norm that it lacks."""
    if adapter.is_lora:
        return adapter.module(spec.name), 0.0
    update = adapter.update(spec)
    if isinstance(update, LowRankUpdate):
        return LoraModule(spec.name, update.lora_a, update.lora_b, update.scale), 0.0
    found = update.dominant(tolerance)
    return LoraModule(spec.name, found.lora_a.float(), found.lora_b.float(), 1.0), found.error


@torch.no_grad()
def plug_in(model: Any, module: LoraModule, magnitude: Tensor | None) -> None:
    """Puts a module's matrices, and DoRA's magnitude, into the model's adapter."""
    layer = model.base_model.model.get_submodule(module.name)
    layer.lora_A["default"].weight.copy_(module.lora_a)
    layer.lora_B["default"].weight.copy_(module.lora_b)
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
