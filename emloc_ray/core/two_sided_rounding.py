"""Integers in the metric of the model's predictions: ``tr(S Δ G Δᵀ)`` instead of ``tr(Δ G Δᵀ)``.

With ``S = M Mᵀ (out, out)`` and ``G = L Lᵀ (in, in)``, ``M`` and ``L`` lower triangular,

    tr(S Δ G Δᵀ) = ‖Mᵀ Δ L‖² = Σ_ik M_ii² L_kk² (t_ik − ŵ_ik)²

    t_ik = w_ik + Σ_{l > k} Δ_il L_lk / L_kk + Σ_{j > i} U_jk M_ji / M_ii,        U_jk = Δ_jk + Σ_{l > k} Δ_jl L_lk / L_kk

so that each weight is rounded to the nearest of ``t``, the last row and column first: Babai's nearest plane of the Kronecker
product ``S ⊗ G``. GPTQ is the case ``S = I``. YAQA (https://arxiv.org/abs/2505.22988) was first to feed errors back on both
sides, with ``S`` and ``G`` of the Hessian of the predictions' KL divergence, and reports 30 % less of it.

Weights of one anti-diagonal hear nothing of each other and are rounded at once: that takes ``out + in`` steps instead of
``out · in``. Blocks of 64 × 64 hear of all others by matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emloc_ray.core.integers import IntegerWeight, scale_values, zero_values
from emloc_ray.core.whitening import Whitening

_BLOCK = 64
# What is fitted to the gradients of few tokens alone is lost elsewhere. With 28 linears of SmolLM2-135M rounded by 128 rows, the
# held-out KL of completions in nats was, at 1 and 3, 0.0915 and 0.0916 in 2 bits (0.0965 under ``G`` alone), 0.0778 and 0.0756
# under a budget of 2.4 bits (0.0827); by 64 rows, at 1 and 4, 0.1064 and 0.0944 in 2 bits (0.0939 under ``G`` alone).
OUTPUT_DAMPENING_FRAC = 3.0


def by_planes_of_both(
    weight: Tensor, inputs: Whitening, outputs: Whitening, grid: IntegerWeight, dampening_frac: float
) -> Tensor:
    """The codes ``(out, in)`` of ``weight`` at the scales of ``grid``, uint8.

    ``inputs`` is the whitening of ``G``, damped by ``dampening_frac`` here, ``outputs`` that of ``S``, damped by
    :data:`OUTPUT_DAMPENING_FRAC`. Rows and columns of more energy are rounded first.
    """
    rows, output_feed = _feed(outputs, OUTPUT_DAMPENING_FRAC)
    columns, input_feed = _feed(inputs, dampening_frac)
    ordered = _in_blocks(weight[rows][:, columns])
    lacking = ordered.shape[0] - len(rows), ordered.shape[1] - len(columns)
    scales, zeros = scale_values(grid.scales, grid.exponent), zero_values(grid.zeros, grid.bits)
    rounding = _Rounding(
        ordered,
        _in_blocks(input_feed),
        _in_blocks(output_feed),
        torch.nn.functional.pad(scales[rows], (0, 0, 0, lacking[0]), value=1.0),
        torch.nn.functional.pad(zeros[rows], (0, 0, 0, lacking[0])),
        torch.nn.functional.pad(columns // grid.group_size, (0, lacking[1])),
        2**grid.bits - 1,
    )
    codes = rounding.codes()[: len(rows), : len(columns)]
    return codes[rows.argsort()][:, columns.argsort()].contiguous()


def row_weights(outputs: Whitening) -> Tensor:
    """How much each row's own rounding errors count in ``tr(S_d Δ G Δᵀ)`` once those before it were fed back, ``(out,)``, in
    float64.

    Rounding is under ``S' = S_d + δ I = m D² mᵀ``, ``m`` unit lower triangular, so that errors ``e`` become ``Δ = m⁻ᵀ e`` and
    count by the diagonal of ``m⁻¹ S_d m⁻ᵀ = D² − δ m⁻¹ m⁻ᵀ``.
    """
    order, root = outputs.root_by_energy(OUTPUT_DAMPENING_FRAC)
    whole = torch.eye(len(order), dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root / root.diagonal(), whole, upper=False, unitriangular=True)
    added = OUTPUT_DAMPENING_FRAC - outputs.dampening_frac
    counted = root.diagonal().double().square() - added * inverse.square().sum(dim=1, dtype=torch.float64)
    return counted.clamp_min_(0.0)[order.argsort()]


def fed_back(errors: Tensor, outputs: Whitening) -> Tensor:
    """``Δ = m⁻ᵀ e (out, in)`` of the rows' own rounding errors ``e``; see :func:`row_weights`."""
    rows, feed = _feed(outputs, OUTPUT_DAMPENING_FRAC)
    spread: Tensor = torch.linalg.solve_triangular(feed.T, errors[rows], upper=False, unitriangular=True)
    return spread[rows.argsort()]


