"""An adapter's modules: what each sees of the difference between emulator and original, and as corrected."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
    energy_with,
    residual_energy,
    shortfall,
)
from emloc_ray.core.gram import unpack_triangle
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.products import ROWS, product_by_rows, row_norms, seen_rows
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.updates import LowRankUpdate
from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry, read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.adapter_files import Adapter, LoraModule
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.emulator_weights import StoredParts, stored_parts
from emloc_ray.stages.correct.job import CorrectionJob, ModuleGroup

_TINY = torch.finfo(torch.float64).tiny
_NUMBERS = "numbers"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Magnitudes:
    """DoRA's magnitudes of one linear for the original: ``g ‖W + s B A‖``, with ``g = m / ‖W_E + s B_t A_t‖`` as trained.

    DoRA serves ``m / ‖W + s B A‖ · (W + s B A)``, row by row, and was trained with ``W_E`` for ``W``: the magnitudes as trained
    would shrink every row to the length of the emulator's. ``squares (out,)`` are ``‖w‖²`` of W's rows,
    ``cross = W Q (out, k)``, ``gain (out,)`` is ``g``; all None where the layer stayed dense, whose magnitudes are as
    ``trained``.
    """

    trained: Tensor
    squares: Tensor | None = None
    cross: Tensor | None = None
    gain: Tensor | None = None

    def with_update(self, q: Tensor, b: Tensor, scale: float) -> Tensor:
        """For the update ``s b Qᵀ``."""
        if self.squares is None or self.cross is None or self.gain is None:
            return self.trained
        return (self.gain * row_norms(self.squares, self.cross, q.T, b, scale)).float()


@dataclass(frozen=True)
class CorrectableModule:
    """One adapted linear: its update in LoRA's form and what that sees of the difference, None where there is none. ``lack`` is
    the share of the update's norm that the form leaves out."""

    lora: LoraModule
    form: CanonicalLora
    seen: Difference | None
    magnitudes: Magnitudes | None = None
    lack: float = 0.0

    def applied(self, candidate: Candidate, dampening_frac: float) -> Tensor:
        """C as clamped and multiplied by its strength ``(out, k)``; zero where the layer stayed dense."""
        if self.seen is None:
            return torch.zeros_like(self.form.b)
        method = candidate.method
        if method == "covariance" and self.seen.delta_gq is None:
            method = "projection"
        elif method == "adapted" and self.seen.delta_aq is None:  # no token came by
            method = "none"
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
        if self.magnitudes is None:
            return None
        b = self.form.b - self.applied(candidate, dampening_frac)
        return self.magnitudes.with_update(self.form.q, b, self.lora.scale)

    def shortfalls(self, candidate: Candidate, dampening_frac: float) -> dict[str, float] | None:
        """``‖(Δ − s C A_c) G'^½‖_F`` before and after; None where nothing differs, and of ``adapted``, which is not fitted to the
        calibration's Gram: it makes that larger."""
        if self.seen is None or candidate.method == "adapted":
            return None
        applied = self.applied(candidate, dampening_frac)
        before = shortfall(self.seen, torch.zeros_like(applied), self.lora.scale)
        return {"before": before, "after": shortfall(self.seen, applied, self.lora.scale)}


class Opened:
    """A job and what it reads, opened once by their headers: a task for each of hundreds of groups would open hundreds of shards
    to find its own, and on a store ask twice for each."""

    def __init__(self, job: CorrectionJob) -> None:
        self.job, self.adapter = job, Adapter(job.adapter_dir)
        self.original, self.emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
        entries = read_shard(job.adapted_path).entries if exists(job.adapted_path) else ()
        self.adapted = {entry.name: entry for entry in entries}


class DifferenceTensors(NamedTuple):
    """What is wide of a group, as read: the Gram's packed triangle, or None where there is none; by linear, where the emulator
    stores another weight, the original's ``(out, in)`` and what is stored."""

    gram: Tensor | None
    weights: dict[str, Tensor]
    stored: dict[str, StoredParts]


def read_differences(opened: Opened, group: ModuleGroup) -> DifferenceTensors:
    """Reads them into this process's memory."""
    parts = {spec.name: stored_parts(opened.emulator, spec.name) for spec in group.specs}
    stored = {name: held for name, held in parts.items() if held is not None}
    weights = {spec.name: spec.read_weight(opened.original) for spec in group.specs if spec.name in stored}
    return DifferenceTensors(None if group.gram is None else group.gram.packed(), weights, stored)


