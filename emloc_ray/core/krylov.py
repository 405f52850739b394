"""The leading left singular vectors of a matrix by block Krylov spaces, without squaring it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.products import energy, wide_product

# The search ends where the estimated loss of energy is below this share of the energy that is left. The true loss was the
# estimate for spectra that fall, and up to 4 times it for those of normal matrices; the relative error loses half of it.
MAX_LOSS_SHARE = 4e-4
# A block is this share of the rank, rounded down to a multiple of the least: small ones reach higher degrees at the same cost,
# but products with few columns are slower, and by a fifth with 99 than with 96.
_BLOCK_SHARE = 0.125
_MIN_BLOCK = 32
# The vectors at the first check of the Ritz values, in ranks: 1/i² needs 1.5, real layers of 576 features 2.2, a normal matrix
# 3.5. In a small matrix a check costs as much as several blocks, so that it comes later.
_FIRST_CHECK, FIRST_CHECK_IF_SMALL = 1.75, 2.2
_SMALL = 1024
# The ranks in which the loss is expected to fall by a factor of ten, until two checks have measured it.
_DECADE = 0.25
# Past this share of the order the full eigendecomposition is as fast.
_MAX_SHARE = 0.75
# A Ritz value stands at least so far, as a share of it, above what the space has not reached.
MIN_GAP = 0.05
# A check is in float32 where that moves less than this share of what is left.
_FLOAT32_SHARE = 1e-4
# Below this share of the whole energy, a difference of sums (in float64, of products in the dtype) can lose 1e-4 of what is left,
# and of a matrix with one massive column 1e-2 from 6e-5 on.
_CANCELLED = {torch.float32: 1e-3, torch.float64: 1e-11}
# What is left of a matrix is rounding where its norm is below this many unit roundoffs of the whole.
_LOST = 50.0
NUM_PROBES = 8
_PROBE_STEPS = 3
_ROWS = 1024


class LeadingVectors(NamedTuple):
    """What spans the most of ``‖A‖²``.

    ``vectors (n, r)`` are orthonormal; ``values (r,)`` are ``‖Aᵀ u‖²``, descending, float64; ``gaps (r,)`` how far they lie
    above the rest; ``energy_left`` is ``‖A − U Uᵀ A‖²``.
    """

    values: Tensor
    vectors: Tensor
    gaps: Tensor
    energy_left: float


class RitzPairs(NamedTuple):
    """``values (k,)``, descending, in float64, and ``rotation (m, k)``: of a space of m vectors all pairs, or the top ones.

    ``energy_left`` by the first r is a difference of sums, or, where ``cancelled`` says that rounding is too much of it, a
    bound from below.
    """

    values: Tensor
    rotation: Tensor
    energy_left: float
    cancelled: bool


def leading_vectors(matrix: Tensor, rank: int, seed: int = 0, *, squared: bool = False) -> LeadingVectors | None:
    """The ``rank`` leading left singular vectors of ``A (n, k)``, or ``None`` where they do not settle.

    Block Lanczos on ``A Aᵀ`` with full reorthogonalisation, from ``orth(A Ω)``: each block ``Q`` gives ``Z = Aᵀ Q``, and what
    ``A Z`` adds to the space is the next. Rounding counts relative to ``σ₁``, not to ``σ₁²``: the Ritz values are the squared
    singular values of ``Z``, whose Gram is summed in float64 (Golub, Luk and Overton, ACM TOMS 7, 1981; Musco and Musco,
    NeurIPS 2015, for what keeping the earlier blocks gains).

    It has settled where the energy missed, ``Σ ‖A Aᵀ u − θ u‖² / (θ − ρ)`` to second order, ``ρ`` the mean Rayleigh quotient of
    the last block, is below :func:`loss_bound`. Ritz residuals are blind to what the space never touched, because the start
    missed it or more singular values are equal than a block is wide: so it must also pass :func:`complement_gain`.
    The search also ends where what is left :func:`is_lost`: a wider dtype may find more.

    ``squared`` says that ``matrix`` is ``A Aᵀ (n, n)``, where that is cheaper to have than ``A``. Rounding then counts relative
    to ``σ₁²``: ``None`` as well where it is too much of what is left.
    """
    total = float(matrix.diagonal().sum(dtype=torch.float64)) if squared else energy(matrix)
    space = KrylovSpace(matrix, rank, seed, squared)
    # Beside the basis there has to be room for the block that follows.
    limit = min(int(_MAX_SHARE * min(matrix.shape)), len(matrix) - 2 * space.block + 1)
    first = FIRST_CHECK_IF_SMALL if min(matrix.shape) <= _SMALL else _FIRST_CHECK
    least = rank + space.block
    check_at, before = max(least, min(int(first * rank), limit)), (0, math.inf)
    while check_at <= limit:
        space.grow(check_at)
        pairs, gaps, loss = space.check(rank, total)
        bound = loss_bound(pairs.energy_left, float(pairs.values[0]), matrix.dtype)
        if squared and pairs.cancelled:
            return None
        if is_lost(pairs.energy_left, total, matrix.dtype):
            return space.vectors(pairs, gaps)
        if loss <= bound:
            top = space.vectors(pairs, gaps)
            return top if complement_gain(matrix, top, seed + 1, squared=squared) <= bound else None
        excess = loss / bound
        blocks = _step(space.size, excess, before, rank) / space.block
        check_at = space.size + max(math.ceil(blocks), 1) * space.block
        before = space.size, excess
    return None


def loss_bound(energy_left: float, largest: float, dtype: torch.dtype) -> float:
    """The energy that may be lost: a share of what is left, or what rounding beside the ``largest`` value moves anyway."""
    rounding = max((torch.finfo(dtype).eps / 2.0) ** 2, torch.finfo(torch.float64).eps)
    return max(MAX_LOSS_SHARE * energy_left, rounding * largest)


def is_lost(energy_left: float, total: float, dtype: torch.dtype) -> bool:
    """Whether so little energy is left that ``dtype`` cannot hold it, even where nothing is squared."""
    return energy_left <= (_LOST * torch.finfo(dtype).eps / 2.0) ** 2 * total


def _step(size: int, excess: float, before: tuple[int, float], rank: int) -> float:
    """How many vectors to add before the next check: the loss falls geometrically, or a little faster."""
    if excess >= before[1] or math.isinf(before[1]):
        return _DECADE * rank * math.log10(excess)
    return (size - before[0]) * math.log(excess) / math.log(before[1] / excess)


class KrylovSpace:
    """An orthonormal ``Q (n, m)`` and ``Z = Aᵀ Q (k, m)``, or ``A Aᵀ Q (n, m)``, grown a block at a time."""

    def __init__(self, matrix: Tensor, rank: int, seed: int, squared: bool = False) -> None:
        self.block = min(max(int(_BLOCK_SHARE * rank) // _MIN_BLOCK, 1) * _MIN_BLOCK, rank)
        self.size = 0
        self._matrix = matrix
        self._squared = squared
        self._generator = torch.Generator().manual_seed(seed)
        self._basis = matrix.new_empty(len(matrix), 3 * rank)
        self._images = matrix.new_empty(matrix.shape[1], 3 * rank)
        self._gram = torch.zeros(0, 0, dtype=torch.float64, device=matrix.device)
        start = matrix @ normal_numbers(matrix.shape[1], self.block, self._generator, matrix)
        if not squared:
            start = matrix @ orthonormal(matrix.T @ self._new_directions(start))[0]
        self._next = self._new_directions(start)
        self._coupling = matrix.new_zeros(self.block, self.block)

    def grow(self, size: int) -> None:
        """Adds blocks until ``Q`` holds ``size`` columns or more."""
        while self.size < size:
            end = self.size + self.block
            if end > self._basis.shape[1]:
                self._basis, self._images = (_widened(x, end, self.size) for x in (self._basis, self._images))
            image = self._matrix.T @ self._next
            self._basis[:, self.size : end] = self._next
            self._images[:, self.size : end] = image
            self.size = end
            product = image if self._squared else self._matrix @ image
            self._next = self._new_directions(product)
            self._coupling = self._next.T @ product

    def check(self, rank: int, total: float) -> tuple[RitzPairs, Tensor, float]:
        """The top ``rank`` Ritz pairs, their ``gaps`` as of :class:`LeadingVectors`, and the energy that they are estimated to
        miss."""
        known, images = len(self._gram), self._images[:, : self.size]
        gram = self._gram.new_empty(self.size, self.size)
        gram[:known, :known] = self._gram
        if self._squared:  # what the dtype rounds here, it has rounded in the square as well
            gram[:, known:] = self._basis[:, : self.size].T @ images[:, known:]
        else:
            gram[:, known:] = wide_product(images, images[:, known:])
        gram[known:, :known] = gram[:known, known:].T
        self._gram = gram
        pairs = ritz_pairs(gram, rank, total, self._matrix.dtype)
        values, rotation = pairs.values[:rank], pairs.rotation[:, :rank]
        residuals = (self._coupling.to(rotation.dtype) @ rotation[-self.block :]).square().sum(dim=0).to(torch.float64)
        # What couples to the next block lies about as high as the last one.
        level = gram.diagonal()[-self.block :].mean()
        gaps = torch.maximum(values - level, MIN_GAP * values).clamp_min(torch.finfo(torch.float64).tiny)
        return pairs._replace(values=values, rotation=rotation), gaps, float((residuals / gaps).sum())

    def vectors(self, pairs: RitzPairs, gaps: Tensor) -> LeadingVectors:
        """The vectors of Ritz pairs, and the energy left by them in full."""
        basis, images = self._basis[:, : self.size], self._images[:, : self.size]
        if not pairs.cancelled:
            return LeadingVectors(pairs.values, basis @ pairs.rotation.to(basis.dtype), gaps, pairs.energy_left)
        return careful_vectors(self._matrix, basis, images, self._gram, gaps)

    def _new_directions(self, product: Tensor) -> Tensor:
        return _outside(self._basis[:, : self.size], product, self._generator)


def ritz_pairs(gram: Tensor, rank: int, total: float, dtype: torch.dtype) -> RitzPairs:
    """All Ritz pairs of ``Qᵀ A Aᵀ Q (m, m)`` in float64, of a basis in ``dtype``; ``total`` is ``‖A‖²``."""
    # In float32 where its rounding, of ``‖QᵀMQ‖`` at most in each value, is nothing beside what is left of any basis.
    moved = rank * torch.finfo(torch.float32).eps / 2.0 * float(torch.linalg.vector_norm(gram))
    exact = moved > _FLOAT32_SHARE * (total - float(gram.diagonal().sum()))
    values, rotation = _descending(gram if exact else gram.to(torch.float32))
    energy_left = total - float(values[:rank].sum())
    cancelled = energy_left <= _CANCELLED[dtype] * total
    return RitzPairs(values, rotation, float(values[rank:].sum()) if cancelled else energy_left, cancelled)


def careful_vectors(matrix: Tensor, basis: Tensor, images: Tensor, gram: Tensor, gaps: Tensor) -> LeadingVectors:
    """The leading Ritz vectors of ``A (n, k)``, as many as ``gaps``, and the energy that they leave, in full.

    For ``basis`` Q, ``images`` ``Aᵀ Q`` and ``gram`` ``Qᵀ A Aᵀ Q`` with ``QᵀQ`` as it is: the 1e-7 that float32 leaves between
    two columns turns the vector of a large ``σ₁`` out of the span.
    """
    lower = torch.linalg.cholesky(wide_product(basis, basis))
    half = torch.linalg.solve_triangular(lower, gram, upper=False)
    values, rotation = _descending(torch.linalg.solve_triangular(lower, half.T, upper=False))
    rotation = torch.linalg.solve_triangular(lower.T, rotation[:, : len(gaps)], upper=True).to(matrix.dtype)
    vectors, inside = basis @ rotation, (images @ rotation).T
    parts = (slice(begin, begin + _ROWS) for begin in range(0, len(vectors), _ROWS))
    left = sum(energy(torch.addmm(matrix[rows], vectors[rows], inside, alpha=-1.0)) for rows in parts)
    return LeadingVectors(values[: len(gaps)], vectors, gaps, left)


def normal_numbers(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers ``(rows, columns)``, drawn on the CPU: the same on every device."""
    numbers = torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32)
    return numbers.to(like.device, like.dtype)


