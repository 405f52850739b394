"""Factorize: one Ray task per group of linears that share a Gram, the largest first, factors written by the task."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from emloc_ray.core.factorization import Factorization, relative_error
from emloc_ray.core.factorization import factorize as factorize_layer
from emloc_ray.core.nested import extended, truncated
from emloc_ray.core.pivoting import pivot, stored_product
from emloc_ray.core.ranks import Storage
from emloc_ray.core.two_sided import extended_two_sided, factorize_two_sided
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.checkpoint import Checkpoint, read_shard, write_index
from emloc_ray.io.grams import GramStore, StoredGram, drop_grams
from emloc_ray.io.node_cache import sizes
from emloc_ray.io.shard_writing import write_tensors
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.emulator import write_emulator_config
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.modeling.quantization import dequantize, is_packed, num_elements, quantization_config, quantize
from emloc_ray.stages.cluster import Flight, Progress, Resources, set_threads, silent
from emloc_ray.stages.failures import Losses, Tell, unheard
from emloc_ray.stages.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.layer_reports import (
    LAYERS,
    Basis,
    LayerReport,
    read_reports,
    sampled,
    spectra_file,
    write_spectra,
)

_LOOK_S = 1.0
_CONNECTIONS = 8


@dataclass(frozen=True)
class FactorizationJob:
    """Artifact paths and flat settings of the stage.

    ``groups`` are the linears that share an input; those without a rank in ``ranks`` stay dense. ``basis_dir`` is an
    emulator of the same weights and Grams, of any ranks: its factors are cut, or added to. ``renamed`` are the tensors
    whose names in the checkpoint are not the model's own, which the emulator's are. ``in_4bit`` are the linears that are
    stored so, as factors or dense, of which those in ``without_gram`` have none; ``kept_wide`` are those elsewhere in the
    model that are not. ``gradients_dir`` holds the sums of gradients that weigh outputs, where factors are to keep the
    model's predictions instead of each layer's outputs. ``by_weights``: factors are the weights' own truncated SVD, whose
    errors alone are measured under the Grams. ``storage`` is how they are stored.
    """

    model_dir: Path
    out_dir: Path
    groups: tuple[tuple[LinearSpec, ...], ...]
    ranks: dict[str, int]
    dampening_frac: float = 1e-6
    seed: int = 0
    basis_dir: Path | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    in_4bit: tuple[str, ...] = ()
    without_gram: tuple[str, ...] = ()
    kept_wide: tuple[str, ...] = ()
    gradients_dir: Path | None = None
    gradient_dampening_frac: float = 1e-2
    by_weights: bool = False
    storage: Storage = "factors"


def _cost(group: Sequence[LinearSpec]) -> float:
    return sum(min(s.out_features, s.in_features) ** 3 + s.num_parameters * s.in_features for s in group)


def factorize_group(job: FactorizationJob, specs: Sequence[LinearSpec], gram: StoredGram | None, path: Path) -> None:
    """Factorizes the linears of one group under their shared Gram; writes their spectra, then their factors as one shard.

    Those without a rank are only put into 4 bits; without a Gram all are, and no error is reported.

    Raises:
        NumericsError: where a weight or the Gram holds NaN or Inf, naming the layer.
    """
    checkpoint = Checkpoint(job.model_dir)
    basis = Basis(job.basis_dir)
    whitening = functools.cache(functools.partial(_whitening, gram, job.dampening_frac))
    alike = functools.cache(functools.partial(Whitening.identity, specs[0].in_features))
    inputs = alike if job.by_weights else whitening
    gradients = None if job.gradients_dir is None else GramStore(job.gradients_dir)
    tensors: dict[str, torch.Tensor] = {}
    spectra: dict[str, torch.Tensor] = {}
    reports = []
    for spec in specs:
        dtype = checkpoint.entry(spec.weight_rows[0].name).dtype
        weight = functools.cache(functools.partial(spec.read_weight, checkpoint))
        outputs = None  # before the next one is read: three matrices of the outputs' order
        outputs = _output_whitening(job, spec, gradients) if spec.name in job.ranks else None
        result = _factorized(job, spec, weight, inputs, outputs, basis) if spec.name in job.ranks else None
        parts, order = ({"": weight()}, None) if result is None else _parts(result, job.storage)
        held = {
            part: quantize(made, dtype, spec.name) if spec.name in job.in_4bit else {"weight": made.to(dtype)}
            for part, made in parts.items()
        }
        tensors |= {f"{spec.name}{part}.{key}": found for part, some in held.items() for key, found in some.items()}
        if result is not None:
            spectra[spec.name] = result.eigenvalues.float()
            if spec.bias_rows.name in checkpoint:
                holder = f"{spec.name}.up" if order is None else spec.name
                tensors[f"{holder}.bias"] = spec.bias_rows.entry(checkpoint).read_rows()
        if order is not None:
            tensors[f"{spec.name}.order"] = order
        if gram is not None:
            weighed = outputs is not None or job.by_weights
            stored = functools.partial(_stored, list(held.values()), order)
            anew = weighed or spec.name in job.in_4bit
            reports.append(_report(spec, result, stored if anew else None, weight, whitening, gram.num_tokens, weighed))
    write_tensors(spectra_file(path), spectra, {LAYERS: json.dumps([asdict(report) for report in reports])})
    write_tensors(path, tensors)  # last: with it, the group is done


def _whitening(gram: StoredGram | None, dampening_frac: float) -> Whitening:
    """Without a Gram nothing asks for it.

    Of linears that calibration brought no token to, as a vision tower's without images, it is as if all inputs were alike:
    their best factors are then those of the weight alone.
    """
    assert gram is not None
    found = gram.read()
    inputs = found if gram.num_tokens else torch.eye(len(found), dtype=found.dtype)
    return Whitening(inputs, dampening_frac, name=gram.name)


def _factorized(
    job: FactorizationJob,
    spec: LinearSpec,
    weight: Callable[[], torch.Tensor],
    inputs: Callable[[], Whitening],
    outputs: Whitening | None,
    basis: Basis,
) -> Factorization:
    rank, known = job.ranks[spec.name], basis.layer(spec.name)
    if known is not None and known.factors.up.shape[1] >= rank:
        return truncated(known, rank)
    if outputs is None:
        if known is None:
            return factorize_layer(weight(), inputs(), rank, seed=job.seed, name=spec.name)
        return extended(weight(), inputs(), known, rank, seed=job.seed, name=spec.name)
    if known is None:
        return factorize_two_sided(weight(), inputs(), outputs, rank, seed=job.seed, name=spec.name)
    return extended_two_sided(weight(), inputs(), outputs, known, rank, seed=job.seed, name=spec.name)


def _output_whitening(job: FactorizationJob, spec: LinearSpec, gradients: GramStore | None) -> Whitening | None:
    """What weighs the outputs of a linear; None where each counts as it is."""
    if gradients is None:
        return None
    name = f"the gradients of what {spec.name} gives"
    return Whitening(gradients.read(spec.name), job.gradient_dampening_frac, name=name)


def _parts(result: Factorization, storage: Storage) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """A layer's factors by what follows its name, and where they are pivoted the places of their rows."""
    if storage == "factors":
        return {".up": result.factors.up, ".down": result.factors.down}, None
    up, down, order = pivot(result.factors)
    return {".up": up, ".down": down}, order


