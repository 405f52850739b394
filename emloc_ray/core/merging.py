"""``W + s B A`` by rows, in float32, cast back to the weight's own dtype."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emloc_ray.core.updates import Update

# Products are taken of windows of rows that start on this grid and are no smaller: a product's last bits depend on its
# shape (one row alone even takes another kernel), and may not depend on where a checkpoint is cut into chunks.
_GRID = 64


def add_rows(weight: Tensor, update: Update, begin: int = 0, transposed: bool = False) -> Tensor:
    """Rows ``[begin, begin + n)`` of ``W + ΔW``, in ``weight``'s dtype.

    ``weight`` holds the stored rows: ``(n, in)`` of ``W (out, in)``, or with ``transposed`` ``(n, out)`` of ``Wᵀ``
    (``Conv1D``). Rounded once, from float32. Beside ``weight`` it holds the rows in float32 once, and the result where that
    is narrower.
    """
    return _summed(weight, update, begin, transposed).to(weight.dtype)


def squared_row_norms(chunks: Iterable[tuple[int, Tensor]], update: Update, transposed: bool = False) -> Tensor:
    """``‖W + ΔW‖²`` of every row of the layer ``(out,)``, in float64, from the stored weight's ``(begin, rows)``."""
    total = torch.zeros(update.shape[0], dtype=torch.float64)
    for begin, rows in chunks:
        square = _summed(rows, update, begin, transposed).double().square_()
        if transposed:
            total += square.sum(dim=0)
        else:
            total[begin : begin + len(rows)] = square.sum(dim=1)
    return total


def scale_rows(
    weight: Tensor,
    gains: Tensor,
    begin: int = 0,
    along_rows: bool = True,
    update: Update | None = None,
    transposed: bool = False,
) -> Tensor:
    """Rows of ``W``, or of ``W + ΔW``, times ``gains``, in ``weight``'s dtype: one gain a stored row, or a stored column.

    ``weight`` holds the stored rows ``[begin, begin + n)``; of a vector (a bias) its elements.
    """
    summed = weight.float() if update is None else _summed(weight, update, begin, transposed)
    if along_rows:
        gains = gains[begin : begin + len(weight)]
    return (summed * (gains.unsqueeze(1) if along_rows and weight.ndim == 2 else gains)).to(weight.dtype)


def _summed(weight: Tensor, update: Update, begin: int, transposed: bool) -> Tensor:
    end = begin + weight.shape[0]
    first, last = _window(begin, end, update.shape[1] if transposed else update.shape[0])
    return update.rows(first, last, transposed)[begin - first : end - first].add_(weight)


def _window(begin: int, end: int, total: int) -> tuple[int, int]:
    """The rows ``[first, last)`` of the grid that hold ``[begin, end)`` of ``total``."""
    last = min(total, -(-end // _GRID) * _GRID)
    first = min(begin, max(0, last - _GRID))
    return first - first % _GRID, last