def _outside(basis: Tensor, block: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns orthogonal to ``basis``: of what ``block`` adds to it, random where that is nothing. Twice is enough,
    unless little was left the second time: such a column was rounding, and a random one replaces it."""
    block, _ = orthonormal(block - basis @ (basis.T @ block))
    while True:
        block, kept = orthonormal(block - basis @ (basis.T @ block))
        lost = kept < 0.5
        if not bool(lost.any()):
            return block
        block = torch.where(lost, normal_numbers(block.shape[0], block.shape[1], generator, block), block)


def _descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, in float64, and eigenvectors in the dtype of ``matrix``."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).to(torch.float64).clamp_min(0.0), vectors.flip(1)


def _widened(tensor: Tensor, needed: int, used: int) -> Tensor:
    wider = tensor.new_empty(len(tensor), max(needed, tensor.shape[1] * 3 // 2))
    wider[:, :used] = tensor[:, :used]
    return wider


def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the span of ``columns (n, b)``, and how much each adds to those before it ``(b,)``. By Cholesky
    of their Gram, several times as fast as Householder's QR, which takes over where that fails."""
    lower, failed = torch.linalg.cholesky_ex(columns.T @ columns)
    if int(failed) == 0:
        solved: Tensor = torch.linalg.solve_triangular(lower.T, columns, upper=True, left=False)
        return solved, lower.diagonal()
    q, r = torch.linalg.qr(columns)
    return q, r.diagonal().abs()


def complement_gain(matrix: Tensor, top: LeadingVectors, seed: int, *, squared: bool = False) -> float:
    """The energy that ``top`` would gain by taking in directions found by chance outside it, in place of its last ones.

    ``Y = (P A Aᵀ)^3 P Ω`` with ``P = I − U Uᵀ`` and 8 random vectors, then Rayleigh-Ritz in its span: ``Σ (ρ_j − θ_{r+1−j})₊``.
    The weight of a given direction in ``Ω`` is χ² with 8 degrees of freedom: below 1/8 of its mean once in 600 probes.
    With that weight, where all else is flat, a direction counts in full from 6 times the ``θ_r`` on for ``n`` of 4,096.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(NUM_PROBES, min(matrix.shape) - len(top.values))
    probe = normal_numbers(len(matrix), count, generator, matrix)
    # A few rows times a matrix go several times as fast as the matrix times a few columns.
    for _ in range(_PROBE_STEPS):
        probe, _ = orthonormal(probe - top.vectors @ (top.vectors.T @ probe))
        image = probe.T @ matrix
        probe = (image if squared else image @ matrix.T).T
    probe = _outside(top.vectors, probe, generator)
    image = (probe.T @ matrix).to(torch.float64)
    outside, _ = _descending(image @ (probe.to(torch.float64) if squared else image.T))
    last = top.values.flip(0)[:count]
    return float((outside[: len(last)] - last).clamp_min(0.0).sum())