def _feed(whitening: Whitening, dampening_frac: float) -> tuple[Tensor, Tensor]:
    """The order in which features are rounded, ``(n,)``, and by what the error of each is fed to those after it, ``(n, n)``,
    strictly upper triangular."""
    order, root = whitening.root_by_energy(dampening_frac)
    return order.flip(0), (root / root.diagonal()).tril_(-1).flip(0, 1)


def _in_blocks(matrix: Tensor) -> Tensor:
    """With zeros up to whole blocks: what is rounded there is fed to nothing."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % _BLOCK, 0, -matrix.shape[0] % _BLOCK))


class _Rounding:
    """A weight ``(out, in)``, what feeds errors back, and the grid, all in the order of rounding: scales and zero points by row
    and group, and the group of each column."""

    def __init__(
        self,
        weight: Tensor,
        input_feed: Tensor,
        output_feed: Tensor,
        scales: Tensor,
        zeros: Tensor,
        groups: Tensor,
        top: int,
    ) -> None:
        self.weight, self.input_feed, self.output_feed = weight, input_feed, output_feed
        self.scales, self.zeros, self.groups, self.top = scales, zeros, groups, top
        self.differences = torch.zeros_like(weight)  # Δ
        self.seen = torch.zeros_like(weight)  # U: Δ with what is fed from the columns before
        self.made = torch.zeros_like(weight, dtype=torch.uint8)

    def codes(self) -> Tensor:
        """All codes, an anti-diagonal of blocks after the other."""
        down, across = (size // _BLOCK for size in self.weight.shape)
        for diagonal in range(down + across - 1):
            rows = range(max(0, diagonal - across + 1), min(down - 1, diagonal) + 1)
            self._round([(_span(row), _span(diagonal - row)) for row in rows])
        return self.made

    def _round(self, blocks: list[tuple[slice, slice]]) -> None:
        """Rounds blocks that hear nothing of each other."""
        made = _rounded_blocks(
            torch.stack([self.weight[block] for block in blocks]),
            torch.stack([self.differences[i, : k.start] @ self.input_feed[: k.start, k] for i, k in blocks]),
            torch.stack([self.output_feed[: i.start, i].T @ self.seen[: i.start, k] for i, k in blocks]),
            torch.stack([self.input_feed[k, k].T for _, k in blocks]),
            torch.stack([self.output_feed[i, i].T for i, _ in blocks]),
            torch.stack([self.scales[i][:, self.groups[k]] for i, k in blocks]),
            torch.stack([self.zeros[i][:, self.groups[k]] for i, k in blocks]),
            self.top,
        )
        for block, differences, seen, codes in zip(blocks, *made, strict=True):
            self.differences[block], self.seen[block], self.made[block] = differences, seen, codes


def _span(number: int) -> slice:
    return slice(number * _BLOCK, (number + 1) * _BLOCK)


def _rounded_blocks(
    weight: Tensor,
    fed: Tensor,
    above: Tensor,
    input_feed: Tensor,
    output_feed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``Δ``, ``U`` and the codes of blocks ``(n, 64, 64)``; ``fed`` and ``above`` are what other blocks' columns and rows feed.

    With the columns backwards an anti-diagonal is a diagonal, of which torch has a view, and its weights' rows and columns
    are slices.
    """
    weight, fed, above, scales, zeros = (part.flip(2) for part in (weight, fed, above, scales, zeros))
    input_feed = input_feed.flip(1, 2)  # by column, of columns
    targets = weight + fed + above
    differences, codes = torch.zeros_like(weight), torch.zeros_like(weight)
    seen = torch.zeros_like(weight)  # transposed: by column, of rows
    for offset in range(_BLOCK - 1, -_BLOCK, -1):
        row, column = slice(max(0, -offset), _BLOCK - max(0, offset)), slice(max(0, offset), _BLOCK + min(0, offset))
        from_columns = (differences[:, row] * input_feed[:, column]).sum(-1)
        from_rows = (seen[:, column] * output_feed[:, row]).sum(-1)
        scale, zero = scales.diagonal(offset, 1, 2), zeros.diagonal(offset, 1, 2)
        code = targets.diagonal(offset, 1, 2) + from_columns + from_rows
        code = code.div_(scale).add_(zero).round_().clamp_(0, top)
        difference = weight.diagonal(offset, 1, 2) - (code - zero) * scale
        codes.diagonal(offset, 1, 2).copy_(code)
        differences.diagonal(offset, 1, 2).copy_(difference)
        seen.diagonal(-offset, 1, 2).copy_(difference + fed.diagonal(offset, 1, 2) + from_columns)
    return differences.flip(2), seen.mT.flip(2), codes.flip(2).to(torch.uint8)
