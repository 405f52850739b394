"""An adapter folded into a checkpoint's tensors, a row chunk at a time, as PEFT's own merge does it to a whole model.

- added to a weight: ``W + ΔW``;
- DoRA: ``m / ‖W + s B A‖ · (W + s B A)``, row by row;
- IA³: ``diag(l) W`` and ``diag(l) b``, or of a feed-forward linear ``W diag(l)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emloc_ray.core.merging import merged_rows, squared_row_norms
from emloc_ray.core.precision import exact_float32
from emloc_ray.core.updates import Update
from emloc_ray.io.formats.checkpoint import TensorEntry
from emloc_ray.io.formats.shards import copy_chunks, row_chunks
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import LinearSpec, Part, StoredRows

_NORM_ROWS = 64  # read at a time for norms, whatever the chunks are: no bit may depend on those
_ROWS = 1024  # of a weight in memory, merged at a time


@dataclass(frozen=True)
class Change:
    """What a tensor, or a part of one, holds of a linear that the adapter changes: the weight's stored rows from
    ``begin`` on, or the bias."""

    spec: LinearSpec
    begin: int = 0
    is_bias: bool = False


Changes = dict[Part, Change]  # by the part of a tensor, None for the whole of it


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
    as they are. Beside one it holds one module's adapter.
    """
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
    gains = _gains(adapter.magnitude(spec.name), chunks, update, spec.transposed)
    return update, gains, not spec.transposed


def _gains(magnitude: Tensor, chunks: Iterable[tuple[int, Tensor]], update: Update, transposed: bool) -> Tensor:
    norms = squared_row_norms(chunks, update, transposed).sqrt()
    return (magnitude.double() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).float()


def compute_as_merged(model: Any, adapter: Adapter, stored_dtype: Callable[[str], torch.dtype]) -> None:
    """Has the linears of a bare model compute with what the merge makes of their weights, of whatever weights they have then.

    A weight is made while its linear computes, rounded as a checkpoint of ``stored_dtype(its name)`` rounds it, and not kept.
    """
    for name in adapter.names:
        linear = model.get_submodule(name)
        merged = _merged_weight(adapter, linear, name, stored_dtype(f"{name}.weight"))
        linear.forward = functools.partial(_forward_merged, linear, merged, linear.forward)


def _forward_merged(
    linear: nn.Module, merged: Callable[[], dict[str, Tensor]], compute: Callable[..., Any], *args: Any
) -> Any:
    own = dict(linear._parameters)
    linear._parameters.update((name, nn.Parameter(tensor, False)) for name, tensor in merged().items())
    try:
        return compute(*args)
    finally:
        linear._parameters.update(own)


def _merged_weight(adapter: Adapter, linear: Any, name: str, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
    """What makes a linear's weight, and the bias where that changes too, of those that it has when it is called."""
    transposed, device = isinstance(linear, Conv1D), linear.weight.device
    if adapter.kind == "scaling":
        vector, of_inputs = adapter.scaling(name)
        gains = vector.to(device)

        def scaled() -> dict[str, Tensor]:
            weight = _by_rows(linear.weight, dtype, None, transposed, gains, of_inputs == transposed)
            has_bias = linear.bias is not None and not of_inputs
            return {
                "weight": weight,
                **({"bias": _by_rows(linear.bias, dtype, None, False, gains)} if has_bias else {}),
            }

        return scaled
    outputs, inputs = linear.weight.shape[::-1] if transposed else linear.weight.shape
    update = _on(adapter.update(LinearSpec(name, outputs, inputs, False, transposed, "")), device)
    magnitude = adapter.magnitude(name).to(device) if adapter.kind == "decomposed" else None

    def added() -> dict[str, Tensor]:
        weight, gains = linear.weight, None
        if magnitude is not None:
            chunks = ((begin, weight[begin : begin + _NORM_ROWS]) for begin in range(0, len(weight), _NORM_ROWS))
            gains = _gains(magnitude, chunks, update, transposed)
        return {"weight": _by_rows(weight, dtype, update, transposed, gains, not transposed)}

    return added


@exact_float32()
def _by_rows(
    weight: Tensor,
    dtype: torch.dtype,
    update: Update | None,
    transposed: bool,
    gains: Tensor | None,
    along_rows: bool = True,
) -> Tensor:
    made = torch.empty_like(weight)
    stored = dtype if dtype.itemsize < weight.dtype.itemsize else weight.dtype
    for begin in range(0, len(weight), _ROWS):
        rows = weight[begin : begin + _ROWS].to(stored)
        made[begin : begin + _ROWS] = merged_rows(rows, update, begin, transposed, gains, along_rows)
    return made


def _on(update: Any, device: torch.device) -> Any:
    tensors = {
        field.name: value for field in fields(update) if isinstance(value := getattr(update, field.name), Tensor)
    }
    return replace(update, **{name: tensor.to(device) for name, tensor in tensors.items()})
