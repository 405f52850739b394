"""Products and norms of wide matrices that several parts of the method share, in float64 without a wide copy."""

import torch
from torch import Tensor

ROWS = 1024  # of a layer, turned to float64 at a time
_CACHED_ROWS = 256  # of a product's operands: few enough to stay in a CPU's cache
_GPU_ROWS = 8192  # enough to fill a GPU


def is_finite(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds neither NaN nor Inf.

    A norm reads it at memory speed, several times as fast as an elementwise test, and is finite only where all is;
    where it is not, finite but large elements may have overflowed it, so that the elements decide.
    """
    return bool(torch.isfinite(torch.linalg.vector_norm(tensor))) or bool(torch.isfinite(tensor).all())


def energy(matrix: Tensor) -> float:
    """``‖A‖²`` of ``A (n, k)``, summed in float64, of some rows at a time."""
    # Along the memory's rows. In float32 a row with one massive element would lose up to 1e-6 of what the others hold.
    rows = matrix.T if matrix.stride(0) < matrix.stride(1) else matrix
    norms = (torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in rows.split(ROWS))
    return float(torch.stack([norm.square().sum() for norm in norms]).sum())


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right (a, b)`` in float64, for ``left (n, a)`` and ``right (n, b)`` that are cast some rows at a time."""
    # A few rows times a matrix go up to twice as fast as its transpose times a few columns.
    made = torch.zeros(right.shape[1], left.shape[1], dtype=torch.float64, device=left.device)
    count = _CACHED_ROWS if left.device.type == "cpu" else _GPU_ROWS
    for begin in range(0, len(left), count):
        rows = slice(begin, begin + count)
        made.addmm_(right[rows].to(torch.float64).T, left[rows].to(torch.float64))
    return made.T


def product_by_rows(left: Tensor, right: Tensor) -> Tensor:
    """``left right (a, b)`` in float64, for ``left (a, n)`` that is cast some rows at a time, and ``right (n, b)`` in float64."""
    return torch.cat([rows.double() @ right for rows in torch.split(left, ROWS)])


def seen_rows(weight: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``‖w‖²`` of every row of ``weight (out, in)``, and ``W Q (out, k)``, in float64, by row chunks: no wide copy is made."""
    squares, products = [], []
    for rows in torch.split(weight, ROWS):
        wide = rows.double()
        squares.append(wide.square().sum(dim=1))
        products.append(wide @ q)
    return torch.cat(squares), torch.cat(products)


def row_norms(base: Tensor, cross: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """``‖W + s B A‖`` of every row ``(out,)`` from thin products alone. ``base (out,)`` holds ``‖W‖²`` of each row,
    ``cross = W Aᵀ (out, r)``: ``‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ``."""
    inner = lora_a @ lora_a.T
    square = base + 2 * scale * (lora_b * cross).sum(dim=1) + scale**2 * ((lora_b @ inner) * lora_b).sum(dim=1)
    return square.clamp_min(0).sqrt()


def paired_columns(one: Tensor, two: Tensor) -> Tensor:
    """``(n, p)`` and ``(n, q)`` to ``(n, p q)``: every column of one times every column of the other (Khatri–Rao)."""
    return (one.unsqueeze(2) * two.unsqueeze(1)).flatten(1)
