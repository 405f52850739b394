"""Factorize: one Ray task per group of linears that share a Gram, the largest first, factors written by the task."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from emloc_ray.core.factorization import Factorization, relative_error
from emloc_ray.core.factorization import factorize as factorize_layer
from emloc_ray.core.gram import unpack_triangle
from emloc_ray.core.integer_forms import IntegerForms, factor_bits
from emloc_ray.core.pivoting import pivot
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.products import is_finite
from emloc_ray.core.quantization import DAMPENING_FRAC, quantize_factors, quantize_with_factors
from emloc_ray.core.quantization import quantize as quantize_integers
from emloc_ray.core.ranks import Storage
from emloc_ray.core.rounding import rounding_energy
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.whitening import Whitening
from emloc_ray.data.ahead import read_ahead
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard, write_index
from emloc_ray.io.formats.grams import GramStore, StoredGram
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.node_cache import existing, sizes
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.emulator import write_emulator_config
from emloc_ray.modeling.emulator_weights import linear_weight, num_elements
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.modeling.nf4 import quantization_config, quantize_nf4
from emloc_ray.stages.factorize.group_tensors import GroupTensors, read_group
from emloc_ray.stages.factorize.job import FactorizationJob, group_cost
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.factorize.layer_reports import (
    LAYERS,
    LayerReport,
    read_reports,
    sampled,
    spectra_file,
    write_spectra,
)
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, bounded, bundles, silent

Parts = dict[str, dict[str, Tensor]]  # a linear's tensors by part, which is the end of a name, such as ``.up``
GroupWork = tuple[Sequence[LinearSpec], StoredGram | None, Path]  # linears, their Gram, the shard of their factors
_CONNECTIONS = 8
_ROUNDING_SHARE = 1e-2  # of a layer's residual energy: above it rounding is measured, not estimated


@exact_float32()
def factorize_group(
    job: FactorizationJob,
    specs: Sequence[LinearSpec],
    gram: StoredGram | None,
    path: Path,
    device: torch.device | str = "cpu",
    tensors_read: GroupTensors | None = None,
    checkpoint: Checkpoint | None = None,
    gradients: GramStore | None = None,
) -> None:
    """Factorizes the linears of one group under their shared Gram; writes their spectra, then their factors as one shard.

    Those without a rank are only put into few bits; without a Gram all are, and no error is reported. It computes on
    ``device``; what was read ahead is taken from ``tensors_read``; ``checkpoint`` and ``gradients`` are the job's, where they
    are open. Raises NumericsError where a weight or the Gram holds NaN or Inf, naming the layer.
    """
    group = _Group(job, specs, gram, device, tensors_read, checkpoint or Checkpoint(job.model_dir), gradients)
    tensors: dict[str, Tensor] = {}
    spectra: dict[str, Tensor] = {}
    reports = []
    for spec in specs:
        linear = _Linear(group, spec)  # in place of the one before: three matrices of the outputs' order go with it
        tensors |= linear.tensors()
        if linear.factorization is not None:
            spectra[spec.name] = linear.factorization.eigenvalues.float().cpu()
        if gram is not None:
            reports.append(linear.report(gram.num_tokens))
    write_tensors(spectra_file(path), spectra, {LAYERS: json.dumps([asdict(report) for report in reports])})
    write_tensors(path, tensors)  # last: with it, the group is done


def whitening_of(
    gram: StoredGram | None,
    dampening_frac: float,
    device: torch.device | str = "cpu",
    tensors_read: GroupTensors | None = None,
) -> Whitening:
    """The whitening of a group's Gram. The identity without a calibration token, as in a vision tower without images: the best
    factors are then those of the weight alone."""
    assert gram is not None
    packed = gram.packed() if tensors_read is None or tensors_read.gram is None else tensors_read.gram
    inputs = unpack_triangle(packed.to(device))
    inputs = inputs if gram.num_tokens else torch.eye(len(inputs), dtype=inputs.dtype, device=device)
    return Whitening(inputs, dampening_frac, name=gram.name)


class _Group:
    """What a group's linears share, read when first asked for."""

    def __init__(
        self,
        job: FactorizationJob,
        specs: Sequence[LinearSpec],
        gram: StoredGram | None,
        device: torch.device | str,
        tensors_read: GroupTensors | None,
        checkpoint: Checkpoint,
        gradients: GramStore | None,
    ) -> None:
        self._gradients = gradients
        self.job, self.gram, self.device, self.tensors_read = job, gram, device, tensors_read
        self.specs, self.in_features, self.checkpoint = specs, specs[0].in_features, checkpoint

    @functools.cached_property
    def gradients(self) -> GramStore:
        """The sums of gradients, where the job has some and they were not read ahead."""
        assert self.job.gradients_dir is not None
        return self._gradients or GramStore(self.job.gradients_dir)

    @functools.cached_property
    def whitening(self) -> Whitening:
        made = whitening_of(self.gram, self.job.dampening_frac, self.device, self.tensors_read)
        if not self.job.by_weights and any(spec.name in self.job.integers.bits for spec in self.specs):
            made.root_by_energy(DAMPENING_FRAC)  # before any other root: it is made beside a copy of the Gram
        return made

    @functools.cached_property
    def inputs(self) -> Whitening:
        """The whitening that factors and rounding go by: of no Gram, or by the weights alone, the identity."""
        if self.gram is None or self.job.by_weights:
            return Whitening.identity(self.in_features, self.device)
        return self.whitening


