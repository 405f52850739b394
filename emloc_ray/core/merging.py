"""``W + s B A`` by rows, in float32, cast back to the weight's own dtype."""

from __future__ import annotations

from torch import Tensor

# Products are taken of windows of rows that start on this grid and are no smaller: a product's last bits depend on its
# shape (one row alone even takes another kernel), and may not depend on where a checkpoint is cut into chunks.
_GRID = 64


def merge_rows(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, begin: int = 0, transposed: bool = False
) -> Tensor:
    """Rows ``[begin, begin + n)`` of ``W + s B A``, in ``weight``'s dtype.

    ``weight`` holds the stored rows: ``(n, in)`` of ``W (out, in)``, or with ``transposed`` ``(n, out)`` of ``Wᵀ``
    (``Conv1D``). ``lora_a (r, in)``, ``lora_b (out, r)``. Rounded once, from float32. Beside ``weight`` it holds the rows
    in float32 once, and the result where that is narrower.
    """
    end = begin + weight.shape[0]
    first, last = _window(begin, end, lora_a.shape[1] if transposed else lora_b.shape[0])
    if transposed:
        update = (lora_b.float() @ lora_a.float()[:, first:last]).T
    else:
        update = lora_b.float()[first:last] @ lora_a.float()
    update = update[begin - first : end - first]
    return update.mul_(scale).add_(weight).to(weight.dtype)


def _window(begin: int, end: int, total: int) -> tuple[int, int]:
    """The rows ``[first, last)`` of the grid that hold ``[begin, end)`` of ``total``."""
    last = min(total, -(-end // _GRID) * _GRID)
    first = min(begin, max(0, last - _GRID))
    return first - first % _GRID, last
