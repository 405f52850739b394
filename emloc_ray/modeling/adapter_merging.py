"""An adapter folded into a checkpoint's tensors, a row chunk at a time, as PEFT's own merge does it to a whole model.

- added to a weight: ``W + ΔW``;
- DoRA: ``m / ‖W + s B A‖ · (W + s B A)``, row by row;
- IA³: ``diag(l) W`` and ``diag(l) b``, or of a feed-forward linear ``W diag(l)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emloc_ray.core.merging import merged_rows, squared_row_norms
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.updates import Update
from emloc_ray.io.formats.checkpoint import TensorEntry
from emloc_ray.io.formats.shards import copy_chunks, row_chunks
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import LinearSpec, StoredRows, TensorSlice

if TYPE_CHECKING:
    from emloc_ray.modeling.block_weights import BlockWeights

_NORM_ROWS = 64  # read at a time for norms, whatever the chunks are: no bit may depend on those
_ROWS = 1024  # of a weight in memory, merged at a time


@dataclass(frozen=True)
class Change:
    """What a tensor, or a part of one, holds of a linear that the adapter changes: the weight's stored rows from
    ``begin`` on, or the bias."""

    spec: LinearSpec
    begin: int = 0
    is_bias: bool = False


Changes = dict[TensorSlice, Change]  # of a stored tensor


def changed_tensors(adapter: Adapter, specs: Sequence[LinearSpec]) -> dict[str, Changes]:
    """The checkpoint's tensors that the merge changes, by name."""
    named = set(adapter.names)
    changes: dict[str, Changes] = {}
    for spec in specs:
        if spec.name not in named:
            continue
        for rows in spec.weight_rows:
            changes.setdefault(rows.name, {})[rows.part] = Change(spec, rows.begin)
        if adapter.kind == "scaling" and spec.has_bias and not adapter.scaling(spec.name)[1]:
            rows = spec.bias_rows
            changes.setdefault(rows.name, {})[rows.part] = Change(spec, rows.begin, is_bias=True)
    return changes


def merged_chunks(entry: TensorEntry, adapter: Adapter, changes: Changes, chunk_bytes: int) -> Iterator[Tensor]:
    """A changed tensor's row chunks, each of at most ``chunk_bytes`` in float32: merged where a linear's rows are, else
    as they are. Beside one it holds one module's adapter."""
    for piece, change in _pieces(entry, changes):
        if change is not None:
            yield from _merged(piece, adapter, change, chunk_bytes)
        else:
            yield from copy_chunks(piece, chunk_bytes)


def _pieces(entry: TensorEntry, changes: Changes) -> Iterator[tuple[TensorEntry, Change | None]]:
    """A tensor in the parts that change and those between them, in order."""
    if None in changes:
        yield entry, changes[None]
        return
    at = 0
    spans = {part: part if isinstance(part, tuple) else (part, part + 1) for part in changes if part is not None}
    for part, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin > at:
            yield entry.span(at, begin), None
        yield StoredRows(entry.name, part=part).of(entry), changes[part]
        at = end
    if at < entry.shape[0]:
        yield entry.span(at, entry.shape[0]), None


@dataclass(frozen=True)
class _Merge:
    """What a change adds to stored rows, and what the sum is then multiplied by: ``vector``, one number a stored row or a
    stored column; ``over_norms``: over the norms of the weight's own rows (DoRA)."""

    update: Update | None
    vector: Tensor | None = None
    along_rows: bool = True
    over_norms: bool = False

    def on(self, device: torch.device) -> _Merge:
        """The same on a device."""
        update: Any = self.update
        tensors = {} if update is None else {f.name: getattr(update, f.name) for f in fields(update)}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        vector = None if self.vector is None else self.vector.to(device)
        return replace(self, update=replace(update, **moved) if moved else update, vector=vector)

    def gains(self, chunks: Iterable[tuple[int, Tensor]], transposed: bool) -> Tensor | None:
        """What each row, or column, is multiplied by; ``chunks`` are all stored rows, read for norms alone."""
        if self.vector is None or self.update is None or not self.over_norms:
            return self.vector
        norms = squared_row_norms(chunks, self.update, transposed).sqrt()
        return (self.vector.double() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).float()


