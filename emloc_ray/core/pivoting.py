"""Pivoted storage of factors: the same product with r² fewer numbers.

A product ``W_E = up @ down`` of rank r has r rows that span all rows. These are kept as they are, and the others as
combinations of them. ``P`` is the permutation that puts all rows back in their places:

    W_E = P [I; T] W_p          W_p (r, in): rows of W_E      T (out − r, r): the others in terms of these

These are ``r (out + in − r)`` numbers, where ``up`` and ``down`` have ``r (out + in)``: no more than the weight at any rank.
(An interpolative decomposition of ``upᵀ``: Cheng, Gimbutas, Martinsson and Rokhlin 2005,
https://doi.org/10.1137/030602678; PIFA stores low-rank layers so, https://arxiv.org/abs/2501.19090.)

Rows are chosen so that no element of ``T`` is far above 1, so that rounding of ``W_p`` and ``T`` is not amplified. Gaussian
elimination with row pivoting finds nearly such rows. Then, while an element of ``T`` is larger, the two rows that it
relates change places, which multiplies the chosen rows' volume by that element (Goreinov and Tyrtyshnikov 2001, "The
maximal-volume concept in approximation by low-rank matrices").
"""

from typing import NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.factorization import LowRankFactors
from emloc_ray.core.precision import has_fast_float64

LARGEST = 1.2  # element of T that is left: at 1 rounding could make exchanges endless


class PivotedFactors(NamedTuple):
    """``W_E = [down; up @ down]`` with its rows in ``order``: ``up (out − r, r)``, ``down (r, in)``, ``order (out,)`` int32."""

    up: Tensor
    down: Tensor
    order: Tensor

    def product(self) -> Tensor:
        """``W_E (out, in)``, in the dtype of the factors."""
        return torch.cat([self.down, self.up @ self.down]).index_select(0, self.order)

    def plain(self) -> LowRankFactors:
        """``up (out, r)``, among whose rows are those of the identity, and ``down``."""
        identity = torch.eye(self.up.shape[1], dtype=self.up.dtype, device=self.up.device)
        return LowRankFactors(torch.cat([identity, self.up]).index_select(0, self.order), self.down)


def pivot(factors: LowRankFactors) -> PivotedFactors:
    """Pivots ``up (out, r)`` and ``down (r, in)``: in the factors' dtype, on their device. Computed in float64, on the CPU where
    the device is slow in it. Raises ValueError where ``r ≥ out``."""
    device = factors.up.device
    place = device if has_fast_float64(device) else torch.device("cpu")
    up, down = (part.detach().to(place, torch.float64) for part in factors)
    out_features, rank = up.shape
    if rank >= out_features:
        raise ValueError(f"Factors of rank {rank} with {out_features} rows have none to make of the others.")
    rows, made = _eliminated(up)
    _exchange(rows, made)
    order = torch.empty(out_features, dtype=torch.int32, device=place)
    order[rows] = torch.arange(out_features, dtype=torch.int32, device=place)
    stored = factors.down.dtype
    return PivotedFactors(made.to(device, stored), (up[rows[:rank]] @ down).to(device, stored), order.to(device))


def _eliminated(up: Tensor) -> tuple[Tensor, Tensor]:
    """All rows of ``up (out, r)``, those first that elimination picks, and ``T (out − r, r)``: ``P up = L U`` with ``L`` unit
    lower trapezoidal, ``T = L₂ L₁⁻¹``, whatever the rank of ``up`` is."""
    rank = up.shape[1]
    packed, pivots, _ = torch.linalg.lu_factor_ex(up)
    places = list(range(len(up)))
    for place, other in enumerate((pivots - 1).tolist()):
        places[place], places[other] = places[other], places[place]
    made = torch.linalg.solve_triangular(packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True)
    return torch.tensor(places, device=up.device), made


def _exchange(rows: Tensor, made: Tensor) -> None:
    """Lets rows change places, in place, while an element of ``made`` (T) is above :data:`LARGEST`. With ``t = T_ab``, row a of
    the others for row b of the chosen: ``T ← T − T_:b (T_a: − e_b) / t``, a rank-one update."""
    rank = made.shape[1]
    while True:
        a, b = divmod(int(made.abs().argmax()), rank)
        largest = float(made[a, b])
        if not abs(largest) > LARGEST:  # a NaN ends it too
            return
        row, column = made[a].clone(), made[:, b].clone()
        change = row.clone()
        change[b] -= 1.0
        made.addr_(column, change, alpha=-1.0 / largest)
        made[a] = row / -largest
        made[a, b] = 1.0 / largest
        rows[[b, rank + a]] = rows[[rank + a, b]]