def _stored(held: Sequence[dict[str, torch.Tensor]], order: torch.Tensor | None) -> torch.Tensor:
    """The weight that is stored as these tensors, in float32."""
    first, *others = [(dequantize(some) if is_packed(some) else some["weight"]).float() for some in held]
    return stored_product(first, others[0], order) if others else first


def _report(
    spec: LinearSpec,
    result: Factorization | None,
    stored: Callable[[], torch.Tensor] | None,
    weight: Callable[[], torch.Tensor],
    whitening: Callable[[], Whitening],
    num_tokens: int,
    weighed: bool,
) -> LayerReport:
    """What is told of a layer; the error of what is ``stored`` is taken anew where that is in 4 bits, or where factors are
    ``weighed`` and the factorization's own is another."""
    error, energy = (0.0, 0.0) if result is None else (result.relative_error, result.total_energy)
    if stored is not None:
        error, direct = relative_error(weight(), stored(), whitening(), name=spec.name)
        energy = energy or direct
    rank = min(spec.out_features, spec.in_features) if result is None else result.factors.up.shape[1]
    solver = "dense" if result is None else result.solver
    own = result.relative_error if result is not None and weighed else None
    spectrum = () if result is None else sampled(result.eigenvalues, result.total_energy)
    return LayerReport(spec.name, rank, error, solver, energy, num_tokens, own, spectrum)


