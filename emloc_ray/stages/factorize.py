"""Factorize: one Ray task per group of linears that share a Gram, the largest first, factors written by the task."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from emloc_ray.core.factorization import factorize as factorize_layer
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.checkpoint import Checkpoint, TensorEntry, write_index
from emloc_ray.io.grams import GramStore
from emloc_ray.io.shard_writing import copy_chunks, make_header, stream_shard, write_tensors
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.emulator import write_emulator_config
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.stages.cluster import Progress, Resources, bounded, set_threads, silent

_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class FactorizationJob:
    """Artifact paths and flat settings of the stage."""

    model_dir: Path
    calibration_dir: Path
    out_dir: Path
    dampening_frac: float = 1e-6
    seed: int = 0


@dataclass(frozen=True)
class LayerReport:
    """One factorized layer: its error relative to ``‖W G^½‖`` and the spectrum of ``W G Wᵀ`` (descending)."""

    name: str
    rank: int
    relative_error: float
    solver: str
    spectrum: np.ndarray[Any, np.dtype[np.float32]]
    total_energy: float
    num_tokens: int


def factorize_group(
    job: FactorizationJob, specs: Sequence[LinearSpec], ranks: dict[str, int], path: Path
) -> list[LayerReport]:
    """Factorizes the linears of one group under their shared Gram and writes their factors as one shard.

    Raises:
        NumericsError: where a weight or the Gram holds NaN or Inf, naming the layer.
    """
    checkpoint = Checkpoint(job.model_dir)
    grams = GramStore(job.calibration_dir)
    whitening = Whitening(grams.read(specs[0].name), job.dampening_frac)
    tensors: dict[str, torch.Tensor] = {}
    reports = []
    for spec in specs:
        stored = checkpoint.read(spec.weight_name)
        weight = stored.T if spec.transposed else stored
        result = factorize_layer(weight, whitening, ranks[spec.name], seed=job.seed, name=spec.name)
        tensors[f"{spec.name}.up.weight"] = result.factors.up.to(stored.dtype)
        tensors[f"{spec.name}.down.weight"] = result.factors.down.to(stored.dtype)
        if f"{spec.name}.bias" in checkpoint:
            tensors[f"{spec.name}.up.bias"] = checkpoint.read(f"{spec.name}.bias")
        reports.append(
            LayerReport(
                spec.name,
                ranks[spec.name],
                result.relative_error,
                result.solver,
                result.eigenvalues.float().numpy(),
                result.total_energy,
                grams.num_tokens(spec.name),
            )
        )
    write_tensors(path, tensors)
    return reports


def copy_rest(entries: Sequence[TensorEntry], path: Path) -> None:
    """Writes tensors that the emulator keeps as they are, streamed."""
    stream_shard(path, make_header(entries), ((entry, copy_chunks(entry, _CHUNK_BYTES)) for entry in entries))


def build_emulator(
    job: FactorizationJob,
    groups: Sequence[Sequence[LinearSpec]],
    ranks: dict[str, int],
    base_config: Any,
    resources: Resources,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Writes the emulator: factors of every linear in ``ranks``, all other tensors as they are, config and tokenizer.

    ``groups`` are the linears that share an input; a linear without a rank stays dense.
    """
    job.out_dir.mkdir(parents=True, exist_ok=True)
    work = [[spec for spec in group if spec.name in ranks] for group in groups]
    work = sorted((group for group in work if group), key=_cost, reverse=True)
    rest = _rest_of_shards(job.model_dir, ranks)
    total = len(work) + len(rest)
    files = [job.out_dir / f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]
    factor: Any = ray.remote(_group_task).options(**resources.options())
    copy: Any = ray.remote(copy_rest).options(num_cpus=1)
    submit = [
        functools.partial(factor.remote, job, group, {s.name: ranks[s.name] for s in group}, file, resources.threads)
        for group, file in zip(work, files, strict=False)
    ]
    submit += [
        functools.partial(copy.remote, entries, file) for entries, file in zip(rest, files[len(work) :], strict=True)
    ]
    in_flight = 2 * resources.num_workers
    results = bounded(submit, in_flight, progress, total)
    reports = [report for result in results[: len(work)] for report in result]
    _write_index(job.out_dir, files)
    write_emulator_config(job.out_dir, base_config, ranks)
    copy_tokenizer(job.model_dir, job.out_dir)
    return _summary(job, reports, resources)


def _group_task(
    job: FactorizationJob, group: Sequence[LinearSpec], ranks: dict[str, int], path: Path, threads: int
) -> list[LayerReport]:
    set_threads(threads)
    return factorize_group(job, group, ranks, path)


def _cost(group: Sequence[LinearSpec]) -> float:
    return sum(min(s.out_features, s.in_features) ** 3 + s.num_parameters * s.in_features for s in group)


def _rest_of_shards(model_dir: Path, ranks: dict[str, int]) -> list[list[TensorEntry]]:
    replaced = {f"{name}.{part}" for name in ranks for part in ("weight", "bias")}
    shards = Checkpoint(model_dir).shards
    rest = [[entry for entry in shard.entries if entry.name not in replaced] for shard in shards]
    return [entries for entries in rest if entries]


def _write_index(out_dir: Path, files: Sequence[Path]) -> None:
    from emloc_ray.io.checkpoint import read_shard

    entries = {entry.name: entry for file in files for entry in read_shard(file).entries}
    parameters = sum(int(np.prod(entry.shape)) for entry in entries.values())
    total_size = sum(entry.num_bytes for entry in entries.values())
    write_index(out_dir, {name: entry.file.name for name, entry in entries.items()}, total_size, parameters)


def _summary(job: FactorizationJob, reports: list[LayerReport], resources: Resources) -> dict[str, Any]:
    order = sorted(reports, key=lambda report: report.name)
    if order:
        spectra = {report.name: torch.from_numpy(report.spectrum.copy()) for report in order}
        write_tensors(job.out_dir / "spectra" / "spectra.safetensors", spectra)
    layers = {
        r.name: {"rank": r.rank, "relative_error": r.relative_error, "solver": r.solver, "total_energy": r.total_energy}
        for r in order
    }
    fewest = min((r.num_tokens for r in order), default=None)
    return {
        "num_workers": resources.num_workers,
        "mean_relative_error": float(np.mean([r.relative_error for r in order])) if order else 0.0,
        "layers": layers,
        "fewest_tokens": fewest,
    }
