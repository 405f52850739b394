"""An adapter folded into a checkpoint's tensors, a row chunk at a time, as PEFT's own merge does it to a whole model.

- added to a weight: ``W + ΔW``;
- DoRA: ``m / ‖W + s B A‖ · (W + s B A)``, row by row;
- IA³: ``diag(l) W`` and ``diag(l) b``, or of a feed-forward linear ``W diag(l)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from emloc_ray.core.merging import add_rows, scale_rows, squared_row_norms
from emloc_ray.core.updates import Update
from emloc_ray.io.checkpoint import TensorEntry
from emloc_ray.io.shard_writing import row_chunks
from emloc_ray.modeling.adapter import Adapter
from emloc_ray.modeling.architecture import LinearSpec

_NORM_ROWS = 64  # read at a time for norms, whatever the chunks are: no bit may depend on those


def changed_tensors(adapter: Adapter, specs: Sequence[LinearSpec]) -> dict[str, LinearSpec]:
    """The checkpoint's tensors that the merge changes, by name, each with its linear."""
    named = set(adapter.names)
    changed = {}
    for spec in specs:
        if spec.name not in named:
            continue
        changed[spec.weight_name] = spec
        if adapter.kind == "scaling" and spec.has_bias and not adapter.scaling(spec.name)[1]:
            changed[_bias_name(spec)] = spec
    return changed


def merged_chunks(entry: TensorEntry, adapter: Adapter, spec: LinearSpec, chunk_bytes: int) -> Iterator[Tensor]:
    """The merged tensor's row chunks, each of at most ``chunk_bytes`` in float32; beside one it holds one module's adapter.

    Rows of ``ΔW`` are computed with the chunk that they are added to.
    """
    update, gains, along_rows = _change(entry, adapter, spec)
    own_bytes = max(1, chunk_bytes * entry.dtype.itemsize // 4)  # of the stored dtype: chunk_bytes counts float32
    for begin, rows in row_chunks(entry, own_bytes):
        if gains is None and update is not None:
            merged = add_rows(rows, update, begin, spec.transposed)
        else:
            assert gains is not None
            merged = scale_rows(rows, gains, begin, along_rows, update, spec.transposed)
        del rows
        yield merged
        del merged


def _change(entry: TensorEntry, adapter: Adapter, spec: LinearSpec) -> tuple[Update | None, Tensor | None, bool]:
    """What is added, what the sum is then multiplied by, and whether that is one number a stored row."""
    if adapter.kind == "scaling":
        vector, of_inputs = adapter.scaling(spec.name)
        return None, vector, entry.name == _bias_name(spec) or of_inputs == spec.transposed
    update = adapter.update(spec)
    if adapter.kind != "decomposed":
        return update, None, True
    row_bytes = entry.num_bytes // max(1, entry.shape[0])
    norms = squared_row_norms(row_chunks(entry, _NORM_ROWS * row_bytes), update, spec.transposed).sqrt()
    gains = adapter.magnitude(spec.name).double() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    return update, gains.float(), not spec.transposed


def _bias_name(spec: LinearSpec) -> str:
    return f"{spec.name}.bias"