class EmulatorBuild:
    """Writes an emulator, shard by shard; shards that are there already are kept.

    Groups may be added as soon as their Grams are, while calibration goes on; :meth:`finish` does all that is left.
    """

    def __init__(self, job: FactorizationJob, resources: Resources, drop: bool = False, tell: Tell = unheard) -> None:
        """``drop``: empty a file of Grams once all that was added with it is factorized."""
        self.job, self.resources, self.drop = job, resources, drop
        self._shared_job = ray.put(job)  # once, not with every task
        work = sorted(_rewritten(job), key=_cost, reverse=True)
        rest = rest_of_shards(job)
        total = len(work) + len(rest)
        self.files = [job.out_dir / f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]
        self._file_of = dict(zip(work, self.files, strict=False))
        self._rest = list(zip(rest, self.files[len(work) :], strict=True))
        self._work_of = {spec.name: group for group in work for spec in group}
        self._measured = self._work_of.keys() - set(job.without_gram)
        self._flight = Flight(resources.num_workers, Losses("factorize", tell))
        self._used: dict[Path, list[Path]] = {}
        self._started: set[Path] = set()
        there, own = set(sizes(job.out_dir)), set(self._file_of.values())
        self._done = {file for file in there if file not in own or spectra_file(file) in there}
        self._error: Exception | None = None

    def add(self, grams: Path, names: Sequence[str]) -> None:
        """Factorizes the groups whose Grams, each named by one of its linears, are in a file now."""
        groups = {name: group for group in self.job.groups for name in (spec.name for spec in group)}
        found = {}
        for name in names:
            work = next((self._work_of[spec.name] for spec in groups[name] if spec.name in self._measured), None)
            if work is not None:
                found[work] = StoredGram(grams, name)
        self._used[grams] = [self._file_of[work] for work in found]
        for work in sorted(found, key=_cost, reverse=True):
            self._start(work, found[work])
        self.pump()

    def _start(self, work: tuple[LinearSpec, ...], gram: StoredGram | None) -> None:
        file = self._file_of[work]
        if file in self._started or file in self._done:
            return
        self._started.add(file)
        name = " and ".join(spec.name for spec in work)
        task = self.resources.task(_group_task).options(name=f"factorize: {name}")
        submit = functools.partial(task.remote, self._shared_job, work, gram, file, self.resources.threads)
        self._flight.add(name, submit)

    def pump(self, timeout: float | None = 0) -> bool:
        """Starts what may start; whether more is left. What fails is raised by :meth:`finish`, so that calibration, which
        goes on meanwhile, is not lost with it."""
        if self._error is not None:
            return False
        try:
            left = self._flight.pump(timeout)
            self._done.update(self._flight.results.values())
            for grams, files in list(self._used.items()):
                if self.drop and all(file in self._done for file in files):
                    drop_grams(grams)
                    del self._used[grams]
            return left
        except Exception as error:
            self._error = error
            return False

    def finish(self, calibration_dir: Path, base_config: Any, progress: Progress = silent) -> dict[str, Any]:
        """Writes what is left: factors of every linear in ``job.ranks``, others in 4 bits where the job says so, all other
        tensors as they are, config, tokenizer.

        ``base_config`` is the original's. Raises what a task raised, and NumericsError as :func:`factorize_group`.
        """
        left = [w for w, file in self._file_of.items() if file not in self._started | self._done]
        grams = functools.cache(lambda: GramStore(calibration_dir))
        for work in left:
            measured = work[0].name in self._measured
            self._start(work, grams().stored(work[0].name) if measured else None)
        copy = Resources().task(copy_rest)
        for entries, file in self._rest:
            if file not in self._done:
                task = copy.options(name=f"factorize: {file.name}")
                self._flight.add(f"shard {file.name}", functools.partial(task.remote, entries, file))
        try:
            while self.pump(_LOOK_S):
                progress(len(self.files) - self._flight.left, len(self.files))
            if self._error is not None:
                raise self._error
            progress(len(self.files), len(self.files))
        except BaseException:
            self._flight.cancel()
            raise
        total_size = index_shards(self.job.out_dir, self.files)
        in_4bit = None
        if self.job.in_4bit:
            in_4bit = quantization_config(base_config.dtype or torch.float32, self.job.kept_wide)
        write_emulator_config(self.job.out_dir, base_config, self.job.ranks, in_4bit, self.job.storage)
        copy_tokenizer(self.job.model_dir, self.job.out_dir)
        reports = _read_all_reports(list(self._file_of.values()))
        write_spectra(self.job.out_dir, reports)
        return {**_summary(reports, self.resources), "bytes": total_size}


