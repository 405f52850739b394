"""Correct: a task takes the emulator's difference back out of the adapter, module by module, and chooses how."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from emloc_ray.core.correction import (
    CanonicalLora,
    Difference,
    Method,
    apply_correction,
    canonical_form,
    clamp_columns,
    correction,
    difference,
    shortfall,
)
from emloc_ray.core.pivoting import stored_product
from emloc_ray.core.updates import LowRankUpdate, row_norms, seen_rows
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.atomic import write_json
from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore
from emloc_ray.io.node_cache import discard, ensure
from emloc_ray.modeling.adapter import (
    Adapter,
    LoraModule,
    attach_adapter,
    copy_adapter,
    detach_adapter,
    load_adapter,
    lora_form,
    lora_form_settings,
    write_adapter,
)
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.quantization import is_quantized, stored_weight
from emloc_ray.modeling.scoring import score_rows
from emloc_ray.stages.cluster import Flight, Progress, Resources, set_threads, silent
from emloc_ray.stages.failures import Losses, Tell, unheard

_LOOK_S = 0.5
_TINY = torch.finfo(torch.float64).tiny

# Why adapters of a kind are plugged into the original as trained.
AS_TRAINED = {
    "scaling": "IA³ scales what linears read or give and adds nothing to their weights: there is no update to correct.",
    "prompt": "Virtual tokens are added to what the model reads and nothing to its weights: there is no update to correct,"
    " and none to merge.",
}


@dataclass(frozen=True)
class Candidate:
    """One way to correct: a method, the paper's clamp λ (None: unclamped) and a strength."""

    method: Method
    clamp: float | None = 3.0
    strength: float = 1.0


def candidates(method: str, clamp: float | None, strength: float, has_grams: bool) -> list[Candidate]:
    """The candidates of a ``correction`` section: one, or with ``auto`` a short list with ``none`` in it.

    First trials put the best strength between a quarter and one, and the best clamp at one or three.
    """
    if method != "auto":
        return [Candidate(m, clamp, strength) for m in get_args(Method) if m == method]
    found = [Candidate("none"), Candidate("projection"), Candidate("projection", 1.0)]
    found += [Candidate("projection", 3.0, 0.5)]
    if has_grams:
        found += [Candidate("covariance", 3.0, strength) for strength in (1.0, 0.5, 0.25)]
    return found


@dataclass(frozen=True)
class CorrectionJob:
    """Artifact paths and flat settings of the stage."""

    model_dir: Path
    emulator_dir: Path
    calibration_dir: Path | None
    adapter_dir: Path
    out_dir: Path
    selection_dir: Path
    specs: tuple[LinearSpec, ...]
    candidates: tuple[Candidate, ...]
    dampening_frac: float = 1e-4
    update_tolerance: float = 1e-3
    batch_size: int = 8
    loss_on: str = "completion"
    pad_token_id: int = 0
    model_options: dict[str, Any] = field(default_factory=dict)

    @property
    def progress_path(self) -> Path:
        """Where the worker says how far it is."""
        return self.out_dir.parent / ".correct.json"


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


class _Module:
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
    """``Δ = W − W_E (out, in)`` in float32 with the factors as stored, 4 bits included; None where the emulator keeps the
    layer as it is."""
    factorized = f"{spec.name}.up.weight" in emulator
    if not factorized and not is_quantized(emulator, spec.name):
        return None
    weight = spec.read_weight(original).float()
    if not factorized:
        return weight - stored_weight(emulator, spec.name).float()
    up, down = (stored_weight(emulator, f"{spec.name}.{part}").float() for part in ("up", "down"))
    order = emulator.read(f"{spec.name}.order") if f"{spec.name}.order" in emulator else None
    return weight - stored_product(up, down, order)


def correct_adapter(job: CorrectionJob, progress: Progress = silent) -> dict[str, Any]:
    """Corrects every module, chooses among the candidates on the selection split, writes ``job.out_dir``.

    Returns the choice, every candidate's loss, and each module's shortfall before and after.
    """
    adapter = Adapter(job.adapter_dir)
    if adapter.kind in AS_TRAINED:
        copy_adapter(job.adapter_dir, job.out_dir)
        none = asdict(Candidate("none"))
        told = {"selection_tokens": 0, "candidates": [{**none, "loss": None}], "modules": {}}
        return {**none, **told, "as_trained": AS_TRAINED[adapter.kind]}
    modules = _read_modules(job, adapter, progress)
    losses: list[float] = []
    best = 0
    if len(job.candidates) > 1:
        losses = _selection_losses(job, adapter, modules, progress)
        best = min(range(len(losses)), key=losses.__getitem__)
    chosen = job.candidates[best]
    shown: Sequence[float | None] = losses or [None]
    _write(job, adapter, modules, chosen)
    result = {
        **asdict(chosen),
        "selection_tokens": _num_selection_tokens(job) if len(job.candidates) > 1 else 0,
        "candidates": [{**asdict(c), "loss": loss} for c, loss in zip(job.candidates, shown, strict=True)],
        "modules": {m.lora.name: found for m in modules if (found := m.shortfalls(chosen, job.dampening_frac))},
    }
    if not adapter.is_lora:
        ranks = [m.lora.lora_a.shape[0] for m in modules]
        result["lora_form"] = {"largest_lack": max(m.lack for m in modules), "mean_rank": sum(ranks) / len(ranks)}
    return result


