"""Rivals whose adapter begins where it makes up for what rounding left, instead of at zero.

``weights`` begins at the best ``B A`` of the adapter's rank for ``‖W − W_E − s B A‖_F``: LoftQ (arXiv 2310.08659) with one
iteration, as PEFT's default is. ``activations`` begins at the best under the calibration's Gram, ``‖(W − W_E − s B A) G^½‖_F``:
CLoQ (arXiv 2501.18475). Both serve the emulator with the adapter. What the training adds to the start is the original's adapter.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablations.config import Start
from emloc_ray.config.schema import RunConfig
from emloc_ray.core.factorization import factorize
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter, LoraModule, lora_config, write_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.emulator_weights import emulator_weight
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs.steps import resources_of
from emloc_ray.stages.context import Context
from emloc_ray.stages.evaluate.evaluate import EvaluationJob, evaluate_slice
from emloc_ray.stages.evaluate.stage import EVALUATE, evaluation_job
from emloc_ray.stages.finetune.finetune import finetune
from emloc_ray.stages.finetune.stage import FINETUNE, finetune_job
from emloc_ray.stages.importing import original_dir
from emloc_ray.stages.ray.losses import Losses, Tell
from emloc_ray.stages.ray.tasks import bounded


def trained_from(start: Start, run: RunConfig, tell: Tell) -> dict[str, float]:
    """Trains an adapter from its start on the emulator of a finished run. Returns the held-out losses of the emulator with that
    adapter and of the original with what training added to the start, and the training's seconds."""
    prepared = prepare(run)
    context = Context(prepared, original_dir(prepared))
    with tempfile.TemporaryDirectory(dir=run.run_dir) as folder:
        begun, trained, added = (Path(folder) / name for name in ("begun", "trained", "added"))
        job = replace(finetune_job(context, f"from-{start}"), storage_dir=Path(folder) / "training", out_dir=trained)
        write_start(begun, start, context, job.adapter)
        began_at = time.monotonic()
        finetune(replace(job, start_dir=begun), resources_of(FINETUNE, prepared), tell=tell)
        took = time.monotonic() - began_at
        write_added(added, Adapter(begun), Adapter(trained))
        scoring = replace(evaluation_job(context), trained_adapter_dir=trained, corrected_adapter_dir=added)
        losses = losses_of(replace(scoring, variants=("emulator_adapter", "corrected")), prepared, tell)
    return {**losses, "training_s": took}


def losses_of(job: EvaluationJob, prepared: Prepared, tell: Tell) -> dict[str, float]:
    """The held-out loss of each variant of an evaluation, one model after another; nothing is generated."""
    task = resources_of(EVALUATE, prepared).task(evaluate_slice)
    job = replace(job, num_generations=0, num_exact_match=0)
    tasks = [(f"the {family} model", functools.partial(task.remote, job, family, 0, 1)) for family in job.families]
    results = itertools.chain.from_iterable(bounded(tasks, 1, Losses("evaluate", tell)))
    return {result.variant: result.score.metrics()["loss"] for result in results}


def write_start(directory: Path, start: Start, context: Context, settings: dict[str, Any]) -> None:
    """Writes the start as an adapter in PEFT's format, on all linears; ``settings`` are the job's."""
    original, emulator = Checkpoint(context.model_dir), Checkpoint(context.emulator_dir)
    grams = GramStore(context.path("calibration")) if start == "activations" else None
    modules = []
    for spec in context.specs():
        stored = emulator_weight(emulator, spec.name, spec.in_features)
        rest = spec.read_weight(original).double() - (0.0 if stored is None else stored.rows().double())
        gram = None if grams is None else grams.read(spec.name)
        modules.append(closing(spec.name, rest, gram, settings["r"], settings["lora_alpha"] / settings["r"]))
    config = {**adapter_config(**settings).to_dict(), "inference_mode": False}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_adapter(directory, config, modules)


def closing(name: str, rest: Tensor, gram: Tensor | None, r: int, scale: float) -> LoraModule:
    """The best ``s B A`` of rank r for ``rest (out, in)`` under ``gram (in, in)``, or under none. Both factors hold the roots of
    its singular values."""
    whitening = Whitening.identity(rest.shape[1]) if gram is None else Whitening(gram, name=name)
    up, down = factorize(rest, whitening, r, solver="exact", name=name).factors
    left, values, right = torch.linalg.svd(down.double(), full_matrices=False)  # the columns of up are orthonormal
    roots = values.sqrt()
    return LoraModule(name, (roots[:, None] * right).float(), (up.double() @ (left * roots) / scale).float(), scale)


def write_added(directory: Path, begun: Adapter, trained: Adapter) -> None:
    """Writes ``s (B A − B_0 A_0)``, of twice the rank, as one adapter."""
    modules = []
    for name in trained.names:
        before, after = begun.module(name), trained.module(name)
        lora_a = torch.cat([after.lora_a, before.lora_a])
        lora_b = torch.cat([after.scale * after.lora_b, -before.scale * before.lora_b], dim=1)
        modules.append(LoraModule(name, lora_a, lora_b, 1.0))
    write_adapter(directory, lora_config(trained.config, modules), modules)
