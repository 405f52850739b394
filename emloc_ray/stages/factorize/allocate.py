"""Allocate: the spectra of all linears, or what each form of them loses, a Ray task for those that share a Gram; then the ranks
or forms, here, written as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emloc_ray.core.forms import Form
from emloc_ray.core.gram import unpack_triangle
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.predicted_loss import form_losses
from emloc_ray.core.ranks import Storage, factor_parameters, rank_multiple
from emloc_ray.core.spectra import plain_gains, spectrum
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard
from emloc_ray.io.formats.grams import GramStore, StoredGram
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.io.store.node_cache import existing, sizes
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.stages.factorize.group_tensors import GroupTensors, read_ahead, read_group
from emloc_ray.stages.factorize.job import group_cost
from emloc_ray.stages.factorize.rank_curves import Curve, allocate
from emloc_ray.stages.factorize.spend import Spending, spend
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, bundles, run_tasks, silent

RANKS = "ranks.json"
# Linears, their Gram, their sums of gradients, the file of what their ranks gain.
SpectraWork = tuple[Sequence[LinearSpec], StoredGram, Mapping[str, StoredGram], Path]
_CONNECTIONS = 8  # by which small files are read at once


@dataclass(frozen=True)
class AllocationJob:
    """Artifact paths and flat settings of the stage.

    ``groups``: the linears whose ranks are to be found, by shared Gram. ``ranks``: the uniform rank of each, which is the
    budget. Gains are of predictions: ``½ λ_i / N`` with the eigenvalues ``λ_i`` in the metric of both sums, or what
    ``plain_factors`` save there. ``gradients_dir`` holds the sums of gradients. ``never_dense``: linears that cannot stay dense
    in the emulator's quantization. ``storage``: that of factors, which decides what a rank costs. Ranks are multiples of
    ``rank_multiple``. With ``spending`` the job chooses forms within its budget instead of ranks.
    """

    model_dir: Path
    calibration_dir: Path
    gradients_dir: Path
    groups: tuple[tuple[LinearSpec, ...], ...]
    ranks: dict[str, int]
    plain_factors: bool = False
    dampening_frac: float = 1e-6
    gradient_dampening_frac: float = 1e-2
    never_dense: tuple[str, ...] = ()
    storage: Storage = "factors"
    rank_multiple: int | Literal["auto"] = "auto"
    spending: Spending | None = None

    def forms(self, spec: LinearSpec) -> list[Form]:
        """What a linear may be stored as under a budget; nothing without one."""
        shape = spec.out_features, spec.in_features
        return (
            []
            if self.spending is None
            else self.spending.form_sizes.forms(*shape, rank_multiple(*shape, self.rank_multiple))
        )


def read_ranks(directory: Path) -> dict[str, int | None]:
    """The ranks that :func:`allocate_ranks` wrote, None for a linear that stays dense."""
    layers: dict[str, Any] = read_json(directory / RANKS)["layers"]
    return {name: layer["rank"] for name, layer in layers.items()}


@exact_float32()
def group_spectra(
    job: AllocationJob,
    specs: Sequence[LinearSpec],
    gram: StoredGram,
    gradients: Mapping[str, StoredGram],
    device: torch.device | str = "cpu",
    tensors_read: GroupTensors | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:
    """The gain of each rank of a group's linears, ``(min(out, in),)``, or with a budget the loss of each form, computed on
    ``device``; zeros where the data says nothing. ``tensors_read`` are the tensors that were read ahead, ``checkpoint`` is the
    job's model, where it is open. Raises NumericsError where a weight or a sum holds NaN or Inf, naming the layer."""
    checkpoint, values_of = checkpoint or Checkpoint(job.model_dir), {}
    num_tokens = gram.num_tokens
    whitening = None
    if num_tokens > 0:  # else an expert's identity that was sent too few, as it is to be cut by a plain SVD
        packed = gram.packed() if tensors_read is None or tensors_read.gram is None else tensors_read.gram
        whitening = Whitening(unpack_triangle(packed.to(device)), job.dampening_frac, name=specs[0].name)
    for spec in specs:
        forms = job.forms(spec)
        values_of[spec.name] = torch.zeros(len(forms) or min(spec.out_features, spec.in_features), dtype=torch.float64)
        if whitening is None:
            continue
        name = f"the gradients of what {spec.name} gives"
        packed = tensors_read.gradients[spec.name] if tensors_read else gradients[spec.name].packed()
        outputs = Whitening(unpack_triangle(packed.to(device)), job.gradient_dampening_frac, name=name)
        if outputs.is_identity:
            continue
        weight = (tensors_read.weights[spec.name] if tensors_read else spec.read_weight(checkpoint)).to(device)
        if job.spending is not None:
            size, plain = job.spending.form_sizes.group_size, job.plain_factors
            values = form_losses(weight, whitening, outputs, forms, size, plain=plain, name=spec.name)
        else:
            gains = plain_gains if job.plain_factors else spectrum
            values = gains(weight, whitening, outputs, name=spec.name)
        values_of[spec.name] = (values / (2 * num_tokens)).cpu()
    return values_of


