"""Which linear gets how many ranks: the same parameters in all, spent where they gain most.

Each linear has a curve: what it gains by its first r ranks, at ``r (out + in)`` parameters (pivoted: ``r (out + in − r)``),
and dense, at ``out · in``, by all of them. With the eigenvalues ``λ_i`` of ``S^½ W G Wᵀ S^½`` over N tokens
(:mod:`emloc_ray.core.two_sided`) the i-th rank saves
``½ λ_i / N`` nats of the KL divergence between the model's predictions and the emulator's, so that gains of different
linears may be added up and held against each other. Plain factors do not gain these: their i-th rank takes the eigenvector
``u_i`` of ``W G Wᵀ``, with eigenvalue ``μ_i``, and saves ``½ μ_i u_iᵀ S u_i / N``.

A budget is spent best along the upper concave hulls of the curves, steepest piece first: the greedy solution of the
knapsack's relaxation (Dantzig 1957), which no allocation of that budget can exceed.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc_ray.core.factorization import scaled_weight
from emloc_ray.core.precision import has_fast_float64
from emloc_ray.core.ranks import Storage, factor_parameters
from emloc_ray.core.two_sided import output_whitened
from emloc_ray.core.whitening import Whitening


def spectrum(weight: Tensor, whitening: Whitening, outputs: Whitening, *, name: str = "the layer") -> Tensor:
    """The eigenvalues of ``S_d^½ W G Wᵀ S_d^½``, with ``G`` and ``S`` damped as in :class:`Whitening`: ``(min(out, in),)``,
    descending, float64.

    Raises NumericsError where the weight holds a NaN or an Inf, ValueError where shapes do not fit.
    """
    whitening.check_reads(weight, name)
    inside, scale = scaled_weight(output_whitened(weight, outputs), name)
    values = torch.linalg.eigvalsh(_smaller_side(inside, whitening)[0])
    if _is_lost_in_rounding(values):
        values = torch.linalg.eigvalsh(_smaller_side(*_in_float64(inside, whitening))[0]).to(weight.device)
    gains: Tensor = values.to(torch.float64).flip(0).clamp_min(0.0) * (scale * scale * whitening.scale * outputs.scale)
    return gains


def plain_gains(weight: Tensor, whitening: Whitening, outputs: Whitening, *, name: str = "the layer") -> Tensor:
    """What each rank of the plain factors saves of ``tr(S_d Δ G Δᵀ)``: ``μ_i u_iᵀ S_d u_i``, ``(min(out, in),)``, float64.

    With ``μ_i`` and ``u_i`` of ``W G Wᵀ``, ``μ_i`` descending. A later rank may save more than one before it. Raises
    NumericsError where the weight holds a NaN or an Inf, ValueError where shapes do not fit.
    """
    whitening.check_reads(weight, name)
    inside, scale = scaled_weight(weight.detach().to(torch.float32), name)
    _, parts = energy_vectors(inside, whitening)
    saved = output_whitened(parts, outputs).to(torch.float64).square().sum(dim=0)
    return saved * (scale * scale * whitening.scale * outputs.scale)


def energy_vectors(weight: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    """The eigenvalues ``μ_i`` of ``W G' Wᵀ``, descending, ``(min(out, in),)``, float64, and ``μ_i^½ u_i`` in columns. In
    float32, or in float64 where that would lose too many of them."""
    values, parts = _scaled_vectors(weight, whitening)
    if _is_lost_in_rounding(values):
        values, parts = _scaled_vectors(*_in_float64(weight, whitening))
    return values.to(weight.device, torch.float64).flip(0).clamp_min(0.0), parts.to(weight.device).flip(1)


def _in_float64(inside: Tensor, whitening: Whitening) -> tuple[Tensor, Whitening]:
    """The matrix and the whitening in float64, on the CPU where the device's is slow."""
    if not has_fast_float64(inside.device):
        inside, whitening = inside.cpu(), whitening.on_cpu()
    return inside.to(torch.float64), whitening


def _smaller_side(weight: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor | None]:
    """``W G' Wᵀ``, or for ``out > in`` the matrix ``(W L)ᵀ W L`` of the same eigenvalues, and ``W L``; ``L Lᵀ = G'``."""
    if weight.shape[0] <= weight.shape[1]:
        return whitening.outer(weight), None
    whitened = whitening.whiten(weight)
    return whitened.T @ whitened, whitened


def _scaled_vectors(weight: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor]:
    """The eigenvalues ``μ_i`` of ``W G' Wᵀ``, ascending, and ``μ_i^½ u_i`` in columns."""
    matrix, whitened = _smaller_side(weight, whitening)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors * values.clamp_min(0.0).sqrt() if whitened is None else whitened @ vectors