@exact_float32()
def see_differences(
    opened: Opened, group: ModuleGroup, device: torch.device = _CPU, tensors: DifferenceTensors | None = None
) -> list[CorrectableModule]:
    """The modules of linears that share a Gram, which is read once; what is wide is multiplied on ``device``. ``tensors``:
    :func:`read_differences` of the group; without them one linear is read after another."""
    job, adapter, original, emulator = opened.job, opened.adapter, opened.original, opened.emulator
    dora = adapter.kind == "decomposed"
    bare = []
    for spec in group.specs:
        lora, lack = as_lora_module(adapter, spec, job.update_tolerance)
        magnitudes = Magnitudes(adapter.magnitude(spec.name)) if dora else None
        bare.append(CorrectableModule(lora, canonical_form(lora.lora_a, lora.lora_b), None, magnitudes, lack))
    columns = [_columns(job, module, emulator).to(device) for module in bare]
    gram = _gram(group, tensors, device)
    scale = 0.0 if gram is None else float(gram.diagonal().mean(dtype=torch.float64))
    gram_columns: Sequence[Tensor | None] = [None] * len(bare)
    if gram is not None:
        product = product_by_rows(gram, torch.cat(columns, dim=1))
        gram_columns = product.split([part.shape[1] for part in columns], dim=1)
    corrected = []
    for spec, module, own, gram_own in zip(group.specs, bare, columns, gram_columns, strict=True):
        stored, k = _stored(emulator, spec, tensors, device), module.form.q.shape[1]
        if stored is None:
            corrected.append(module)
            continue
        weight = (spec.read_weight(original) if tensors is None else tensors.weights[spec.name]).to(device)
        wide = difference(weight, stored, own, gram_own, damping=job.gram_dampening_frac * scale)
        if gram is not None and not scale:
            energy = 0.0
        else:
            energy = _energy(job, spec.name, weight, stored, own[:, k:], wide, gram)
        seen = wide.first(k, energy)
        if f"{spec.name}/q" in opened.adapted:
            basis, columns_of = (opened.adapted[f"{spec.name}/{part}"].read_rows().double() for part in ("q", "gram_q"))
            adapted_q = columns_of @ (basis.T @ module.form.q)  # both bases are of the same directions
            delta_aq = difference(weight, stored, adapted_q.to(device)).delta_q.cpu()
            seen = replace(seen, delta_aq=delta_aq, adapted_inner=module.form.q.T @ adapted_q)
        corrected.append(replace(module, seen=seen, magnitudes=_for_original(module, weight, stored, own[:, :k], seen)))
        del weight, stored  # or they would lie beside the next linear's
    return corrected


def _gram(group: ModuleGroup, tensors: DifferenceTensors | None, device: torch.device) -> Tensor | None:
    """The group's Gram ``(in, in)``, on ``device``."""
    if tensors is None or tensors.gram is None:
        return None if group.gram is None else group.gram.read(device)
    return unpack_triangle(tensors.gram.to(device))


def _stored(
    emulator: Checkpoint, spec: LinearSpec, tensors: DifferenceTensors | None, device: torch.device
) -> StoredWeight | None:
    """What the emulator stores of a linear's weight, on ``device``; None where it keeps the original's."""
    held = stored_parts(emulator, spec.name) if tensors is None else tensors.stored.get(spec.name)
    return None if held is None else held.weight(spec.in_features, device)


def _columns(job: CorrectionJob, module: CorrectableModule, emulator: Checkpoint) -> Tensor:
    """Q, and beside it the rows that healing joined to ``down``: ``(in, k + r)``, float64."""
    added = job.healed.get(module.lora.name)
    if added is None:
        return module.form.q
    down = emulator.read(f"{module.lora.name}.down.weight")[-added:]
    return torch.cat([module.form.q, down.double().T], dim=1)