def allocate_ranks(
    job: AllocationJob, out_dir: Path, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """Writes ``ranks.json`` into ``out_dir``, or with a budget ``forms.json``: every linear's rank (null: dense), the share of
    its parameters that it keeps, and its share of all that could be gained.

    Spectra that an earlier try wrote are kept. A linear that the data says nothing of, such as an expert without tokens, keeps
    its uniform rank or form.
    """
    files = [out_dir / f"spectra-{k + 1:05d}-of-{len(job.groups):05d}.safetensors" for k in range(len(job.groups))]
    grams = GramStore(job.calibration_dir)
    sums = GramStore(job.gradients_dir)
    written = set(sizes(out_dir))
    todo = [pair for pair in zip(job.groups, files, strict=True) if pair[1] not in written]
    todo.sort(key=lambda pair: group_cost(pair[0]), reverse=True)
    work, files_of = [], dict[str, list[Path]]()
    for bundle in bundles(todo, lambda pair: group_cost(pair[0]), resources):
        pieces = [
            (specs, grams.stored(specs[0].name), {spec.name: sums.stored(spec.name) for spec in specs}, file)
            for specs, file in bundle
        ]
        name = bundle[0][0][0].name
        work.append((name, (pieces, resources.device)))
        files_of[name] = [file for _, file in bundle]
    shared = dataclasses.replace(job, groups=(), ranks={}, spending=job.spending and job.spending.without_even)
    run_tasks(spectra_of_groups, shared, work, resources, Losses("allocate", tell, files=files_of), progress)
    gains: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for spectra in pool.map(_read_spectra, files):
            gains |= spectra
    every = [spec for group in job.groups for spec in group]
    if job.spending is not None:
        return {"num_workers": resources.num_workers, **spend(job.spending, every, job.forms, gains, out_dir)}
    gaining = [spec for spec in every if float(gains[spec.name].sum()) > 0]
    curves = [_curve(job, spec, gains[spec.name]) for spec in gaining]
    uniform = {curve.name: job.ranks[curve.name] for curve in curves}
    budget = sum(curve.cost(uniform[curve.name]) for curve in curves)
    allocation = allocate(curves, budget, uniform)
    ranks: dict[str, int | None] = {spec.name: allocation.ranks.get(spec.name, job.ranks[spec.name]) for spec in every}
    _write(job, out_dir / RANKS, every, ranks, gains, budget - allocation.used)
    possible = sum(float(values.sum()) for values in gains.values())
    return {
        "num_workers": resources.num_workers,
        "budget": sum(_kept(job, spec, job.ranks[spec.name]) for spec in every),
        "left": budget - allocation.used,
        "num_dense": sum(rank is None for rank in ranks.values()),
        "num_kept_uniform": len(every) - len(gaining),
        "gain": allocation.gain / possible if possible > 0 else 0.0,
        "uniform_gain": sum(c.gain(uniform[c.name]) for c in curves) / possible if possible > 0 else 0.0,
    }


def _curve(job: AllocationJob, spec: LinearSpec, gains: Tensor) -> Curve:
    shape = spec.out_features, spec.in_features
    multiple = rank_multiple(*shape, job.rank_multiple)
    return Curve(spec.name, *shape, gains, spec.name not in job.never_dense, job.storage, multiple)


def _kept(job: AllocationJob, spec: LinearSpec, rank: int | None) -> int:
    return factor_parameters(spec.out_features, spec.in_features, rank, job.storage)


def _write(
    job: AllocationJob,
    path: Path,
    specs: Sequence[LinearSpec],
    ranks: Mapping[str, int | None],
    gains: Mapping[str, Tensor],
    left: int,
) -> None:
    layers = {}
    for spec in specs:
        rank, all_gains = ranks[spec.name], gains[spec.name]
        layers[spec.name] = {
            "rank": rank,
            "share": _kept(job, spec, rank) / spec.num_parameters,
            "gain": float((all_gains if rank is None else all_gains[:rank]).sum()),
            "possible_gain": float(all_gains.sum()),
        }
    write_json(path, {"parameters_left": left, "layers": layers})


def _read_spectra(file: Path) -> dict[str, Tensor]:
    return {entry.name: entry.read_rows() for entry in read_shard(file).entries}


def spectra_of_groups(job: AllocationJob, pieces: Sequence[SpectraWork], device: torch.device | str = "cpu") -> None:
    """Writes :func:`group_spectra` of each whose file is not there yet; on a GPU the next one's tensors are read meanwhile."""
    written = existing([piece[3] for piece in pieces])
    todo = [piece for piece in pieces if piece[3] not in written]
    checkpoint = Checkpoint(job.model_dir)
    for piece, tensors_read in read_ahead(todo, lambda piece: read_group(checkpoint, *piece[:3]), torch.device(device)):
        specs, gram, gradients, file = piece
        write_tensors(file, group_spectra(job, specs, gram, gradients, device, tensors_read, checkpoint))
