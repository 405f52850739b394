"""metrics.json, made from the manifest's finished stages."""

import functools
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.architecture import auto_class
from emloc_ray.planning.memory import BASE_BYTES
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.status import current_stages
from emloc_ray.stages.order import STEPS

_LIBRARIES = ("emloc-ray", "ray", "torch", "transformers", "peft", "safetensors", "pyarrow")


def assemble_metrics(
    directory: RunDirectory,
    prepared: Prepared,
    planned: Mapping[str, int] | None = None,
    hardware: Mapping[str, Any] | None = None,
    planned_on_gpus: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """All that the finished stages measured, the memory that was ``planned`` for a worker of each, ``planned_on_gpus`` of it, and
    where they ran; without a stage that finished before an earlier one was redone, or has to be redone, or that the config leaves
    out: its numbers are another run's."""
    manifest = directory.manifest()
    stages = {name: manifest["stages"][name]["result"] for name in current_stages(manifest)}
    metrics: dict[str, Any] = {
        "versions": dict(_versions()),
        "stages": {name: _usage(result) | _accepted(manifest["stages"][name]) for name, result in stages.items()},
        "disk_bytes": _disk_bytes(manifest["stages"][name] for name in stages),
    }
    metrics["auto_class"] = auto_class(prepared.model_config).__name__  # of transformers: what opens the model
    metrics["base_model"] = prepared.original_name
    if hardware:
        metrics["hardware"] = dict(hardware)
    if planned:
        metrics["planned_memory"] = dict(planned)
        metrics["planned_imports_bytes"] = BASE_BYTES
    if planned_on_gpus:
        metrics["planned_gpu_bytes"] = dict(planned_on_gpus)
    for stage in STEPS:
        if stage.name in stages:
            metrics |= stage.metrics(prepared, stages)
    return metrics


@functools.cache  # each is looked up in a file of the library's own
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def _disk_bytes(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of the files of stages that are still there, by the run directory's folders."""
    held: Counter[str] = Counter()
    for entry in entries:
        for path, content in ({} if entry.get("dropped") else entry["outputs"]).items():
            held[path.partition("/")[0]] += content["size"]
    return dict(held)


def _usage(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage used, ``wall_s`` in all its tries: only linking where it came from the cache (``taken_from``)."""
    taken = {"taken_from": result["taken_from"]} if result.get("taken_from") else {}
    return {**result["usage"], "num_workers": result.get("num_workers", 1), **taken}


def _accepted(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The versions that a stage was made with, where it was taken as it is under others."""
    return {"versions": entry.get("versions")} if "accepted" in entry else {}