def _energy(
    job: CorrectionJob,
    name: str,
    weight: Tensor,
    stored: StoredWeight,
    added: Tensor,
    wide: Difference,
    gram: Tensor | None,
) -> float:
    """``tr(Δ G' Δᵀ)`` of what is stored: the factorization's where it measured that.

    Healing joins ranks to its factors: the energy is then :func:`energy_with` these, ``added (in, r)``. Only what was made
    anew since, as factors put into 4 bits or pivoted after healing, or was never measured, is measured here.
    """
    known = job.residuals.get(name)
    if known is None or gram is None or wide.delta_gq is None or wide.inner is None:
        return residual_energy(weight, stored, gram, wide.damping)
    count = added.shape[1]
    if not count:
        return known
    delta_g = wide.delta_gq[:, -count:] + wide.damping * wide.delta_q[:, -count:]
    inner = wide.inner[-count:, -count:] + wide.damping * added.T @ added
    return energy_with(known, stored.left[:, -count:].double(), delta_g, inner)


def _for_original(
    module: CorrectableModule, weight: Tensor, stored: StoredWeight, q: Tensor, seen: Difference
) -> Magnitudes | None:
    """DoRA's magnitudes of a linear that the emulator has another weight of."""
    if module.magnitudes is None:
        return None
    trained, form = module.magnitudes.trained, module.form
    squares, cross = (rows.cpu() for rows in seen_rows(weight, q))
    emulated = torch.cat(
        [stored.rows(begin, begin + ROWS).double().square().sum(dim=1) for begin in range(0, len(weight), ROWS)]
    )
    trained_norms = row_norms(emulated.cpu(), cross - seen.delta_q, form.q.T, form.b, module.lora.scale)
    return Magnitudes(trained, squares, cross, trained.double() / trained_norms.clamp_min(_TINY))


def as_lora_module(adapter: Adapter, spec: LinearSpec, tolerance: float) -> tuple[LoraModule, float]:
    """A linear's update as a LoRA module, and the share of its norm that this lacks.

    It lacks nothing of ``s B A``. An update of up to full rank is represented by its dominant subspace.
    """
    if adapter.is_lora:
        return adapter.module(spec.name), 0.0
    update = adapter.update(spec)
    if isinstance(update, LowRankUpdate):
        return LoraModule(spec.name, update.lora_a, update.lora_b, update.scale), 0.0
    dominant = update.dominant(tolerance)
    return LoraModule(spec.name, dominant.lora_a.float(), dominant.lora_b.float(), 1.0), dominant.error


def write_modules(path: Path, modules: Sequence[CorrectableModule]) -> None:
    """Writes modules as one safetensors file, their numbers as its metadata."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for module in modules:
        values = {**vars(module.lora), **module.form._asdict(), "lack": module.lack}
        for part in (module.seen, module.magnitudes):
            values |= {} if part is None else vars(part)
        name = values.pop("name")
        tensors |= {f"{name}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
        numbers[name] = {key: value for key, value in values.items() if isinstance(value, float)}
    write_tensors(path, tensors, {_NUMBERS: json.dumps(numbers)})


def read_modules(path: Path) -> Iterator[CorrectableModule]:
    """What :func:`write_modules` wrote, module by module."""
    shard = read_shard(path)
    entries: dict[str, dict[str, TensorEntry]] = {}  # a large mixture's file has tens of thousands
    for entry in shard.entries:
        name, _, key = entry.name.rpartition("/")
        entries.setdefault(name, {})[key] = entry
    for name, numbers in json.loads(json.loads(shard.header)["__metadata__"][_NUMBERS]).items():
        t = {key: entry.read_rows() for key, entry in entries[name].items()}
        seen = magnitudes = None
        if "delta_q" in t:
            gram_parts = t.get("delta_gq"), t.get("inner")
            adapted_parts = t.get("delta_aq"), t.get("adapted_inner")
            seen = Difference(t["delta_q"], *gram_parts, numbers["energy"], numbers["damping"], *adapted_parts)
        if "trained" in t:
            magnitudes = Magnitudes(t["trained"], t.get("squares"), t.get("cross"), t.get("gain"))
        lora = LoraModule(name, t["lora_a"], t["lora_b"], numbers["scale"])
        yield CorrectableModule(lora, CanonicalLora(t["b"], t["q"]), seen, magnitudes, numbers["lack"])


@torch.no_grad()
def plug_in(model: Any, module: LoraModule, magnitude: Tensor | None) -> None:
    """Puts a module's matrices, and DoRA's magnitude, into the model's adapter."""
    layer = model.base_model.model.get_submodule(module.name)
    layer.lora_A["default"].weight.copy_(module.lora_a)
    layer.lora_B["default"].weight.copy_(module.lora_b)
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
