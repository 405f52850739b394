"""Few bits a weight: the integers ``q`` that lose little of ``tr(Δ G Δᵀ)``, with ``Δ = W − s (q − z)``.

First GPTQ (https://arxiv.org/abs/2210.17323): columns are rounded one after another, each after what the rounding of those
before it did to the outputs was added to it. With ``G = L Lᵀ``, ``L`` lower triangular, and the last column first,

    ‖Δ L‖² = Σ_k L_kk² ‖t_k − ŵ_k‖²,        t_k = w_k + Σ_{j > k} Δ_j L_jk / L_kk

so that each column is rounded to the nearest of ``t_k``: Babai's nearest plane, as QuIP (https://arxiv.org/abs/2307.13304)
derives it, which needs no inverse of ``G``. Columns of more energy come first (GPTQ's ``act_order``), for later ones make
up for earlier ones; scales are fixed before, so that the order costs no index. ``G`` is damped by GPTQ's 1 % there: at
less, targets leave the range of few bits, and what is clipped is never made up for.

Then coordinate descent (QuantEase, https://arxiv.org/abs/2309.01885): each column anew, all others given, which can only
lower ``tr(Δ G Δᵀ)``; here without that damping.

``W ≈ Q + up down``: the best factors are those of ``W − Q`` under ``G``, in closed form (QERA,
https://arxiv.org/abs/2410.06040; CLoQ, https://arxiv.org/abs/2501.18475; LQER, https://arxiv.org/abs/2402.02446, weighs by the
diagonal).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emloc_ray.core.column_rounding import round_in_turn
from emloc_ray.core.factorization import LowRankFactors, factorize, scaled_weight
from emloc_ray.core.integer_forms import BITS, GROUP_SIZE, group_size_of, num_groups
from emloc_ray.core.integers import IntegerWeight, exponent_for
from emloc_ray.core.precision import exact_products
from emloc_ray.core.products import product_by_rows
from emloc_ray.core.two_sided import factorize_two_sided
from emloc_ray.core.unpacking import SCALE_STEPS, scale_values, zero_steps, zero_values
from emloc_ray.core.whitening import Whitening

# Ranges that are tried for a group, as shares of its own; each is then fitted once to the integers that it gives. In 8 bits
# clipping never pays, and a scale that the steps of 9 % round down clips: with a wider range the error is a third.
_SHARES = (0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
_SHARES_IN_8_BITS = (1.0, 1.05)
_ROWS = 64  # of a weight that scales are sought for at a time on a CPU: few enough for the cache
_ELEMENTS = 2**22  # of a weight, on a GPU
_COLUMNS = 64  # that are rounded one by one before the rest hears of it
DAMPENING_FRAC = 1e-2
_LEAST_DAMPENING = 1e-6  # of what factors see of the inputs
_SEEN = 5e-7  # of the mean energy, above the damping: less is its rounding in float32
_PASSES = 2  # of the descent: two more lower the error by another 1 %


@exact_products
def quantize(
    weight: Tensor, whitening: Whitening, bits: int, group_size: int = GROUP_SIZE, *, name: str = "the layer"
) -> IntegerWeight:
    """``weight (out, in)`` in integers of ``bits`` bits that lose little of ``tr(Δ G Δᵀ)``: no row more than by rounding it.

    Scales and zero points, of groups of ``group_size`` columns or a little less, minimise ``Σ_j G_jj Δ_j²`` of their group over
    some ranges. What is lost is measured on ``Δ`` itself, in float32. Raises NumericsError where the weight holds a NaN or an
    Inf, ValueError where shapes do not fit, the weight is empty or not of floats, bits are not 2, 3, 4 or 8, or the group is no
    multiple of 8; ``name`` is the layer's.
    """
    if bits not in BITS or group_size < 8 or group_size % 8:
        raise ValueError(f"{name} cannot be put into {bits} bits in groups of {group_size}.")
    whitening.check_reads(weight, name)
    scaled, scale = scaled_weight(weight.detach().to(torch.float32), name)
    grid = _grid(scaled, whitening, bits, group_size)
    codes = _nearest_codes(scaled, grid)
    if not whitening.is_identity:
        lost = _row_energies(scaled - grid.with_codes(codes).dense(), whitening)
        planes = _nearest_plane_codes(scaled, whitening, grid)
        better = _row_energies(scaled - grid.with_codes(planes).dense(), whitening) < lost
        codes = _descent_codes(scaled, whitening, grid, torch.where(better[:, None], planes, codes))
    exponent = grid.exponent + round(math.log2(scale))
    return IntegerWeight(codes, grid.scales, grid.zeros, exponent, bits, grid.group_size)


@exact_products
def quantize_factors(
    factors: LowRankFactors,
    weight: Tensor,
    whitening: Whitening,
    bits: int,
    group_size: int = GROUP_SIZE,
    *,
    name: str = "the layer",
) -> tuple[IntegerWeight, IntegerWeight]:
    """``up`` and ``down`` of ``weight ≈ up down`` in integers, rounded in turn.

    ``down`` first, under ``G``: with orthonormal columns of ``up`` what it loses is what the layer loses. Then ``up`` is fitted
    anew to what became of it, ``W G dᵀ (d G dᵀ)⁻¹``, and rounded under ``d G dᵀ (r, r)``. This holds what ``G`` is damped by, and
    is damped once more as little as can be: rows of ``d`` may be zero. It is solved in float64: where few tokens were seen,
    float32's rounding would be divided by the damping alone.
    """
    whitening.check_reads(weight, name)
    scaled, scale = scaled_weight(weight.detach().to(torch.float32), name)
    down = quantize(factors.down / scale, whitening, bits, group_size, name=name)
    kept = down.dense().to(torch.float64)
    seen = whitening.times(kept.T)
    inner = Whitening(kept @ seen, _LEAST_DAMPENING, name=name)
    up = torch.cholesky_solve(product_by_rows(scaled, seen).T / inner.scale, inner.root(torch.float64)).T
    restored = replace(down, exponent=down.exponent + round(math.log2(scale)))
    return quantize(up, inner, bits, group_size, name=name), restored


@exact_products
def quantize_with_factors(
    weight: Tensor,
    whitening: Whitening,
    bits: int,
    rank: int,
    factor_bits: int,
    group_size: int = GROUP_SIZE,
    *,
    outputs: Whitening | None = None,
    seed: int = 0,
    name: str = "the layer",
) -> tuple[IntegerWeight, IntegerWeight, IntegerWeight]:
    """``weight ≈ Q + up down``: ``Q`` in integers, and the factors ``up (out, r)`` and ``down (r, in)`` of what it leaves, in
    ``factor_bits``.

    With ``outputs`` the factors keep predictions (:mod:`emloc_ray.core.two_sided`); ``seed`` is that of the factorization's
    start.
    """
    whitening.check_reads(weight, name)
    wide = weight.detach().to(torch.float32)
    whole = quantize(wide, whitening, bits, group_size, name=name)
    residual = wide - whole.dense()
    if outputs is None:
        factors = factorize(residual, whitening, rank, seed=seed, name=name).factors
    else:
        factors = factorize_two_sided(residual, whitening, outputs, rank, seed=seed, name=name).factors
    return whole, *quantize_factors(factors, residual, whitening, factor_bits, group_size, name=name)


def _row_energies(difference: Tensor, whitening: Whitening) -> Tensor:
    """``Δ_i G' Δ_iᵀ`` of every row, ``(out,)``, float64."""
    return (difference @ whitening.matrix(torch.float32)).mul_(difference).sum(dim=1, dtype=torch.float64)