def _is_lost_in_rounding(values: Tensor) -> bool:
    """Whether float32 is too narrow for eigenvalues, in ascending order.

    Its rounding error, about ``u λ₁`` in each, is then over 1 % of the one a quarter from the top: about the last rank that a
    linear keeps at ratio 0.5.
    """
    unit_roundoff = torch.finfo(torch.float32).eps / 2.0
    return bool(unit_roundoff * values[-1] > 0.01 * values[-1 - len(values) // 4])


@dataclass(frozen=True)
class Curve:
    """What a linear's ranks gain and cost.

    Attributes:
        name: the linear.
        out_features, in_features: of its weight.
        gains: of each rank, ``(min(out, in),)``, not negative; dense gains their sum.
        may_be_dense: whether it may be left as it is.
        storage: how its factors would be stored.
        multiple: of which its ranks are multiples.
    """

    name: str
    out_features: int
    in_features: int
    gains: Tensor
    may_be_dense: bool = True
    storage: Storage = "factors"
    multiple: int = 1

    @property
    def dense(self) -> int:
        """Parameters of the weight."""
        return self.out_features * self.in_features

    @property
    def least(self) -> int:
        """The lowest rank: the multiple, or 1 where that would be no smaller than the weight."""
        return self.multiple if self.multiple <= self._limit else 1

    @property
    def highest(self) -> int:
        """The highest rank whose factors are smaller than the weight; at least 1."""
        return max(self.least, self._limit - self._limit % self.multiple)

    @property
    def _limit(self) -> int:
        if self.storage == "pivoted":
            return max(1, min(self.out_features, self.in_features) - 1)
        return max(1, (self.dense - 1) // (self.out_features + self.in_features))

    def cost(self, rank: int | None) -> int:
        """Parameters at a rank; of the weight where that is None."""
        return factor_parameters(self.out_features, self.in_features, rank, self.storage)

    def gain(self, rank: int | None) -> float:
        """What a rank gains, with all before it; dense all of them."""
        return float((self.gains if rank is None else self.gains[:rank]).sum())


@dataclass(frozen=True)
class Allocation:
    """The rank of every linear (None: it stays dense), what all of them cost, and what they gain together."""

    ranks: dict[str, int | None]
    used: int
    gain: float


def allocate(curves: Sequence[Curve], budget: int, fallback: Mapping[str, int | None]) -> Allocation:
    """The ranks that gain most at a cost of at most ``budget`` parameters; every linear has its least rank or more.

    Greedy along the hulls, then by the best single step that still fits, until none does. The gain is at least that of
    ``fallback``, an allocation within the budget, from which it starts where pieces too large to fit would have the greedy
    solution below it, and at most one piece of a hull below the relaxation's bound. Ties go by the order of ``curves``. Raises
    ValueError where the budget does not hold a rank for each, or not the fallback.
    """
    least = {curve.name: curve.least for curve in curves}
    if sum(curve.cost(curve.least) for curve in curves) > budget:  # ranks below their multiples
        least = {name: min(rank or least[name], least[name]) for name, rank in fallback.items()}
    greedy = _filled(curves, _greedy(curves, least, budget), budget)
    filled_fallback = _filled(curves, dict(fallback), budget)
    return max(greedy, filled_fallback, key=lambda allocation: allocation.gain)


def _greedy(curves: Sequence[Curve], least: Mapping[str, int], budget: int) -> dict[str, int | None]:
    """Pieces of the hulls in the order of their slopes; one that does not fit is left out."""
    ranks: dict[str, int | None] = dict(least)
    left = budget - sum(curve.cost(ranks[curve.name]) for curve in curves)
    pieces = [(curve, *piece) for curve in curves for piece in _hull(curve, least[curve.name])]
    slopes = torch.tensor([slope for *_, slope in pieces], dtype=torch.float64)
    for index in torch.sort(slopes, descending=True, stable=True).indices.tolist():
        curve, before, rank, _ = pieces[index]
        cost = curve.cost(rank) - curve.cost(before)
        if ranks[curve.name] == before and cost <= left:
            ranks[curve.name], left = rank, left - cost
    return ranks


def _hull(curve: Curve, least: int) -> Iterator[tuple[int, int | None, float]]:
    """The pieces of the upper concave hull after the ``least`` rank, by the ranks that each begins and ends in, and its slope.
    (The monotone chain of Andrew 1979.)"""
    sums = [0.0, *curve.gains.cumsum(0).tolist()]
    corners: list[tuple[int, int, float]] = []  # rank, cost, gain
    above = range(least - least % curve.multiple + curve.multiple, curve.highest + 1, curve.multiple)
    ends = [(rank, curve.cost(rank), sums[rank]) for rank in (least, *above)]
    whole = len(sums)  # stands for dense
    if curve.may_be_dense and curve.dense > ends[-1][1]:
        ends.append((whole, curve.dense, sums[-1]))
    for end in ends:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) < _slope(corners[-1], end):
            corners.pop()
        corners.append(end)
    for begin, end in itertools.pairwise(corners):
        yield begin[0], None if end[0] == whole else end[0], _slope(begin, end)


def _slope(begin: tuple[int, int, float], end: tuple[int, int, float]) -> float:
    return (end[2] - begin[2]) / (end[1] - begin[1])


def _filled(curves: Sequence[Curve], ranks: dict[str, int | None], budget: int) -> Allocation:
    """Single steps, a rank or all the rest of a linear, by what they gain a parameter, until none fits."""
    left = budget - sum(curve.cost(ranks[curve.name]) for curve in curves)
    if left < 0:
        raise ValueError(f"A budget of {budget} parameters is {-left} short of what {len(curves)} linears need.")
    steps = {curve.name: list(_steps(curve, ranks[curve.name])) for curve in curves}
    while True:
        fitting = [
            (slope, curve, rank, cost) for curve in curves for rank, cost, slope in steps[curve.name] if cost <= left
        ]
        if not fitting:
            break
        _, curve, rank, cost = max(fitting, key=lambda step: step[0])
        ranks[curve.name], left = rank, left - cost
        steps[curve.name] = list(_steps(curve, rank))
    return Allocation(ranks, budget - left, sum(curve.gain(ranks[curve.name]) for curve in curves))


def _steps(curve: Curve, rank: int | None) -> Iterator[tuple[int | None, int, float]]:
    """What may come after a rank: the next one, and dense; each with its cost and its gain a parameter."""
    if rank is None:
        return
    higher = rank - rank % curve.multiple + curve.multiple
    if higher <= curve.highest:
        step = curve.cost(higher) - curve.cost(rank)
        yield higher, step, float(curve.gains[rank:higher].sum()) / step
    cost = curve.dense - curve.cost(rank)
    if curve.may_be_dense and cost > 0:
        yield None, cost, float(curve.gains[rank:].sum()) / cost
