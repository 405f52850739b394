"""Columns rounded one after another, by one kernel on CUDA, where :func:`emloc_ray.core.column_rounding.step_by_step` takes nine
launches a column. A thread rounds a row of the weight: rows do not depend on each other. Importing this needs Triton."""

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # of a program: one warp
# Added to a float32 of at most 2^22 and taken away again, it leaves the nearest integer, of two the even one.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(targets, mixing, reference, scales, zeros, codes, changes, out, top, n: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = row < out
    for k in range(n):
        at = k * out + row
        target = tl.load(targets + at, inside, 0.0)
        for j in range(k):
            target += tl.load(mixing + k * n + j) * tl.load(changes + j * out + row, inside, 0.0)
        scale, zero = tl.load(scales + at, inside, 1.0), tl.load(zeros + at, inside, 0.0)
        code = tl.minimum(tl.maximum(tl.div_rn(target, scale) + zero, 0.0), top)
        code = (code + _TO_INTEGER) - _TO_INTEGER
        tl.store(codes + at, code.to(tl.uint8), inside)
        tl.store(changes + at, tl.load(reference + at, inside, 0.0) - (code - zero) * scale, inside)


def round_by_kernel(
    targets: Tensor,
    mixing: Tensor,
    reference: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: int,
    codes: Tensor,
    changes: Tensor,
) -> None:
    """As :func:`emloc_ray.core.column_rounding.step_by_step`; all tensors are contiguous."""
    n, out = targets.shape
    grid = (triton.cdiv(out, _ROWS),)
    _nearest[grid](targets, mixing, reference, scales, zeros, codes, changes, out, float(top), n, _ROWS, num_warps=1)
