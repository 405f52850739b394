"""Merging by rows: ``W + ΔW``, or that times gains, in float32 and cast back to the weight's own dtype."""

from collections.abc import Iterable

import torch
from torch import Tensor

from emloc_ray.core.precision import exact_products
from emloc_ray.core.updates import Update

# Products are taken of windows of rows that start on this grid and are no smaller: a product's last bits depend on its
# shape (one row alone even takes another kernel), and may not depend on where a checkpoint is cut into chunks.
_GRID = 64


def merged_rows(
    weight: Tensor,
    update: Update | None,
    begin: int = 0,
    transposed: bool = False,
    gains: Tensor | None = None,
    along_rows: bool = True,
) -> Tensor:
    """Rows ``[begin, begin + n)`` of ``W + ΔW`` times ``gains``, in ``weight``'s dtype; rounded once, from float32.

    ``weight`` are the stored rows: ``(n, in)`` of ``W (out, in)``, or with ``transposed`` ``(n, out)`` of ``Wᵀ`` (``Conv1D``);
    of a bias its elements ``(n,)``. ``gains`` has a factor for each stored row of the whole weight, or with ``along_rows``
    false for each stored column. Beside ``weight`` it holds the rows in float32, twice where there are gains, and the result.
    """
    rows = weight.float() if update is None else _summed(weight, update, begin, transposed)
    if gains is not None and along_rows:
        gains = gains[begin : begin + len(weight)]
        gains = gains.unsqueeze(1) if weight.ndim == 2 else gains
    return (rows if gains is None else rows * gains).to(weight.dtype)


def squared_row_norms(chunks: Iterable[tuple[int, Tensor]], update: Update, transposed: bool = False) -> Tensor:
    """``‖W + ΔW‖²`` of every row of the layer ``(out,)``, in float64, from the stored weight's ``(begin, rows)``."""
    total: Tensor = torch.zeros(update.shape[0], dtype=torch.float64, device="cpu")
    for begin, rows in chunks:
        square = _summed(rows, update, begin, transposed).double().square_()
        total = total.to(square.device)
        if transposed:
            total += square.sum(dim=0)
        else:
            total[begin : begin + len(rows)] = square.sum(dim=1)
    return total


@exact_products
def _summed(weight: Tensor, update: Update, begin: int, transposed: bool) -> Tensor:
    end, total = begin + weight.shape[0], update.shape[1 if transposed else 0]
    last = min(total, -(-end // _GRID) * _GRID)
    first = min(begin, max(0, last - _GRID))
    first -= first % _GRID
    return update.rows(first, last, transposed)[begin - first : end - first].add_(weight)
