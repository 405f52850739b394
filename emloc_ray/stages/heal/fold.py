"""Fold: a LoRA trained on an emulator becomes part of its factors; one Ray task a shard, the other tensors byte for byte."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from emloc_ray.core.factorization import LowRankFactors
from emloc_ray.core.healing import added_factors
from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.pivoting import PivotedFactors, pivot
from emloc_ray.core.precision import exact_float32, has_fast_float64
from emloc_ray.core.quantization import quantize_factors
from emloc_ray.core.ranks import Storage
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.io.formats.shards import copy_chunks, make_header, stream_shard, write_tensors
from emloc_ray.io.store.node_cache import existing
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.nf4 import quantize_nf4
from emloc_ray.stages.factorize.factorize import finish_emulator, whitening_of
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, bundles, run_tasks, silent

_CHUNK_BYTES = 2**25
# ``.bias`` is that of pivoted factors: plain ones have it in ``.up``.
_PARTS = {".up.weight": ".up", ".down.weight": ".down", ".order": ".order", ".bias": ".bias", ".weight": ""}


@dataclass(frozen=True)
class FoldJob:
    """Artifact paths and flat settings.

    ``ranks`` are those that the layers end with, ``healed`` the layers that the adapter in ``adapter_dir`` adapts.
    ``in_4bit`` are the linears, factors and dense ones, that are put into 4 bits on the way; the ``transposed`` of them are
    stored ``(in, out)``. ``kept_wide`` are linears elsewhere in the model that stay wide. ``storage`` is that of the
    factors, before and after. ``integers`` are those of the emulator that is written: the healed linears among them are
    rounded on the way, under their Grams in ``calibration_dir``, damped by ``dampening_frac``; by their weights alone where it
    is None.
    """

    emulator_dir: Path
    adapter_dir: Path
    out_dir: Path
    ranks: dict[str, int]
    healed: tuple[str, ...]
    in_4bit: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    kept_wide: tuple[str, ...] = ()
    storage: Storage = "factors"
    integers: IntegerForms = field(default_factory=IntegerForms)
    calibration_dir: Path | None = None
    dampening_frac: float = 1e-6

    @property
    def changed(self) -> frozenset[str]:
        """The linears that are healed or put into few bits."""
        return frozenset(self.in_4bit) | frozenset(self.healed)

    @property
    def rounded(self) -> frozenset[str]:
        """The linears to round to integers once they are grown: work for a GPU where there is one."""
        return frozenset(self.healed) & self.integers.bits.keys()


class _Opened:
    """A job and what all pieces of a task are made from, opened once: for each of thousands of experts' linears the adapter's
    header would be read anew, and on a store asked after."""

    def __init__(self, job: FoldJob) -> None:
        self.job = job
        self.healed, self.rounded = frozenset(job.healed), job.rounded
        self.in_4bit, self.transposed = frozenset(job.in_4bit), frozenset(job.transposed)

    @functools.cached_property
    def adapter(self) -> Adapter:
        return Adapter(self.job.adapter_dir)

    def whitening(self, name: str, width: int, device: torch.device | str) -> Whitening:
        """Of the Gram under which a linear of ``width`` inputs is rounded."""
        if self._grams is None:
            return Whitening.identity(width, device)
        return whitening_of(self._grams.stored(name), self.job.dampening_frac, device)

    @functools.cached_property
    def _grams(self) -> GramStore | None:
        return None if self.job.calibration_dir is None else GramStore(self.job.calibration_dir)


@dataclass(frozen=True)
class FoldWork:
    """A shard of the healed emulator: its file, and the emulator's tensors that it is made of. Those of a ``changed`` linear
    make a shard of their own: how long they are in 4 bits is known only once they are made."""

    file: Path
    entries: tuple[TensorEntry, ...]
    linear: str | None = None


def pieces(job: FoldJob) -> list[FoldWork]:
    """The shards to write, by the emulator's."""
    changed = job.changed
    apart: dict[str, list[TensorEntry]] = {}
    parts: list[tuple[tuple[TensorEntry, ...], str | None]] = []
    for shard in Checkpoint(job.emulator_dir).shards:
        plain: list[TensorEntry] = []
        for entry in shard.entries:
            name = _linear(job, entry)[0]
            (apart.setdefault(name, []) if name in changed else plain).append(entry)
        parts += [(tuple(plain), None)] if plain else []
    parts += [(tuple(entries), name) for name, entries in apart.items()]
    return [
        FoldWork(job.out_dir / f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors", *part)
        for number, part in enumerate(parts)
    ]


def _linear(job: FoldJob, entry: TensorEntry) -> tuple[str, str]:
    """The linear whose weight, or factor of one, a tensor is, and which: ``.up``, ``.down``, their ``.order`` and ``.bias``, or
    nothing. By the names of factorized layers: an expert's dense linear may itself be called ``down``."""
    for ending, part in _PARTS.items():
        name = entry.name.removesuffix(ending)
        if name != entry.name and (not part or name in job.ranks):
            return name, part
    return "", ""


def _grown(opened: _Opened, name: str, factors: LowRankFactors) -> LowRankFactors:
    """A healed layer's factors ``[up, added]`` and ``[down; added]``, in their own dtype."""
    job, lora = opened.job, opened.adapter.module(name)
    added = added_factors(lora.lora_a, lora.lora_b, lora.scale)
    rank, wanted = factors.down.shape[0] + added.down.shape[0], job.ranks[name]
    if rank != wanted:
        raise ArtifactError(
            f"{job.emulator_dir}: {name} would grow to rank {rank}, not {wanted}: run the heal stage again."
        )
    dtype = factors.up.dtype
    return LowRankFactors(
        torch.cat([factors.up, added.up.to(dtype)], dim=1), torch.cat([factors.down, added.down.to(dtype)])
    )


def _make_linear(
    opened: _Opened, name: str, entries: dict[str, TensorEntry], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The tensors of a linear: its factors grown where it is healed, and pivoted anew where they were; in few bits. ``entries``
    are the emulator's tensors of the linear, by the part that each is; it is rounded on ``device``."""
    weights = {part: entry.read_rows() for part, entry in entries.items()}
    order, bias = weights.pop(".order", None), weights.pop(".bias", None)
    if name in opened.healed:
        factors = LowRankFactors(weights[".up"], weights[".down"])
        grown = _grown(opened, name, factors if order is None else PivotedFactors(*factors, order).plain())
        if name in opened.rounded:
            held = {} if bias is None else {f"{name}.up.bias": bias}
            return held | _in_integers(opened, name, grown, entries[".up"].dtype, device)
        if order is None:
            weights[".up"], weights[".down"] = grown
        else:
            weights[".up"], weights[".down"], order = pivot(grown)
    beside = {"order": order, "bias": bias}
    tensors = {f"{name}.{key}": tensor for key, tensor in beside.items() if tensor is not None}
    for part, weight in weights.items():
        stored = {"weight": weight}
        if name in opened.in_4bit:
            turned = name in opened.transposed and not part
            stored = quantize_nf4(weight.T if turned else weight, entries[part].dtype, name)
        tensors |= {f"{name}{part}.{key}": tensor for key, tensor in stored.items()}
    return tensors


def _in_integers(
    opened: _Opened, name: str, factors: LowRankFactors, dtype: torch.dtype, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Grown factors rounded under the Gram of their inputs, with orthonormal columns of ``up`` as they are rounded best."""
    place = device if has_fast_float64(torch.device(device)) else "cpu"
    up, down = (part.to(place, torch.float64) for part in factors)
    q, upper = torch.linalg.qr(up)
    plain = LowRankFactors(q.to(device, torch.float32), (upper @ down).to(device, torch.float32))
    whitening, job = opened.whitening(name, down.shape[1], device), opened.job
    bits, group_size = job.integers.bits[name], job.integers.group_size
    rounded = quantize_factors(plain, plain.up @ plain.down, whitening, bits, group_size, name=name)
    return {
        f"{name}{part}.{key}": tensor.cpu()
        for part, stored in zip((".up", ".down"), rounded, strict=True)
        for key, tensor in stored.tensors(dtype).items()
    }


@exact_float32()
def write_pieces(job: FoldJob, shards: Sequence[FoldWork], device: torch.device | str = "cpu") -> None:
    """Writes the shards that no killed try has written whole. What is rounded to integers is on ``device``."""
    opened, written = _Opened(job), existing([piece.file for piece in shards])
    for piece in shards:
        if piece.file in written:
            continue
        if piece.linear is not None:
            parts = {_linear(job, entry)[1]: entry for entry in piece.entries}
            write_tensors(piece.file, _make_linear(opened, piece.linear, parts, device))
        else:
            chunks = ((entry, copy_chunks(entry, _CHUNK_BYTES)) for entry in piece.entries)
            stream_shard(piece.file, make_header(piece.entries), chunks)


def fold(
    job: FoldJob, base_config: Any, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> int:
    """Writes ``job.out_dir``, an emulator of the same format, with the original's ``base_config``; returns the bytes of its
    tensors. Shards that are in it already are kept: the caller knows that they are of this adapter. GPUs are taken where
    something is rounded."""
    resources = resources if job.rounded else replace(resources, gpus_per_worker=0)
    shards = pieces(job)
    files = [piece.file for piece in shards]
    largest = sorted(shards, key=_num_bytes, reverse=True)
    work = [(f"shard {b[0].file.name}", (b, resources.device)) for b in bundles(largest, _num_bytes, resources)]
    losses = Losses("heal", tell, files={name: [piece.file for piece in bundle] for name, (bundle, _) in work})
    run_tasks(write_pieces, job, work, resources, losses, progress)
    kept_wide = job.kept_wide if job.in_4bit else None
    return finish_emulator(files, base_config, job.emulator_dir, job.ranks, job.storage, kept_wide, job.integers)


def _num_bytes(piece: FoldWork) -> int:
    return sum(entry.num_bytes for entry in piece.entries)