def _write(job: CorrectionJob, adapter: Adapter, modules: Sequence[_Module], chosen: Candidate) -> None:
    """In the method's own form where it is LoRA or nothing is taken out; else as a LoRA adapter of the same linears."""
    if not adapter.is_lora and chosen.method == "none":
        copy_adapter(job.adapter_dir, job.out_dir)
        return
    corrected = [module.corrected(chosen, job.dampening_frac) for module in modules]
    magnitudes = {m.lora.name: found for m in modules if (found := m.magnitude(chosen, job.dampening_frac)) is not None}
    config = adapter.config if adapter.is_lora else lora_form(adapter.config, corrected)
    write_adapter(job.out_dir, config, corrected, magnitudes)


def _read_modules(job: CorrectionJob, adapter: Adapter, progress: Progress) -> list[_Module]:
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    grams = None if job.calibration_dir is None else GramStore(job.calibration_dir)
    specs = {spec.name: spec for spec in job.specs}
    modules = []
    for number, name in enumerate(adapter.names):
        spec = specs[name]
        delta = layer_difference(spec, original, emulator)
        is_known = grams is not None and name in grams and grams.num_tokens(name) > 0
        gram = grams.read(name) if grams is not None and delta is not None and is_known else None
        lora, lack = _in_lora_form(adapter, spec, job.update_tolerance)
        module = _Module(lora, delta, gram, lack)
        if adapter.kind == "decomposed":
            weight = spec.read_weight(original).float()
            module.rows = _Magnitude(adapter.magnitude(name), module.form, lora.scale, weight, delta)
        modules.append(module)
        progress(number + 1, len(adapter.names) + len(job.candidates))
    return modules


def _in_lora_form(adapter: Adapter, spec: LinearSpec, tolerance: float) -> tuple[LoraModule, float]:
    """``s B A`` itself; of an update of up to full rank its dominant subspace, and the share of its norm that it lacks."""
    if adapter.is_lora:
        return adapter.module(spec.name), 0.0
    update = adapter.update(spec)
    if isinstance(update, LowRankUpdate):
        return LoraModule(spec.name, update.lora_a, update.lora_b, update.scale), 0.0
    found = update.dominant(tolerance)
    return LoraModule(spec.name, found.lora_a.float(), found.lora_b.float(), 1.0), found.error


def _selection_losses(
    job: CorrectionJob, adapter: Adapter, modules: Sequence[_Module], progress: Progress
) -> list[float]:
    """Of every candidate, on one model: first what is as trained, then, of other methods than LoRA, in LoRA's form."""
    model = load_adapter(load_model(job.model_dir, **job.model_options), job.adapter_dir).eval()
    is_lora = adapter.is_lora
    shards = TokenShards(job.selection_dir)
    rows = [shards.row(position) for position in range(len(shards))]
    images = ImageInputs(job.model_dir, job.model_options.get("trust_remote_code", False))
    losses: dict[int, float] = {}
    for number in sorted(range(len(job.candidates)), key=lambda at: job.candidates[at].method != "none"):
        candidate = job.candidates[number]
        if not is_lora and candidate.method != "none":
            settings = lora_form_settings([module.lora for module in modules])
            form = adapter_config(**settings, task_type=adapter.config["task_type"])
            model, is_lora = attach_adapter(detach_adapter(model), form).eval(), True
        for module in modules if is_lora else ():
            corrected = module.corrected(candidate, job.dampening_frac)
            _plug_in(model, corrected, module.magnitude(candidate, job.dampening_frac))
        score = score_rows(
            model,
            rows,
            batch_size=job.batch_size,
            loss_on=job.loss_on,
            pad_token_id=job.pad_token_id,
            name=f"corrected ({candidate.method})",
            images=images,
        )
        losses[number] = score.metrics()["loss"]
        progress(len(modules) + len(losses), len(modules) + len(job.candidates))
    return [losses[number] for number in range(len(job.candidates))]


@torch.no_grad()
def _plug_in(model: Any, module: LoraModule, magnitude: Tensor | None) -> None:
    layer = model.base_model.model.get_submodule(module.name)
    layer.lora_A["default"].weight.copy_(module.lora_a)
    layer.lora_B["default"].weight.copy_(module.lora_b)
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight.copy_(magnitude)


def _num_selection_tokens(job: CorrectionJob) -> int:
    return int(TokenShards(job.selection_dir).index["tokens"])


def _correct_task(job: CorrectionJob, threads: int) -> dict[str, Any]:
    """In a process that may have corrected before: an actor's is made for it, which takes longer than a small adapter does."""
    set_threads(threads)
    state = (0, 0)

    def note(done: int, total: int) -> None:
        nonlocal state
        if done == total or 100 * (done - state[0]) >= total:
            state = (done, total)
            write_json(job.progress_path, state)

    return correct_adapter(job, note)


def correct(
    job: CorrectionJob, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """Runs the correction in one task, in another where its worker is lost; see :func:`correct_adapter`."""
    discard(job.progress_path)
    task = resources.task(_correct_task).options(name="correct: the adapter")
    flight = Flight(1, Losses("correct", tell))
    number = flight.add("the adapter", functools.partial(task.remote, job, resources.threads))
    try:
        while flight.pump(_LOOK_S):
            ensure(job.progress_path)
            progress(*(json.loads(job.progress_path.read_text()) if job.progress_path.is_file() else (0, 1)))
    except BaseException:
        flight.cancel()
        raise
    finally:
        discard(job.progress_path)
    return {"num_workers": 1, **flight.results[number]}
