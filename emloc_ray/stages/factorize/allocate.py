"""Allocate: what each form of all linears loses, a Ray task for those that share a Gram; then the ranks or forms, here, as
JSON."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.core.gram import unpack_triangle
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.predicted_loss import form_losses
from emloc_ray.core.ranks import Storage, factor_parameters, possible_ranks, rank_multiple
from emloc_ray.core.spectra import plain_gains, spectrum
from emloc_ray.core.whitening import Whitening
from emloc_ray.data.ahead import read_ahead
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard
from emloc_ray.io.formats.grams import GramStore, StoredGram
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.node_cache import existing, sizes
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.stages.factorize.group_tensors import GroupTensors, read_group
from emloc_ray.stages.factorize.job import group_cost
from emloc_ray.stages.factorize.spend import FORMS, RANKS, Offer, spend
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, bundles, run_tasks, silent

# Linears, their Gram, their sums of gradients, the file of what their forms lose.
LossesWork = tuple[Sequence[LinearSpec], StoredGram, Mapping[str, StoredGram], Path]
_CONNECTIONS = 8  # by which small files are read at once


@dataclass(frozen=True)
class Spending:
    """``budget``: bytes for all linears. ``form_sizes``: how they are stored. ``even``: each linear's form at its own share of
    the budget."""

    budget: int
    form_sizes: FormSizes
    even: Mapping[str, Form]


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
    never_dense: frozenset[str] = frozenset()
    storage: Storage = "factors"
    rank_multiple: int | Literal["auto"] = "auto"
    spending: Spending | None = None

    def forms(self, spec: LinearSpec) -> list[Form]:
        """What a linear may be stored as."""
        shape = spec.out_features, spec.in_features
        multiple = rank_multiple(*shape, self.rank_multiple)
        if self.spending is not None:
            return self.spending.form_sizes.forms(*shape, multiple)
        ranks = possible_ranks(*shape, self.ranks[spec.name], self.storage, multiple)
        return [*map(Form, ranks), *([] if spec.name in self.never_dense else [Form()])]

    def cost(self, spec: LinearSpec, form: Form) -> int:
        """Bytes of a form, or without a budget of them its parameters."""
        shape = spec.out_features, spec.in_features
        if self.spending is not None:
            return self.spending.form_sizes.num_bytes(*shape, form)
        return factor_parameters(*shape, form.rank, self.storage)

    def even(self, spec: LinearSpec) -> Form:
        """Its form at its own share of what all may cost."""
        return Form(self.ranks[spec.name]) if self.spending is None else self.spending.even[spec.name]


@exact_float32()
def group_losses(
    job: AllocationJob,
    specs: Sequence[LinearSpec],
    gram: StoredGram,
    gradients: Mapping[str, StoredGram],
    device: torch.device | str = "cpu",
    tensors_read: GroupTensors | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:
    """The expected loss of each form of a group's linears in nats a sample, ``(len(job.forms(spec)),)``, computed on ``device``;
    zeros where the data says nothing. ``tensors_read`` are the tensors that were read ahead, ``checkpoint`` is the
    job's model, where it is open. Raises NumericsError where a weight or a sum holds NaN or Inf, naming the layer."""
    checkpoint, losses = checkpoint or Checkpoint(job.model_dir), dict[str, Tensor]()
    num_tokens = gram.num_tokens
    whitening = None
    if num_tokens > 0:  # else an expert's identity that was sent too few, as it is to be cut by a plain SVD
        packed = gram.packed() if tensors_read is None or tensors_read.gram is None else tensors_read.gram
        whitening = Whitening(unpack_triangle(packed.to(device)), job.dampening_frac, name=specs[0].name)

    def of_linear(spec: LinearSpec, whitening: Whitening) -> Tensor | None:
        """None where no gradient reached it. Its sum of gradients is let go of before that of the next is read."""
        forms = job.forms(spec)
        name = f"the gradients of what {spec.name} gives"
        packed = tensors_read.gradients[spec.name] if tensors_read else gradients[spec.name].packed()
        outputs = Whitening(unpack_triangle(packed.to(device)), job.gradient_dampening_frac, name=name)
        if outputs.is_identity:
            return None
        weight = (tensors_read.weights[spec.name] if tensors_read else spec.read_weight(checkpoint)).to(device)
        if job.spending is not None:
            size, plain = job.spending.form_sizes.group_size, job.plain_factors
            values = form_losses(weight, whitening, outputs, forms, size, plain=plain, name=spec.name)
        else:
            gains = plain_gains if job.plain_factors else spectrum
            values = _losses_by_rank(gains(weight, whitening, outputs, name=spec.name).cpu(), forms)
        return values.cpu() / (2 * num_tokens)

    for spec in specs:
        made = None if whitening is None else of_linear(spec, whitening)
        losses[spec.name] = torch.zeros(len(job.forms(spec)), dtype=torch.float64) if made is None else made
    return losses


def _losses_by_rank(gains: Tensor, forms: Sequence[Form]) -> Tensor:
    """What the ranks after those of each form would gain: nothing where it is dense."""
    left = torch.cat([gains.flip(0).cumsum(0).flip(0), gains.new_zeros(1)])
    return left[[len(gains) if form.rank is None else form.rank for form in forms]]


def allocate_ranks(
    job: AllocationJob, out_dir: Path, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """Writes ``ranks.json`` into ``out_dir``, or with a budget ``forms.json``: every linear's rank (null: dense) or form, and
    what it is expected to lose.

    Losses that an earlier try wrote are kept. A linear that the data says nothing of, such as an expert without tokens, keeps
    its uniform rank or form.
    """
    files = [out_dir / f"losses-{k + 1:05d}-of-{len(job.groups):05d}.safetensors" for k in range(len(job.groups))]
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
    shared = dataclasses.replace(job, groups=())
    run_tasks(losses_of_groups, shared, work, resources, Losses("allocate", tell, files=files_of), progress)
    losses: dict[str, Tensor] = {}
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for read in pool.map(_read_losses, files):
            losses |= read
    offers, even_cost = dict[str, Offer](), 0
    alike: dict[object, tuple[list[Form], list[int]]] = {}  # thousands of experts have one list between them
    for spec in itertools.chain.from_iterable(job.groups):
        even = job.even(spec)
        key = spec.out_features, spec.in_features, even, spec.name in job.never_dense
        if key not in alike:
            forms = job.forms(spec)
            alike[key] = forms, [job.cost(spec, form) for form in forms]
        offers[spec.name] = Offer(*alike[key], losses[spec.name], even)
        even_cost += job.cost(spec, even)
    budget, file = (even_cost, RANKS) if job.spending is None else (job.spending.budget, FORMS)
    return {"num_workers": resources.num_workers, **spend(offers, budget, out_dir / file)}


def _read_losses(file: Path) -> dict[str, Tensor]:
    return {entry.name: entry.read_rows() for entry in read_shard(file).entries}


def losses_of_groups(job: AllocationJob, pieces: Sequence[LossesWork], device: torch.device | str = "cpu") -> None:
    """Writes :func:`group_losses` of each whose file is not there yet; on a GPU the next one's tensors are read meanwhile."""
    written = existing([piece[3] for piece in pieces])
    todo = [piece for piece in pieces if piece[3] not in written]
    checkpoint = Checkpoint(job.model_dir)
    for piece, tensors_read in read_ahead(todo, lambda piece: read_group(checkpoint, *piece[:3]), torch.device(device)):
        specs, gram, gradients, file = piece
        write_tensors(file, group_losses(job, specs, gram, gradients, device, tensors_read, checkpoint))