def _nearest_codes(weight: Tensor, grid: IntegerWeight) -> Tensor:
    """Each weight's nearest code, ``(out, in)``."""
    scales = scale_values(grid.scales, grid.exponent).repeat_interleave(grid.group_size, dim=1)[:, : weight.shape[1]]
    zeros = zero_values(grid.zeros, grid.bits).repeat_interleave(grid.group_size, dim=1)[:, : weight.shape[1]]
    return (weight / scales).add_(zeros).round_().clamp_(0, 2**grid.bits - 1).to(torch.uint8)


@dataclass(frozen=True)
class _Columns:
    """A weight and its grid by columns in some order, each next to itself in memory: ``(in, out)``."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    top: int

    def round(
        self, part: slice, targets: Tensor, mixing: Tensor, reference: Tensor, codes: Tensor, changes: Tensor
    ) -> None:
        """Rounds some of them by :func:`round_in_turn`."""
        groups = self.groups[part]
        round_in_turn(targets, mixing, reference, self.scales[groups], self.zeros[groups], self.top, codes, changes)


def _columns(weight: Tensor, grid: IntegerWeight, order: Tensor) -> _Columns:
    scales, zeros = scale_values(grid.scales, grid.exponent), zero_values(grid.zeros, grid.bits)
    groups = order // grid.group_size
    return _Columns(weight.T[order], scales.T.contiguous(), zeros.T.contiguous(), groups, 2**grid.bits - 1)


def _parts(count: int) -> Iterator[slice]:
    return (slice(begin, min(begin + _COLUMNS, count)) for begin in range(0, count, _COLUMNS))


def _nearest_plane_codes(weight: Tensor, whitening: Whitening, grid: IntegerWeight) -> Tensor:
    """Codes by Babai's nearest plane, ``(out, in)``."""
    order, root = whitening.root_by_energy(DAMPENING_FRAC)
    order = order.flip(0)  # the last column first: turned and transposed, the factor is lower triangular again
    columns = _columns(weight, grid, order)
    differences, codes = torch.empty_like(columns.weight), torch.empty_like(columns.weight, dtype=torch.uint8)
    for part in _parts(len(codes)):
        here, begin, end = columns.weight[part], len(root) - part.stop, len(root) - part.start
        gains = root[begin:, begin:end].flip(0, 1)  # turned here, and not at once: the whole would be as large again
        mixing = (gains / gains[part].diagonal()).T
        targets = torch.addmm(here, mixing[:, : part.start], differences[: part.start])
        columns.round(part, targets, mixing[:, part].contiguous(), here, codes[part], differences[part])
    return codes[order.argsort()].T.contiguous()


