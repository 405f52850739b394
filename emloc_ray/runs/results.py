"""metrics.json, put together from what the manifest says of each finished stage."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emloc_ray.config.steps import STEPS
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.node_cache import sizes
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.status import older_stages

_ARTIFACTS = (
    "model",
    "data",
    "calibration",
    "gradients",
    "allocation",
    "emulator",
    "emulator_healed",
    "adapter_emulator",
    "adapter",
    "merged",
)
# Of a loss in bfloat16 on different machines.
_SAME_LOSS = 1e-2
_LIBRARIES = ("emloc-ray", "ray", "torch", "transformers", "peft", "safetensors", "pyarrow")


def assemble_metrics(
    directory: RunDirectory,
    prepared: Prepared,
    planned: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Everything that the finished stages measured, beside the memory that was ``planned`` for a worker of each.

    A stage that was finished before one ahead of it was redone, or is to be redone, speaks of another run until its inputs
    are found unchanged: it is left out.
    """
    layout = prepared.layout
    stages = _current_stages(directory.manifest())
    metrics: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "stages": {name: _usage(result) for name, result in stages.items()},
        "disk_bytes": {name: sum(held) for name in _ARTIFACTS if (held := sizes(directory.path(name)).values())},
    }
    if planned:
        metrics["planned_memory"] = dict(planned)
    if "data" in stages:
        metrics["data"] = stages["data"]["splits"]
    if "calibrate" in stages:
        found = stages["calibrate"]
        told = ("num_tokens", "num_shards", "mode", "waves", "experts")
        metrics["calibration"] = {key: found[key] for key in told if key in found}
    if "allocate" in stages:
        found = {**stages["allocate"]}
        for key in ("usage", "num_workers", "taken_from"):
            found.pop(key, None)
        metrics["allocation"] = found
    if "factorize" in stages:
        metrics["emulator"] = _emulator(prepared, layout.as_made(stages["factorize"]), stages)
    if "heal" in stages:
        shown = ("steps", "train_loss", "history", "healed_layers", "teacher_rows", "teacher_bytes")
        metrics["healing"] = {key: stages["heal"][key] for key in shown}
    if "finetune" in stages:
        metrics["finetune"] = {key: stages["finetune"][key] for key in ("steps", "train_loss", "history")}
    if "correct" in stages:
        metrics["correction"] = {k: v for k, v in stages["correct"].items() if k not in ("usage", "num_workers")}
    if "evaluate" in stages:
        metrics |= {key: stages["evaluate"][key] for key in ("evaluation", "exact_match", "generations")}
        bound = prepared.config.evaluation.upper_bound
        if bound is not None:
            gap = gap_closed(metrics["evaluation"], bound)
            metrics |= {} if gap is None else {"gap_closed": gap}
    return metrics


def _usage(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage took; of one that came from the cache (``taken_from`` a run) that is only the linking, of one that went on
    from what an earlier try had left (``resumed``) only the rest."""
    partly = {key: result[key] for key in ("taken_from", "resumed") if result.get(key)}
    return {**result["usage"], "num_workers": result.get("num_workers", 1), **partly}


def _emulator(prepared: Prepared, layout: Layout, stages: Mapping[str, Any]) -> dict[str, Any]:
    """What was kept of the original, layer by layer and in all, as it is after healing."""
    saved = layout.parameters_targeted - layout.parameters_factorized
    found: dict[str, Any] = {
        "compression_ratio": prepared.config.emulator.compression_ratio,
        "parameters_kept": layout.parameters_factorized / max(layout.parameters_targeted, 1),
        "parameters": layout.num_parameters - saved,
        "original_parameters": layout.num_parameters,
        "mean_relative_error": stages["factorize"]["mean_relative_error"],
        "quantization": prepared.config.emulator.quantization,
        "allocation": layout.allocation if prepared.layout.allocated else "uniform",
        "objective": layout.objective,
        "storage": layout.storage,
        "layers": _with_shares(stages["factorize"]["layers"], layout),
    }
    made_by = stages.get("heal", stages["factorize"])
    return {**found, "bytes": made_by["bytes"]} if "bytes" in made_by else found


def _with_shares(layers: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Each layer with the share of its parameters that the emulator keeps; beside them those that an allocation left dense."""
    specs = {spec.name: spec for spec in layout.specs}
    free = layout.free if layout.ranks and layout.allocation != "uniform" else ()
    dense = {
        name: {"rank": min(specs[name].out_features, specs[name].in_features), "relative_error": 0.0, "solver": "dense"}
        for name in free
    }
    shares = {name: layout.kept(spec) / spec.num_parameters for name, spec in specs.items()}
    return {name: {**layer, "share": shares[name]} for name, layer in {**dense, **layers}.items()}


def _current_stages(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    entries, older = manifest["stages"], older_stages(manifest)
    return {name: entries[name]["result"] for name in STEPS if name in entries and name not in older}


def gap_closed(evaluation: dict[str, Any], upper_bound: str | Path) -> dict[str, Any] | None:
    """``(original − corrected) / (original − LoRA on the original)`` in held-out loss.

    ``upper_bound`` is the run directory of the same task at ratio 1.0. None where it gained nothing, so that there is no gap,
    and where it was not held against the same rows of the same model.
    """
    other = bound_scores(evaluation, upper_bound)
    if other is None:
        return None
    original, bound = evaluation["original"]["loss"], other["corrected"]["loss"]
    gap = original - bound
    if gap <= 0:
        return None
    there = [name for name in ("uncorrected", "corrected", "merged") if name in evaluation]
    shares: dict[str, Any] = {name: (original - evaluation[name]["loss"]) / gap for name in there}
    return {"upper_bound": str(upper_bound), "upper_bound_loss": bound, **shares}


def bound_scores(evaluation: Mapping[str, Any], upper_bound: str | Path) -> Mapping[str, Any] | None:
    """The evaluation of the run ``upper_bound``, None where it has none by now, or its original's loss is of other tokens."""
    other: Mapping[str, Any] | None = RunDirectory(upper_bound).metrics().get("evaluation")
    if other is None:
        return None
    one, another = evaluation["original"], other["original"]
    alike = math.isclose(one["loss"], another["loss"], rel_tol=_SAME_LOSS)
    return other if alike and one["num_tokens"] == another["num_tokens"] else None