class _Linear:
    """A linear of a group: its weight, its factors and what is stored of it, each made when first asked for."""

    def __init__(self, group: _Group, spec: LinearSpec) -> None:
        self.group, self.job, self.spec, self.name = group, group.job, spec, spec.name
        self.dtype = group.checkpoint.entry(spec.weight_rows[0].name).dtype

    @functools.cached_property
    def weight(self) -> Tensor:
        tensors_read = self.group.tensors_read
        weight = tensors_read.weights[self.name] if tensors_read else self.spec.read_weight(self.group.checkpoint)
        return weight.to(self.group.device)

    @functools.cached_property
    def outputs(self) -> Whitening | None:
        """The whitening of the outputs' gradients; None where each output counts as it is."""
        if self.job.gradients_dir is None or not self.job.uses_gradients(self.name):
            return None
        tensors_read = self.group.tensors_read
        packed = tensors_read.gradients[self.name] if tensors_read else self.group.gradients.stored(self.name).packed()
        name = f"the gradients of what {self.name} gives"
        return Whitening(unpack_triangle(packed.to(self.group.device)), self.job.gradient_dampening_frac, name=name)

    @functools.cached_property
    def factorization(self) -> Factorization | None:
        if self.name not in self.job.ranks:
            return None
        rank, seed, outputs = self.job.ranks[self.name], self.job.seed, self.outputs
        inputs = self.group.inputs if self.job.by_weights else self.group.whitening  # which a linear of ranks needs
        if outputs is None:
            return factorize_layer(self.weight, inputs, rank, seed=seed, name=self.name)
        return factorize_two_sided(self.weight, inputs, outputs, rank, seed=seed, name=self.name)

    @functools.cached_property
    def stored(self) -> tuple[Parts, Tensor | None]:
        """What is stored of it, and the places of pivoted rows; on the CPU."""
        parts, order = (self._in_integers(), None) if self.name in self.job.integers.bits else self._in_floats()
        return {part: {key: tensor.cpu() for key, tensor in tensors.items()} for part, tensors in parts.items()}, order

    def _in_integers(self) -> Parts:
        """Its factors, or itself, with factors of the rest."""
        integers, factorization, outputs = self.job.integers, self.factorization, self.outputs
        bits, size, rank = integers.bits[self.name], integers.group_size, integers.residual_ranks.get(self.name)
        weight, inputs = self.weight, self.group.inputs
        if factorization is not None:
            up, down = quantize_factors(factorization.factors, weight, inputs, bits, size, name=self.name)
            forms = {".up": up, ".down": down}
        elif rank is not None:
            base, up, down = quantize_with_factors(
                weight, inputs, bits, rank, factor_bits(bits), size, outputs=outputs, seed=self.job.seed, name=self.name
            )
            forms = {".base": base, ".up": up, ".down": down}
        else:
            forms = {"": quantize_integers(weight, inputs, bits, size, name=self.name)}
        return {part: form.tensors(self.dtype) for part, form in forms.items()}

    def _in_floats(self) -> tuple[Parts, Tensor | None]:
        """Its factors, or itself, in its dtype or in NF4; and the places of pivoted rows."""
        order = None
        if self.factorization is None:
            parts = {"": self.weight}
        elif self.job.storage == "factors":
            parts = {".up": self.factorization.factors.up, ".down": self.factorization.factors.down}
        else:
            up, down, order = pivot(self.factorization.factors)
            parts, order = {".up": up, ".down": down}, order.cpu()
        if self.name in self.job.in_4bit:
            return {part: quantize_nf4(tensor, self.dtype, self.name) for part, tensor in parts.items()}, order
        stored = {part: tensor.to(self.dtype) for part, tensor in parts.items()}
        if self.dtype == torch.float16 and not all(
            map(is_finite, stored.values())
        ):  # a column of W may be longer than 65504
            raise NumericsError(
                f"The factors of {self.name} overflow float16, in which the model is stored: give it in bfloat16 or float32."
            )
        return {part: {"weight": tensor} for part, tensor in stored.items()}, order

    def tensors(self) -> dict[str, Tensor]:
        """What the emulator's shard has of it, by name."""
        parts, order = self.stored
        tensors = {
            f"{self.name}{part}.{key}": tensor for part, of_part in parts.items() for key, tensor in of_part.items()
        }
        bias, checkpoint = self.spec.bias_rows, self.group.checkpoint
        if self.factorization is not None and bias.name in checkpoint:
            holder = f"{self.name}.up" if order is None else self.name
            tensors[f"{holder}.bias"] = bias.entry(checkpoint).read_rows()
        if order is not None:
            tensors[f"{self.name}.order"] = order
        return tensors

    def report(self, num_tokens: int) -> LayerReport:
        """Its relative error and ``tr(W G Wᵀ)`` under the Gram, and what its factorization gave."""
        spec, factorization, (parts, order) = self.spec, self.factorization, self.stored
        is_by_gram_alone = self.outputs is None and not self.job.by_weights
        measured: tuple[float, float] | None = None
        if factorization is not None and is_by_gram_alone and self.name not in self.job.quantized_linears:
            measured = _known_error(factorization, self.group.whitening, self.dtype, self.job.storage)
        if measured is None:
            stored = linear_weight(parts, spec.in_features, order, self.group.device).rows()
            measured = relative_error(self.weight, stored, self.group.whitening, name=self.name)
        error, energy = measured
        residual = error**2 * energy
        if factorization is None:
            full = min(spec.out_features, spec.in_features)
            return LayerReport(self.name, full, error, "dense", energy, num_tokens, residual_energy=residual)
        return LayerReport(
            self.name,
            factorization.factors.up.shape[1],
            error,
            factorization.solver,
            factorization.total_energy,
            num_tokens,
            None if is_by_gram_alone else factorization.relative_error,
            sampled(factorization.eigenvalues, factorization.total_energy),
            residual,
        )