def _descent_codes(weight: Tensor, whitening: Whitening, grid: IntegerWeight, codes: Tensor) -> Tensor:
    """Codes ``(out, in)`` after some passes of coordinate descent, the columns of most energy first."""
    gram = whitening.matrix(torch.float32)  # in its own order: one by energy would be as large again
    order = gram.diagonal().argsort(descending=True, stable=True)
    columns, made = _columns(weight, grid, order), codes.T[order]
    differences = (weight - grid.with_codes(codes).dense()).T.contiguous()
    for _ in range(_PASSES):
        for part in _parts(len(made)):
            here = order[part]
            rows = gram[here]
            energies = gram.diagonal()[here, None].clamp_min(torch.finfo(torch.float32).tiny)  # zero where undamped
            reference = columns.weight[part] - differences[here]
            best = reference + (rows @ differences) / energies  # the slope, half the derivative by Δ, leads there
            changes = torch.empty_like(reference)
            columns.round(part, best, rows[:, here] / energies, reference, made[part], changes)
            differences[here] += changes
    return made[order.argsort()].T.contiguous()


def _grid(weight: Tensor, whitening: Whitening, bits: int, group_size: int) -> IntegerWeight:
    """Scales and zero points for all groups, without codes."""
    out_features, in_features = weight.shape
    groups = num_groups(in_features, group_size)
    size = group_size_of(in_features, groups)
    lacking = groups * size - in_features
    energies = whitening.diagonal()
    # Inputs that were never there say nothing, unless a group has no others; nor do those that fill up a row.
    energies = torch.where(energies - whitening.dampening_frac > _SEEN, energies, 0.0)
    energies = torch.nn.functional.pad(energies, (0, lacking)).view(groups, size)
    energies = torch.where(energies.sum(dim=1, keepdim=True) > 0, energies, 1.0)
    rows = torch.nn.functional.pad(weight, (0, lacking)).view(out_features, groups, size)
    exponent = exponent_for(2.0 * float(weight.abs().max()) / (2**bits - 1))
    at_once = _ROWS if weight.device.type == "cpu" else max(_ROWS, _ELEMENTS // in_features)
    parts = [_group_grid(part, energies, bits, exponent) for part in rows.split(at_once)]
    scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    nothing = torch.empty(out_features, in_features, dtype=torch.uint8, device="meta")
    return IntegerWeight(nothing, scales, zeros, exponent, bits, size)


def _group_grid(weight: Tensor, energies: Tensor, bits: int, exponent: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points ``(rows, groups)`` as codes, for ``weight (rows, groups, size)``."""
    top, steps = 2**bits - 1, zero_steps(bits)
    counted = weight * (energies > 0)
    low, high = counted.amin(-1, keepdim=True).clamp_max_(0), counted.amax(-1, keepdim=True).clamp_min_(0)
    mass = energies.sum(-1, keepdim=True)
    mean = (energies * weight).sum(-1, keepdim=True) / mass
    tiny = torch.finfo(torch.float32).tiny
    least, best_c, best_d = torch.full_like(mean, math.inf), torch.zeros_like(mean), torch.zeros_like(mean)
    for share in _SHARES_IN_8_BITS if bits == 8 else _SHARES:
        scale = (share / top) * (high - low)
        zero = -share * low / scale.clamp_min(tiny)
        for fitted in (False, True):
            c = (SCALE_STEPS * (scale.clamp_min_(tiny).log2_() - exponent)).round_().clamp_(0, 255)
            d = (zero * steps).round_().clamp_(0, top * steps)
            s, z = torch.exp2(c / SCALE_STEPS + exponent), d / steps
            q = (weight / s).add_(z).round_().clamp_(0, top)
            lost = (s * (q - z)).sub_(weight).square_().mul_(energies).sum(-1, keepdim=True)
            better = lost < least
            least = torch.where(better, lost, least)
            best_c, best_d = torch.where(better, c, best_c), torch.where(better, d, best_d)
            if not fitted:  # the line through the integers and their weights
                centre = (energies * q).sum(-1, keepdim=True) / mass
                q -= centre
                scale = (energies * q * weight).sum(-1, keepdim=True) / (energies * q * q).sum(-1, keepdim=True)
                scale = scale.nan_to_num_(0.0).clamp_min_(tiny)
                zero = centre - mean / scale
    return best_c[..., 0].to(torch.uint8), best_d[..., 0].to(torch.uint8)