def _merge_of(adapter: Adapter, change: Change) -> _Merge:
    spec = change.spec
    if adapter.kind == "scaling":
        vector, of_inputs = adapter.scaling(spec.name)
        return _Merge(None, vector, change.is_bias or of_inputs == spec.transposed)
    if adapter.kind != "decomposed":
        return _Merge(adapter.update(spec))
    return _Merge(adapter.update(spec), adapter.magnitude(spec.name), not spec.transposed, over_norms=True)


def _merged(entry: TensorEntry, adapter: Adapter, change: Change, chunk_bytes: int) -> Iterator[Tensor]:
    """Rows of ``ΔW`` are computed with the chunk that they are added to."""
    merge, transposed = _merge_of(adapter, change), change.spec.transposed
    # A norm is of the weight's own row: one of Wᵀ, which runs through all stored rows, is never stored in parts.
    assert not (merge.over_norms and transposed) or len(change.spec.weight_rows) == 1
    row_bytes = entry.num_bytes // max(1, entry.shape[0])
    of_norms = ((change.begin + offset, rows) for offset, rows in row_chunks(entry, _NORM_ROWS * row_bytes))
    gains = merge.gains(of_norms, transposed)
    own_bytes = max(1, chunk_bytes * entry.dtype.itemsize // 4)  # of the stored dtype: chunk_bytes counts float32
    for offset, rows in row_chunks(entry, own_bytes):
        merged = merged_rows(rows, merge.update, change.begin + offset, transposed, gains, merge.along_rows)
        del rows
        yield merged
        del merged


# What a parameter is merged by: whether it is stored transposed, in which dtype, and where it is to be read from.
_Merging = tuple[_Merge, bool, torch.dtype, Callable[[], Tensor] | None]


def compute_as_merged(model: Any, adapter: Adapter, weights: BlockWeights) -> None:
    """Has the linears of a bare model compute with what the merge makes of the checkpoint that ``weights`` reads. A weight is
    made while its linear computes, of what the model has then, or where that is rounded (a float32 checkpoint in bfloat16) of
    what is stored; it is rounded as the merged checkpoint is, then to the model's dtype, and not kept. What its rows are
    multiplied by is kept: neither they nor the adapter change."""
    for name in adapter.names:
        linear = model.get_submodule(name)
        transposed = isinstance(linear, Conv1D)
        outputs, inputs = linear.weight.shape[::-1] if transposed else linear.weight.shape
        spec = LinearSpec(name, outputs, inputs, linear.bias is not None, transposed, "")
        changes = {"weight": Change(spec)}
        if adapter.kind == "scaling" and spec.has_bias and not adapter.scaling(name)[1]:
            changes["bias"] = Change(replace(spec, transposed=False), is_bias=True)
        merges: dict[str, _Merging] = {}
        for part, change in changes.items():
            merge, own = _merge_of(adapter, change).on(linear.weight.device), linear.get_parameter(part).dtype
            dtype = weights.stored_dtype(f"{name}.{part}")
            is_rounded = torch.promote_types(dtype, own) != own
            stored = functools.partial(weights.stored, f"{name}.{part}") if is_rounded else None
            merges[part] = merge, change.spec.transposed, dtype, stored
        linear.forward = functools.partial(_forward_merged, linear, merges, linear.forward)


def _forward_merged(linear: nn.Module, merges: dict[str, _Merging], compute: Callable[..., Any], *args: Any) -> Any:
    own = dict(linear._parameters)
    for part, (merge, transposed, dtype, stored) in merges.items():
        made, known = _by_rows(linear.get_parameter(part), merge, transposed, dtype, stored)
        merges[part] = known, transposed, dtype, stored
        linear._parameters[part] = nn.Parameter(made, False)
    try:
        return compute(*args)
    finally:
        linear._parameters.update(own)


@exact_float32()
def _by_rows(
    weight: Tensor, merge: _Merge, transposed: bool, dtype: torch.dtype, stored: Callable[[], Tensor] | None
) -> tuple[Tensor, _Merge]:
    """The merged weight, and the merge with the gains known."""
    made, source = torch.empty_like(weight), weight if stored is None else stored()

    def chunks(size: int) -> Iterator[tuple[int, Tensor]]:
        for begin in range(0, len(source), size):
            yield begin, source[begin : begin + size].to(weight.device, dtype)

    gains = merge.gains(chunks(_NORM_ROWS), transposed)
    for begin, rows in chunks(_ROWS):
        made[begin : begin + len(rows)] = merged_rows(rows, merge.update, begin, transposed, gains, merge.along_rows)
    return made, replace(merge, vector=gains, over_norms=False)