def _rewritten(job: FactorizationJob) -> list[tuple[LinearSpec, ...]]:
    """The linears that are factorized or put into 4 bits: those of one Gram together, and those without one."""
    written = {*job.ranks, *job.in_4bit}
    without_gram = set(job.without_gram)
    found = []
    for group in job.groups:
        for apart in (False, True):
            found.append(tuple(s for s in group if s.name in written and (s.name in without_gram) == apart))
    return [group for group in found if group]


def _group_task(
    job: FactorizationJob, specs: Sequence[LinearSpec], gram: StoredGram | None, path: Path, threads: int
) -> Path:
    set_threads(threads)
    factorize_group(job, specs, gram, path)
    return path


def index_shards(out_dir: Path, files: Sequence[Path]) -> int:
    """Writes the index of the shards in ``out_dir``; returns the bytes of all tensors."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        entries = {entry.name: entry for shard in pool.map(read_shard, files) for entry in shard.entries}
    parameters = sum(num_elements(entry.name, entry.dtype, entry.shape) for entry in entries.values())
    total_size = sum(entry.num_bytes for entry in entries.values())
    write_index(out_dir, {name: entry.file.name for name, entry in entries.items()}, total_size, parameters)
    return total_size


def _read_all_reports(files: Sequence[Path]) -> list[LayerReport]:
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        found = list(pool.map(read_reports, files))
    return sorted((report for some in found for report in some), key=lambda report: report.name)


def _summary(reports: Sequence[LayerReport], resources: Resources) -> dict[str, Any]:
    layers = {r.name: _told(r) for r in reports}
    return {
        "num_workers": resources.num_workers,
        "mean_relative_error": float(np.mean([r.relative_error for r in reports])) if reports else 0.0,
        "layers": layers,
        "fewest_tokens": min((r.num_tokens for r in reports if r.num_tokens), default=None),
        "unseen": [r.name for r in reports if not r.num_tokens],
    }


def _told(report: LayerReport) -> dict[str, Any]:
    told = {key: getattr(report, key) for key in ("rank", "relative_error", "solver", "total_energy")}
    return told | ({} if report.weighed_error is None else {"weighed_error": report.weighed_error})
