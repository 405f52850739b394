"""Correct: a task takes the emulator's difference back out of the adapter, module by module, and chooses how."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from emloc_ray.core.correction import Candidate, Method
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.atomic import write_json
from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore
from emloc_ray.io.node_cache import discard, ensure
from emloc_ray.modeling.adapter import (
    Adapter,
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
from emloc_ray.modeling.scoring import score_rows
from emloc_ray.stages.cluster import Flight, Progress, Resources, set_threads, silent
from emloc_ray.stages.corrected_modules import CorrectableModule, plug_in, read_modules
from emloc_ray.stages.failures import Losses, Tell, unheard

_LOOK_S = 0.5

# Why adapters of a kind are plugged into the original as trained.
AS_TRAINED = {
    "scaling": "IA³ scales what linears read or give and adds nothing to their weights: there is no update to correct.",
    "prompt": "Virtual tokens are added to what the model reads and nothing to its weights: there is no update to correct,"
    " and none to merge.",
}


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
    modules = _read(job, adapter, progress)
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


def _read(job: CorrectionJob, adapter: Adapter, progress: Progress) -> list[CorrectableModule]:
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    grams = None if job.calibration_dir is None else GramStore(job.calibration_dir)
    modules = {}
    for module in read_modules(adapter, job.specs, original, emulator, grams, job.update_tolerance):
        modules[module.lora.name] = module
        progress(len(modules), len(adapter.names) + len(job.candidates))
    return [modules[name] for name in adapter.names]


def _write(job: CorrectionJob, adapter: Adapter, modules: Sequence[CorrectableModule], chosen: Candidate) -> None:
    """In the method's own form where it is LoRA or nothing is taken out; else as a LoRA adapter of the same linears."""
    if not adapter.is_lora and chosen.method == "none":
        copy_adapter(job.adapter_dir, job.out_dir)
        return
    corrected = [module.corrected(chosen, job.dampening_frac) for module in modules]
    magnitudes = {m.lora.name: found for m in modules if (found := m.magnitude(chosen, job.dampening_frac)) is not None}
    config = adapter.config if adapter.is_lora else lora_form(adapter.config, corrected)
    write_adapter(job.out_dir, config, corrected, magnitudes)


def _selection_losses(
    job: CorrectionJob, adapter: Adapter, modules: Sequence[CorrectableModule], progress: Progress
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
            plug_in(model, corrected, module.magnitude(candidate, job.dampening_frac))
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
