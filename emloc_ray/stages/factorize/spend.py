"""Spend: the form of every linear under one budget, of bytes or parameters, written as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emloc_ray.core.forms import Form
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.stages.factorize.knapsack import pack

RANKS, FORMS = "ranks.json", "forms.json"


@dataclass(frozen=True)
class Offer:
    """What a linear may be stored as: its ``forms``, what each costs, and the loss that is expected of each in nats a sample,
    ``(len(forms),)``, all zeros where the calibration says nothing of the linear. ``even``: its form at its own share of the
    budget."""

    forms: list[Form]
    costs: list[int]
    losses: Tensor
    even: Form

    @property
    def is_measured(self) -> bool:
        """Whether the calibration says anything of it."""
        return float(self.losses.sum()) > 0

    @property
    def even_pick(self) -> int:
        """The number of the even form."""
        return self.forms.index(self.even)


def read_ranks(directory: Path) -> dict[str, int | None]:
    """The ranks that :func:`spend` wrote, None for a linear that stays dense."""
    layers: dict[str, Any] = read_json(directory / RANKS)["layers"]
    return {name: layer["rank"] for name, layer in layers.items()}


def read_forms(directory: Path) -> dict[str, Form]:
    """The forms that :func:`spend` wrote."""
    layers: dict[str, Any] = read_json(directory / FORMS)["layers"]
    return {name: Form(layer["rank"], layer["bits"], layer["residual_rank"]) for name, layer in layers.items()}


def spend(offers: Mapping[str, Offer], budget: int, file: Path) -> dict[str, Any]:
    """Writes the ``file``: for every linear its form and the form's expected loss. Together the forms cost at most ``budget`` and
    lose least.

    A linear that the calibration says nothing of keeps its even form if all fit so, else takes its smallest one.
    """
    measured = {name: offer for name, offer in offers.items() if offer.is_measured}
    others = {name: offer for name, offer in offers.items() if name not in measured}
    picks = {name: offer.even_pick for name, offer in others.items()}
    left = budget - sum(min(offer.costs) for offer in measured.values())
    if sum(offer.costs[picks[name]] for name, offer in others.items()) > left:
        picks = {name: offer.costs.index(min(offer.costs)) for name, offer in others.items()}
    left = budget - sum(offer.costs[picks[name]] for name, offer in others.items())
    packed = pack([o.costs for o in measured.values()], [o.losses.tolist() for o in measured.values()], left)
    picks |= zip(measured, packed.picks, strict=True)
    forms = {name: offer.forms[picks[name]] for name, offer in offers.items()}
    losses = {name: float(offer.losses[picks[name]]) for name, offer in measured.items()}
    write_json(file, {"layers": {name: {**asdict(form), "loss": losses.get(name)} for name, form in forms.items()}})
    return {
        "budget": budget,
        "left": left - packed.used,
        "loss": packed.loss,
        "even_loss": sum(float(offer.losses[offer.even_pick]) for offer in measured.values()),
        "gap": packed.gap,
        "num_dense": sum(form == Form() for form in forms.values()),
        "num_kept_even": len(others),
        "forms": dict(Counter(form.kind for form in forms.values()).most_common()),
    }
