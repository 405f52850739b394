"""The multiple-choice knapsack: of every item one choice, the least loss together within a budget of bytes.

Its relaxation gives a bound and nearly the answer: with a price ``λ`` of a byte every item takes the choice of least
``loss + λ cost``, and ``Σ_i min_k (loss_ik + λ cost_ik) − λ budget`` bounds the loss of all choices within the budget from below,
for every ``λ`` (Everett 1963; Sinha and Zoltners 1979). A choice whose ``loss + λ cost`` lies above its item's least by more than
the gap between the two is in no better answer (Pisinger 1995). The few that are left go to HiGHS' branch and bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_PRICES = 200  # that are tried: the interval of the best price's logarithm is halved each time
_SWAPS = 64
_UNITS = 2**24  # that a budget is counted in, at most: exact in the solver's tolerance
_RELATIVE_GAP = 1e-4  # of the loss
_SECONDS = 10.0

Values: TypeAlias = npt.NDArray[np.float64]
Picks: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The choice of every item, their cost and loss together, and a lower bound on the loss of any packing within the
    budget."""

    picks: tuple[int, ...]
    used: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the loss can lie above the optimum, as a share of it; 0 where nothing is lost."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def pack(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> Packing:
    """The choices that lose least at a cost of at most ``budget``; where HiGHS runs out of time, the best that is known. Raises
    ValueError where the cheapest choices cost more."""
    cheapest = sum(min(each) for each in costs)
    if cheapest > budget:
        raise ValueError(f"The cheapest choices of {len(costs)} items cost {cheapest}, above the budget of {budget}.")
    if not costs:
        return Packing((), 0, 0.0, 0.0)
    table = _Table(costs, losses)
    picks, price, bound = table.relaxed(budget)
    picks = table.swapped(picks, budget)
    gap = table.loss(picks) - bound
    if gap > _RELATIVE_GAP * abs(bound):
        better = table.solved(price, gap, budget)
        if better is not None:
            better = table.swapped(better, budget)
            picks = min(picks, better, key=table.loss)
    return table.packing(picks, bound)


class _Table:
    """All choices one after the other, those of an item by ascending cost."""

    def __init__(self, costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> None:
        self.orders = [np.lexsort((loss, cost)) for cost, loss in zip(costs, losses, strict=True)]
        self.cost = np.concatenate([np.asarray(c, np.int64)[o] for c, o in zip(costs, self.orders, strict=True)])
        least = [min(each) for each in losses]
        self.lost_anyway = float(sum(least))  # by any choice: no part of what the answer is measured by
        self.lost = np.concatenate(
            [np.asarray(x, np.float64)[o] - low for x, o, low in zip(losses, self.orders, least, strict=True)]
        )
        lengths = np.array([len(order) for order in self.orders])
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.item = np.repeat(np.arange(len(lengths)), lengths)

    def loss(self, picks: Picks) -> float:
        """What picks lose beyond what is lost anyway."""
        return float(self.lost[picks].sum())

    def packing(self, picks: Picks, bound: float) -> Packing:
        """The packing with each pick as its number among the item's choices as they were given."""
        numbers = tuple(int(o[p]) for o, p in zip(self.orders, picks - self.starts, strict=True))
        loss = self.loss(picks)
        return Packing(
            numbers, int(self.cost[picks].sum()), loss + self.lost_anyway, min(bound, loss) + self.lost_anyway
        )

    def least(self, values: Values) -> Picks:
        """The first choice of least value of every item."""
        lowest = np.minimum.reduceat(values, self.starts)[self.item]
        places = np.flatnonzero(values <= lowest)
        return places[np.searchsorted(self.item[places], np.arange(len(self.starts)))]

    def relaxed(self, budget: int) -> tuple[Picks, float, float]:
        """Picks within the budget, the price that they are of, and the bound."""
        at_no_price = self.least(self.lost)
        if self.cost[at_no_price].sum() <= budget:
            return at_no_price, 0.0, self.loss(at_no_price)
        positive = self.lost[self.lost > 0]
        low, high = np.log(positive.min()) - np.log(self.cost.max()) - 1, np.log(positive.max()) + 1
        dear, picks, bound, price = at_no_price, self.least(self.cost.astype(np.float64)), 0.0, float(np.exp(high))
        for _ in range(_PRICES):
            middle = (low + high) / 2
            priced = self.lost + np.exp(middle) * self.cost
            cheapest = self.least(priced)
            least = float(priced[cheapest].sum() - np.exp(middle) * budget)
            if least > bound:
                bound, price = least, float(np.exp(middle))
            if self.cost[cheapest].sum() <= budget:
                high, picks = middle, cheapest
            else:
                low, dear = middle, cheapest
        return self._upgraded(picks, dear, budget), price, bound

    def _upgraded(self, picks: Picks, dear: Picks, budget: int) -> Picks:
        """Takes as many picks of a lower price as fit, first those that save most a byte."""
        more, saved = self.cost[dear] - self.cost[picks], self.lost[picks] - self.lost[dear]
        items = np.flatnonzero((more > 0) & (saved > 0))
        left, made = budget - int(self.cost[picks].sum()), picks.copy()
        for item in items[np.argsort(-saved[items] / more[items], kind="stable")]:
            if more[item] <= left:
                made[item], left = dear[item], left - int(more[item])
        return made

    def swapped(self, picks: Picks, budget: int) -> Picks:
        """After single changes of an item's choice, the one that saves most first, until none that fits saves anything."""
        made = picks.copy()
        for _ in range(_SWAPS):
            left = budget - int(self.cost[made].sum())
            saved = self.lost[made][self.item] - self.lost
            saved[self.cost - self.cost[made][self.item] > left] = 0.0
            best = int(saved.argmax())
            if saved[best] <= 0:
                break
            made[self.item[best]] = best
        return made

    def solved(self, price: float, gap: float, budget: int) -> Picks | None:
        """HiGHS' answer among the choices that may be in one that is better by any part of ``gap``; None where it has none."""
        priced = self.lost + price * self.cost
        lowest = np.minimum.reduceat(priced, self.starts)[self.item]
        places = np.flatnonzero(priced <= lowest + gap * (1 + 1e-9))
        unit = max(1.0, budget / _UNITS)
        counted = np.ceil(self.cost[places] / unit)  # never less than they cost
        rows = csr_array((np.ones(len(places)), (self.item[places], np.arange(len(places)))))
        result = milp(
            self.lost[places] / gap,
            constraints=[
                LinearConstraint(rows, 1, 1),
                LinearConstraint(csr_array(counted[None]), -np.inf, np.floor(budget / unit)),
            ],
            integrality=np.ones(len(places)),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": _RELATIVE_GAP},
        )
        if result.x is None:
            return None
        taken = places[np.asarray(result.x) > 0.5]
        fits = len(taken) == len(self.starts) and self.cost[taken].sum() <= budget
        return taken if fits else None
