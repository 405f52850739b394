"""Fold: a LoRA trained on an emulator becomes part of its factors; one Ray task a shard, the other tensors byte for byte."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emloc_ray.core.factorization import LowRankFactors
from emloc_ray.core.healing import added_factors
from emloc_ray.core.pivoting import PivotedFactors, pivot
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.ranks import Storage
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry
from emloc_ray.io.formats.shards import copy_chunks, make_header, row_chunks, stream_shard, write_tensors
from emloc_ray.io.store.node_cache import exists
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.quantization import quantize
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, run_tasks, silent

_CHUNK_BYTES = 2**25
_PARTS = {".up.weight": ".up", ".down.weight": ".down", ".order": ".order", ".weight": ""}


@dataclass(frozen=True)
class FoldJob:
    """Artifact paths and flat settings.

    ``ranks`` are those that the layers end with, ``healed`` the layers that the adapter in ``adapter_dir`` adapts.
    ``in_4bit`` are the linears that are put into 4 bits on the way, factors and dense ones, of which the ``transposed`` are
    stored ``(in, out)``; ``kept_wide`` are those elsewhere in the model that are not. ``storage`` is that of factors, here
    and there.
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

    @property
    def made_whole(self) -> frozenset[str]:
        """The linears whose tensors follow from all that the emulator has of them: those put into 4 bits or pivoted anew."""
        return frozenset(self.in_4bit) | (frozenset(self.healed) if self.storage == "pivoted" else frozenset())


@dataclass(frozen=True)
class Piece:
    """A shard of the healed emulator: its file, and the emulator's tensors that it is made of.

    Those of one linear that is ``made_whole`` make a shard of their own, for in 4 bits how long they get is known only then.
    """

    file: Path
    entries: tuple[TensorEntry, ...]
    linear: str | None = None


