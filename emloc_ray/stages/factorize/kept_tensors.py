"""The tensors that an emulator keeps unchanged, streamed from the original's checkpoint to its own."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry
from emloc_ray.io.formats.shards import copy_chunks, make_header, stream_shard
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.stages.factorize.job import FactorizationJob

_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class Kept:
    """A tensor that the emulator keeps: its name and shape, and the parts of the original's checkpoint that it is made of, one
    below the other."""

    entry: TensorEntry
    sources: tuple[TensorEntry, ...]
    transposed: bool = False

    def chunks(self) -> Iterator[torch.Tensor]:
        """Its bytes."""
        if self.transposed:
            yield torch.cat([source.read_rows() for source in self.sources]).T
            return
        for source in self.sources:
            yield from copy_chunks(source, _CHUNK_BYTES)


def copy_rest(kept: Sequence[Kept], path: Path) -> None:
    """Writes tensors that the emulator keeps, streamed."""
    stream_shard(path, make_header([part.entry for part in kept]), ((part.entry, part.chunks()) for part in kept))


def left_out(checkpoint: Checkpoint, unused: Set[str], tied: Mapping[str, str]) -> set[str]:
    """The tensors of the original that no emulator has: what the model does not use, and copies of what they are tied to."""
    copies = (copy for copy, name in tied.items() if _are_alike(checkpoint.entry(copy), checkpoint.entry(name)))
    return {*unused, *copies}


def kept_bytes(checkpoint: Checkpoint, unused: Set[str], tied: Mapping[str, str]) -> int:
    """Bytes of an emulator in which nothing is compressed."""
    without = left_out(checkpoint, unused, tied)
    return sum(entry.num_bytes for entry in checkpoint if entry.name not in without)


def rest_of_shards(job: FactorizationJob) -> list[list[Kept]]:
    """What the emulator keeps, by shard of the original. Its budget counts each weight of the model once: what the model does
    not use is left out, and a copy of what it is tied to."""
    checkpoint = Checkpoint(job.model_dir)
    specs = [spec for group in job.groups for spec in group]
    # Dense linears that the original's checkpoint holds in pieces, by the first of these.
    apart = [
        s for s in specs if s.name not in job.ranks and (len(s.stored) > 1 or any(r.part is not None for r in s.stored))
    ]
    made = [spec for spec in specs if spec.name in job.ranks or spec in apart]
    taken = {rows.name for spec in made for rows in (*spec.weight_rows, spec.bias_rows)}
    taken |= {rows.name for spec in specs if spec.name in job.quantized_linears for rows in spec.weight_rows}
    taken |= left_out(checkpoint, job.unused, job.tied)
    kept_at: dict[str, list[Kept]] = {}
    for spec in apart:
        kept = _kept_linear(spec, checkpoint)
        kept_at.setdefault(spec.weight_rows[0].name, []).extend(
            kept[1:] if spec.name in job.quantized_linears else kept
        )
    rest = []
    for shard in checkpoint.shards:
        as_they_are = [entry for entry in shard.entries if entry.name not in taken]
        kept = [Kept(replace(e, name=job.renamed.get(e.name, e.name)), (e,)) for e in as_they_are]
        rest.append(kept + [part for entry in shard.entries for part in kept_at.get(entry.name, ())])
    return [kept for kept in rest if kept]


def _are_alike(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether they hold the same; where they do not, transformers does not tie them."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pairs = zip(copy_chunks(one, _CHUNK_BYTES), copy_chunks(other, _CHUNK_BYTES), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _kept_linear(spec: LinearSpec, checkpoint: Checkpoint) -> list[Kept]:
    """Its weight, and its bias where it has one."""
    weight = tuple(rows.entry(checkpoint) for rows in spec.weight_rows)
    size = sum(entry.num_bytes for entry in weight)
    shape = (spec.out_features, spec.in_features)
    turned = spec.transposed and spec.routed_share is not None  # a Conv1D stays one
    kept = [Kept(replace(weight[0], name=spec.weight_name, shape=shape, start=0, stop=size), weight, turned)]
    if spec.bias_rows.name in checkpoint:
        bias = spec.bias_rows.entry(checkpoint)
        kept.append(Kept(replace(bias, name=f"{spec.name}.bias"), (bias,)))
    return kept
