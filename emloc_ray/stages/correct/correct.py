"""Correct: a task takes the emulator's difference back out of the adapter, module by module, and chooses how."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from emloc_ray.core.correction import Candidate, Method
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.selection import affordable
from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.io.store.atomic import write_json
from emloc_ray.io.store.node_cache import discard, ensure
from emloc_ray.modeling.adapter import attach_adapter, detach_adapter, load_adapter
from emloc_ray.modeling.adapter_files import Adapter, copy_adapter, lora_form, lora_form_settings, write_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.scoring import RowLosses, losses_by_row
from emloc_ray.stages.correct.modules import CorrectableModule, plug_in, read_modules
from emloc_ray.stages.correct.search import ENOUGH_ROWS, NUM_FURTHER, Measure, search
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, bounded, silent

# Why adapters of a kind are plugged into the original as trained.
AS_TRAINED = {
    "scaling": "IA³ scales what linears read or give and adds nothing to their weights: there is no update to correct.",
    "prompt": "Virtual tokens are added to what the model reads and nothing to its weights: there is no update to correct,"
    " and none to merge.",
}


def candidates(method: str, clamp: float | None, strength: float) -> list[Candidate]:
    """The candidates of a ``correction`` section: one, or with ``auto`` those that the search begins with, ``none`` and
    then the likeliest first."""
    if method != "auto":
        return [Candidate(m, clamp, strength) for m in get_args(Method) if m == method]
    methods: tuple[Method, ...] = ("covariance", "projection")
    clamped = [Candidate(methods[0], 1.0), *(Candidate(method) for method in methods)]
    return [Candidate("none"), *clamped]


@dataclass(frozen=True)
class CorrectionJob:
    """Artifact paths and flat settings of the stage.

    Where there is more than one candidate, ``none`` is the first. ``num_further`` strengths of the best are tried after
    them. ``max_tokens`` bounds what scoring all may read (None: all selection rows).
    """

    model_dir: Path
    emulator_dir: Path
    calibration_dir: Path | None
    adapter_dir: Path
    out_dir: Path
    selection_dir: Path
    specs: tuple[LinearSpec, ...]
    candidates: tuple[Candidate, ...]
    num_further: int = NUM_FURTHER
    max_tokens: int | None = None
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
    chosen, told = job.candidates[0], _untried(job.candidates)
    if len(job.candidates) > 1:
        chosen, told = _chosen(job, adapter, modules, progress)
    _write(job, adapter, modules, chosen)
    shortfalls = {m.lora.name: found for m in modules if (found := m.shortfalls(chosen, job.dampening_frac))}
    result = {**asdict(chosen), **told, "modules": shortfalls}
    if not adapter.is_lora:
        ranks = [m.lora.lora_a.shape[0] for m in modules]
        result["lora_form"] = {"largest_lack": max(m.lack for m in modules), "mean_rank": sum(ranks) / len(ranks)}
    return result


@exact_float32()
def _read(job: CorrectionJob, adapter: Adapter, progress: Progress) -> list[CorrectableModule]:
    original, emulator = Checkpoint(job.model_dir), Checkpoint(job.emulator_dir)
    grams = None if job.calibration_dir is None else GramStore(job.calibration_dir)
    modules = {}
    for module in read_modules(adapter, job.specs, original, emulator, grams, job.update_tolerance):
        modules[module.lora.name] = module
        progress(len(modules), len(adapter.names) + len(job.candidates))
    return [modules[name] for name in adapter.names]


@exact_float32()
def _write(job: CorrectionJob, adapter: Adapter, modules: Sequence[CorrectableModule], chosen: Candidate) -> None:
    """In the method's own form where it is LoRA or nothing is taken out; else as a LoRA adapter of the same linears."""
    if not adapter.is_lora and chosen.method == "none":
        copy_adapter(job.adapter_dir, job.out_dir)
        return
    corrected = [module.corrected(chosen, job.dampening_frac) for module in modules]
    magnitudes = {m.lora.name: found for m in modules if (found := m.magnitude(chosen, job.dampening_frac)) is not None}
    config = adapter.config if adapter.is_lora else lora_form(adapter.config, corrected)
    write_adapter(job.out_dir, config, corrected, magnitudes)


