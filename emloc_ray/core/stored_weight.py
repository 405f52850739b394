"""What an emulator stores of a linear's weight, multiplied without making the weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from emloc_ray.core.products import product_by_rows


class StoredWeight(NamedTuple):
    """``W_E (out, in)``: ``left (out, r)`` times ``right (r, in)``, plus ``base (out, in)`` where there is one; or dense,
    ``left`` alone. In any floating dtype."""

    left: Tensor
    right: Tensor | None = None
    base: Tensor | None = None

    def times(self, columns: Tensor) -> Tensor:
        """``W_E X (out, k)`` in float64, for ``columns`` X ``(in, k)`` in float64."""
        product = product_by_rows(self.left, columns if self.right is None else product_by_rows(self.right, columns))
        return product if self.base is None else product + product_by_rows(self.base, columns)

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows ``[begin, end)`` of ``W_E`` (all by default), in float32."""
        rows = self.left[begin:end].float()
        if self.right is not None:
            rows = rows @ self.right.float()
        return rows if self.base is None else rows + self.base[begin:end].float()
