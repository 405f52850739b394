"""An adapter folded into a checkpoint's tensors, a row chunk at a time, as PEFT's own merge does it to a whole model.

- added to a weight: ``W + ΔW``;
- DoRA: ``m / ‖W + s B A‖ · (W + s B A)``, row by row;
- IA³: ``diag(l) W`` and ``diag(l) b``, or of a feed-forward linear ``W diag(l)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc_ray.core.merging import merged_rows, squared_row_norms
from emloc_ray.core.updates import Update
from emloc_ray.io.formats.checkpoint import TensorEntry
from emloc_ray.io.formats.shards import copy_chunks, row_chunks
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import LinearSpec

_NORM_ROWS = 64  # read at a time for norms, whatever the chunks are: no bit may depend on those


@dataclass(frozen=True)
class Change:
    """What a tensor, or a slice of one, holds of a linear that the adapter changes: the weight's stored rows from
    ``begin`` on, or the bias."""

    spec: LinearSpec
    begin: int = 0
    is_bias: bool = False


Changes = dict[int | None, Change]  # by the slice of a tensor, None for the whole of it


def changed_tensors(adapter: Adapter, specs: Sequence[LinearSpec]) -> dict[str, Changes]:
    """The checkpoint's tensors that the merge changes, by name."""
    named = set(adapter.names)
    changes: dict[str, Changes] = {}
    for spec in specs:
        if spec.name not in named:
            continue
        for rows in spec.weight_rows:
            changes.setdefault(rows.name, {})[rows.index] = Change(spec, rows.begin)
        if adapter.kind == "scaling" and spec.has_bias and not adapter.scaling(spec.name)[1]:
            rows = spec.bias_rows
            changes.setdefault(rows.name, {})[rows.index] = Change(spec, rows.begin, is_bias=True)
    return changes


def merged_chunks(entry: TensorEntry, adapter: Adapter, changes: Changes, chunk_bytes: int) -> Iterator[Tensor]:
    """A changed tensor's row chunks, each of at most ``chunk_bytes`` in float32: merged where a linear's rows are, else
    as they are. Beside one it holds one module's adapter.
    """
    for index in (None,) if None in changes else range(entry.shape[0]):
        piece = entry if index is None else entry.slice(index)
        if index in changes:
            yield from _merged(piece, adapter, changes[index], chunk_bytes)
        else:
            yield from copy_chunks(piece, chunk_bytes)


def _merged(entry: TensorEntry, adapter: Adapter, change: Change, chunk_bytes: int) -> Iterator[Tensor]:
    """Rows of ``ΔW`` are computed with the chunk that they are added to."""
    update, gains, along_rows = _operation(entry, adapter, change)
    own_bytes = max(1, chunk_bytes * entry.dtype.itemsize // 4)  # of the stored dtype: chunk_bytes counts float32
    for offset, rows in row_chunks(entry, own_bytes):
        merged = merged_rows(rows, update, change.begin + offset, change.spec.transposed, gains, along_rows)
        del rows
        yield merged
        del merged


def _operation(entry: TensorEntry, adapter: Adapter, change: Change) -> tuple[Update | None, Tensor | None, bool]:
    """What is added, what the sum is then multiplied by, and whether that is one number a stored row."""
    spec = change.spec
    if adapter.kind == "scaling":
        vector, of_inputs = adapter.scaling(spec.name)
        return None, vector, change.is_bias or of_inputs == spec.transposed
    update = adapter.update(spec)
    if adapter.kind != "decomposed":
        return update, None, True
    # A norm is of the weight's own row: one of Wᵀ, which runs through all stored rows, is never stored in parts.
    assert not spec.transposed or len(spec.weight_rows) == 1
    row_bytes = entry.num_bytes // max(1, entry.shape[0])
    chunks = ((change.begin + offset, rows) for offset, rows in row_chunks(entry, _NORM_ROWS * row_bytes))
    norms = squared_row_norms(chunks, update, spec.transposed).sqrt()
    gains = adapter.magnitude(spec.name).double() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return update, gains.float(), not spec.transposed