def _known_error(
    result: Factorization, whitening: Whitening, dtype: torch.dtype, storage: Storage
) -> tuple[float, float] | None:
    """The relative error of factors as stored in ``dtype``, and ``tr(W G Wᵀ)``, from what the factorization measured.

    None where rounding has too large a share in the error, as it may have in pivoted factors, which amplify it: then the error
    is to be measured.
    """
    total, residual = result.total_energy, result.relative_error**2 * result.total_energy
    if torch.finfo(dtype).eps <= torch.finfo(torch.float32).eps:
        return result.relative_error, total
    if storage != "factors" or (rounding := rounding_energy(result, whitening, dtype)) > _ROUNDING_SHARE * residual:
        return None
    return math.sqrt((residual + rounding) / total) if total > 0 else 0.0, total


def build_emulator(
    job: FactorizationJob,
    calibration_dir: Path,
    base_config: Any,
    resources: Resources,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> dict[str, Any]:
    """Writes an emulator shard by shard: factors of every linear in ``job.ranks``, the others quantized where the job says so,
    all other tensors unchanged, config, tokenizer. Shards of an earlier try are kept.

    ``base_config`` is the original's. Raises what a task raised, and NumericsError as :func:`factorize_group`.
    """
    work, rest = sorted(rewritten(job), key=group_cost, reverse=True), rest_of_shards(job)
    total = len(work) + len(rest)
    files = [job.out_dir / f"model-{number + 1:05d}-of-{total:05d}.safetensors" for number in range(total)]
    written, without_gram = set(sizes(job.out_dir)), set(job.without_gram)
    grams = functools.cache(functools.partial(GramStore, calibration_dir))
    shared_job = ray.put(job)  # once, not with every task
    factorize, copy = resources.task(factorize_groups), Resources().task(copy_rest)
    submits: list[tuple[str, Callable[[], Any]]] = []
    todo, files_of = [], dict[str, list[Path]]()
    for group, file in zip(work, files, strict=False):
        if not (file in written and spectra_file(file) in written):
            gram = None if group[0].name in without_gram else grams().stored(group[0].name)
            todo.append((group, gram, file))
    for bundle in bundles(todo, lambda piece: group_cost(piece[0]), resources):
        name = " and ".join(spec.name for spec in bundle[0][0]) + ("" if len(bundle) == 1 else ", …")
        files_of[name] = [file for *_, file in bundle]
        task = factorize.options(name=f"factorize: {name}")
        submits.append((name, functools.partial(task.remote, shared_job, bundle, resources.device)))
    for kept, file in zip(rest, files[len(work) :], strict=True):
        if file not in written:
            task = copy.options(name=f"factorize: {file.name}")
            name = f"shard {file.name}"
            files_of[name] = [file]
            submits.append((name, functools.partial(task.remote, kept, file)))

    def of_all(done: int, left: int) -> None:
        progress(total - left + done, total)

    losses = Losses("factorize", tell, files=files_of)
    bounded(submits, resources.num_workers, losses, of_all, planned_s=resources.planned_s)
    kept_wide = job.kept_wide if job.in_4bit else None
    total_size = finish_emulator(files, base_config, job.model_dir, job.ranks, job.storage, kept_wide, job.integers)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        every_report = itertools.chain.from_iterable(pool.map(read_reports, files[: len(work)]))
    reports = sorted(every_report, key=lambda report: report.name)
    write_spectra(job.out_dir, reports)
    return {**_summary(reports, resources), "bytes": total_size}


def rewritten(job: FactorizationJob) -> list[tuple[LinearSpec, ...]]:
    """The linears that are factorized or put into few bits: those of one Gram together, and those without one."""
    written = {*job.ranks, *job.quantized_linears}
    without_gram = set(job.without_gram)
    parts = [
        tuple(spec for spec in group if spec.name in written and (spec.name in without_gram) == apart)
        for group in job.groups
        for apart in (False, True)
    ]
    return [part for part in parts if part]


def factorize_groups(job: FactorizationJob, groups: Sequence[GroupWork], device: torch.device | str = "cpu") -> None:
    """:func:`factorize_group` of each whose files are not there yet; on a GPU the next one's tensors are read meanwhile."""
    written = existing([name for *_, file in groups for name in (file, spectra_file(file))])
    todo = [piece for piece in groups if not {piece[2], spectra_file(piece[2])} <= written]
    checkpoint = Checkpoint(job.model_dir)
    gradients = None if job.gradients_dir is None else GramStore(job.gradients_dir)

    def read(piece: GroupWork) -> GroupTensors:
        specs, gram, _ = piece
        names = [spec.name for spec in specs if job.uses_gradients(spec.name)]
        sums = {} if gradients is None else {name: gradients.stored(name) for name in names}
        return read_group(checkpoint, specs, gram, sums)

    for piece, tensors_read in read_ahead(todo, read, torch.device(device)):
        factorize_group(job, *piece, device, tensors_read, checkpoint, gradients)


def finish_emulator(
    files: Sequence[Path],
    base_config: Any,
    tokenizer_dir: Path,
    ranks: dict[str, int],
    storage: Storage,
    kept_wide: tuple[str, ...] | None,
    integers: IntegerForms | None = None,
) -> int:
    """Makes an emulator of shards that are all written: index, config, tokenizer; returns the bytes of all tensors.
    ``kept_wide`` are the linears outside the blocks, where those inside are in 4 bits; None where none are."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        entries = {entry.name: entry for shard in pool.map(read_shard, files) for entry in shard.entries}
    parameters = sum(num_elements(entry.name, entry.dtype, entry.shape) for entry in entries.values())
    total_size, out_dir = sum(entry.num_bytes for entry in entries.values()), files[0].parent
    write_index(out_dir, {name: entry.file.name for name, entry in entries.items()}, total_size, parameters)
    in_4bit = None if kept_wide is None else quantization_config(base_config.dtype or torch.float32, kept_wide)
    write_emulator_config(out_dir, base_config, ranks, in_4bit, storage, integers)
    copy_tokenizer(tokenizer_dir, out_dir)
    return total_size


def _summary(reports: Sequence[LayerReport], resources: Resources) -> dict[str, Any]:
    layers = {r.name: _layer_metrics(r) for r in reports}
    return {
        "num_workers": resources.num_workers,
        "mean_relative_error": float(np.mean([r.relative_error for r in reports])) if reports else 0.0,
        "layers": layers,
        "fewest_tokens": min((r.num_tokens for r in reports if r.num_tokens), default=None),
        "unseen": [r.name for r in reports if not r.num_tokens],
    }


def _layer_metrics(report: LayerReport) -> dict[str, Any]:
    metrics = {
        key: getattr(report, key) for key in ("rank", "relative_error", "solver", "total_energy", "residual_energy")
    }
    return metrics | ({} if report.weighed_error is None else {"weighed_error": report.weighed_error})