def _untried(candidates: Sequence[Candidate]) -> dict[str, Any]:
    return {"selection_tokens": 0, "candidates": [{**asdict(candidate), "loss": None} for candidate in candidates]}


def _chosen(
    job: CorrectionJob, adapter: Adapter, modules: Sequence[CorrectableModule], progress: Progress
) -> tuple[Candidate, dict[str, Any]]:
    """The best candidate on as many of the selection rows as ``max_tokens`` allow, and what is told of all."""
    shards = TokenShards(job.selection_dir)
    rows = [shards.row(position) for position in range(len(shards))]
    random.Random(0).shuffle(rows)  # files may be sorted by what their rows are of
    lengths = [len(row) for row in rows]
    begun, count = affordable(lengths, job.max_tokens, len(job.candidates), job.num_further, ENOUGH_ROWS)
    if count == 0:
        note = f"Fine-tuning read too little for a choice to cost {job.max_tokens} tokens: set correction.max_share higher."
        return job.candidates[0], {**_untried(job.candidates[:1]), "note": note}
    measure = _measure(job, adapter, modules, rows[:count])
    total, tried = len(modules) + begun + job.num_further, 0

    def measured(candidate: Candidate) -> RowLosses:
        nonlocal tried
        losses, tried = measure(candidate), tried + 1
        progress(len(modules) + tried, total)
        return losses

    choice = search(job.candidates[:begun], measured, job.num_further)
    progress(total, total)
    told = {
        "selection_rows": count,
        "selection_tokens": sum(lengths[:count]),
        "scored_tokens": sum(lengths[:count]) * tried,
        "max_tokens": job.max_tokens,
        "candidates": choice.told(),
    }
    return choice.candidates[choice.chosen], told


def _measure(
    job: CorrectionJob, adapter: Adapter, modules: Sequence[CorrectableModule], rows: Sequence[Tokens]
) -> Measure:
    """Of candidates one after another, on one model: first what is as trained, then, of other methods than LoRA, in LoRA's
    form."""
    model = load_adapter(load_model(job.model_dir, **job.model_options), job.adapter_dir).eval()
    is_lora = adapter.is_lora
    images = ImageInputs(job.model_dir, job.model_options)

    def measure(candidate: Candidate) -> RowLosses:
        nonlocal model, is_lora
        if not is_lora and candidate.method != "none":
            settings = lora_form_settings([module.lora for module in modules])
            form = adapter_config(**settings, task_type=adapter.config["task_type"])
            model, is_lora = attach_adapter(detach_adapter(model), form).eval(), True
        for module in modules if is_lora else ():
            corrected = module.corrected(candidate, job.dampening_frac)
            plug_in(model, corrected, module.magnitude(candidate, job.dampening_frac))
        return losses_by_row(
            model,
            rows,
            batch_size=job.batch_size,
            loss_on=job.loss_on,
            pad_token_id=job.pad_token_id,
            images=images,
        )

    return measure


def _correct_task(job: CorrectionJob) -> dict[str, Any]:
    """In a process that may have corrected before: an actor's is made for it, which takes longer than a small adapter does."""
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
    submit = functools.partial(task.remote, job)

    def look(_done: int, _total: int) -> None:
        ensure(job.progress_path)
        progress(*(json.loads(job.progress_path.read_text()) if job.progress_path.is_file() else (0, 1)))

    try:
        [found] = bounded([("the adapter", submit)], 1, Losses("correct", tell), look)
    finally:
        discard(job.progress_path)
    return {"num_workers": 1, **found}