def pieces(job: FoldJob) -> list[Piece]:
    """The shards to write, by the emulator's."""
    whole = job.made_whole
    apart: dict[str, list[TensorEntry]] = {}
    parts: list[tuple[tuple[TensorEntry, ...], str | None]] = []
    for shard in Checkpoint(job.emulator_dir).shards:
        plain: list[TensorEntry] = []
        for entry in shard.entries:
            name = _linear(job, entry)[0]
            (apart.setdefault(name, []) if name in whole else plain).append(entry)
        parts += [(tuple(plain), None)] if plain else []
    parts += [(tuple(entries), name) for name, entries in apart.items()]
    return [
        Piece(job.out_dir / f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors", *part)
        for number, part in enumerate(parts)
    ]


def _linear(job: FoldJob, entry: TensorEntry) -> tuple[str, str]:
    """The linear whose weight, or factor of one, a tensor is, and which: ``.up``, ``.down``, their ``.order`` or nothing.

    By the names of factorized layers: an expert's dense linear may itself be called ``down``.
    """
    for ending, part in _PARTS.items():
        name = entry.name.removesuffix(ending)
        if name != entry.name and (not part or name in job.ranks):
            return name, part
    return "", ""


class _Added:
    """What the adapter adds to each healed layer's factors, one layer at a time."""

    def __init__(self, job: FoldJob) -> None:
        self.job, self.adapter, self.healed = job, Adapter(job.adapter_dir), set(job.healed)
        self.factors = functools.lru_cache(maxsize=1)(self._factors)

    def _factors(self, name: str) -> LowRankFactors:
        lora = self.adapter.module(name)
        return added_factors(lora.lora_a, lora.lora_b, lora.scale)

    def part(self, entry: TensorEntry) -> tuple[str, torch.Tensor] | None:
        """Which factor of a healed layer a tensor is, and what is to be joined to it; None of all other tensors."""
        name, part = _linear(self.job, entry)
        if part not in (".up", ".down") or name not in self.healed:
            return None
        factors = self.factors(name)
        added = factors.up if part == ".up" else factors.down
        rank = entry.shape[1 if part == ".up" else 0] + factors.down.shape[0]
        wanted = self.job.ranks[name]
        if rank != wanted:
            raise ArtifactError(f"{entry.file}: {name} would grow to rank {rank}, not {wanted}: run the stage again.")
        return part, added.to(entry.dtype)


def grow_shard(job: FoldJob, piece: Piece) -> None:
    """Writes a shard with ``up' = [up, added]`` and ``down' = [down; added]`` in place of a healed layer's factors."""
    added = _Added(job)

    def grown(entry: TensorEntry) -> TensorEntry:
        change = added.part(entry)
        if change is None:
            return entry
        part, more = change
        rows, columns = entry.shape
        shape = (rows, columns + more.shape[1]) if part == ".up" else (rows + more.shape[0], columns)
        return replace(entry, shape=shape, start=0, stop=entry.num_bytes + more.nbytes)

    def chunks(entry: TensorEntry) -> Iterator[torch.Tensor]:
        change = added.part(entry)
        if change is not None and change[0] == ".up":
            for begin, rows in row_chunks(entry, _CHUNK_BYTES):
                yield torch.cat([rows, change[1][begin : begin + len(rows)]], dim=1)
            return
        yield from copy_chunks(entry, _CHUNK_BYTES)
        if change is not None:
            yield change[1]

    entries = [(grown(entry), entry) for entry in piece.entries]
    header = make_header([new for new, _ in entries])
    stream_shard(piece.file, header, ((new, chunks(entry)) for new, entry in entries))


def make_linear(job: FoldJob, piece: Piece) -> None:
    """Writes a linear that is made as a whole: its factors grown where it is healed, and pivoted anew; in 4 bits."""
    added, name = _Added(job), piece.linear
    assert name is not None
    entries = {_linear(job, entry)[1]: entry for entry in piece.entries}
    weights = {part: entry.read_rows() for part, entry in entries.items()}
    order, healed = weights.pop(".order", None), name in job.healed
    if order is not None and healed:
        weights[".up"], _ = PivotedFactors(weights[".up"], weights[".down"], order).plain()
    for part, entry in entries.items():
        change = added.part(entry)
        if change is not None:
            weights[part] = torch.cat([weights[part], change[1]], dim=1 if part == ".up" else 0)
    if order is not None and healed:
        weights[".up"], weights[".down"], order = pivot(LowRankFactors(weights[".up"], weights[".down"]))
    tensors = {} if order is None else {f"{name}.order": order}
    for part, weight in weights.items():
        held = {"weight": weight}
        if name in job.in_4bit:
            turned = name in job.transposed and not part
            held = quantize(weight.T if turned else weight, entries[part].dtype, name)
        tensors |= {f"{name}{part}.{key}": tensor for key, tensor in held.items()}
    write_tensors(piece.file, tensors)


@exact_float32()
def write_piece(job: FoldJob, piece: Piece) -> None:
    """Writes a shard, unless it is there, whole, from a try that was killed."""
    if exists(piece.file):
        return
    if piece.linear is None:
        grow_shard(job, piece)
    else:
        make_linear(job, piece)


def fold(
    job: FoldJob, base_config: Any, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> int:
    """Writes ``job.out_dir``, an emulator of the same format; returns the bytes of its tensors.

    Shards that are in it already are kept: the caller knows that they are of this adapter. ``base_config`` is the
    original's.
    """
    shards = pieces(job)
    largest = sorted(shards, key=lambda piece: sum(entry.num_bytes for entry in piece.entries), reverse=True)
    work = [(f"shard {piece.file.name}", (piece,)) for piece in largest]
    run_tasks(write_piece, job, work, resources, Losses("heal", tell), progress)
    kept_wide = job.kept_wide if job.in_4bit else None
    files = [piece.file for piece in shards]
    return finish_emulator(files, base_config, job.emulator_dir, job.ranks, job.storage, kept_wide)
