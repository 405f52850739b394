"""Spend: the form of every linear under one budget of bytes, written as JSON."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from emloc_ray.core.forms import Form, Storing
from emloc_ray.io.store.atomic import write_json
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.stages.factorize.knapsack import pack

FORMS = "forms.json"


@dataclass(frozen=True)
class Spending:
    """A ``budget`` of bytes for all linears, how they are stored (``storing``), and the ``even`` form of each, which it
    keeps where the data says nothing of it and the others have room for a form beside that."""

    budget: int
    storing: Storing
    even: Mapping[str, Form]

    @property
    def without_even(self) -> Spending:
        """Itself without the even forms, which tasks do not need."""
        return replace(self, even={})


def read_forms(directory: Path) -> dict[str, Form]:
    """The forms that :func:`spend` wrote."""
    path = directory / FORMS
    ensure(path)
    layers: dict[str, Any] = json.loads(path.read_text())["layers"]
    return {name: Form(layer["rank"], layer["bits"], layer["residual_rank"]) for name, layer in layers.items()}


def spend(
    spending: Spending,
    specs: Sequence[LinearSpec],
    forms: Callable[[LinearSpec], list[Form]],
    losses: Mapping[str, Tensor],
    out_dir: Path,
) -> dict[str, Any]:
    """Writes ``forms.json`` into ``out_dir``: every linear's form, its bytes and the nats a sample that it is expected to lose;
    together they lose least within the budget.

    ``losses`` has what each of a linear's ``forms`` loses, ``(len(forms(spec)),)`` by name; all zeros where the data says
    nothing.
    """

    def num_bytes(spec: LinearSpec, form: Form) -> int:
        return spending.storing.num_bytes(spec.out_features, spec.in_features, form)

    says = {spec.name: float(losses[spec.name].sum()) > 0 for spec in specs}
    known = [spec for spec in specs if says[spec.name]]
    others = [spec for spec in specs if not says[spec.name]]
    options = [forms(spec) for spec in known]
    costs = [[num_bytes(spec, form) for form in choices] for spec, choices in zip(known, options, strict=True)]
    lost = [losses[spec.name].tolist() for spec in known]
    room = spending.budget - sum(map(min, costs))
    chosen = {spec.name: spending.even[spec.name] for spec in others}
    if sum(num_bytes(spec, chosen[spec.name]) for spec in others) > room:
        chosen = {spec.name: min(forms(spec), key=functools.partial(num_bytes, spec)) for spec in others}
    fixed = sum(num_bytes(spec, chosen[spec.name]) for spec in others)
    packed = pack(costs, lost, spending.budget - fixed)
    chosen |= {spec.name: choices[pick] for spec, choices, pick in zip(known, options, packed.picks, strict=True)}
    even_loss = sum(
        loss[choices.index(spending.even[spec.name])] for spec, choices, loss in zip(known, options, lost, strict=True)
    )
    by_name = {spec.name: loss[pick] for spec, loss, pick in zip(known, lost, packed.picks, strict=True)}
    layers = {
        spec.name: {
            **asdict(chosen[spec.name]),
            "bytes": num_bytes(spec, chosen[spec.name]),
            "loss": by_name.get(spec.name),
        }
        for spec in specs
    }
    left = spending.budget - fixed - packed.used
    write_json(out_dir / FORMS, {"bytes_left": left, "gap": packed.gap, "layers": layers})
    return {
        "budget": spending.budget,
        "left": left,
        "loss": packed.loss,
        "even_loss": even_loss,
        "gap": packed.gap,
        "num_dense": sum(form == Form() for form in chosen.values()),
        "num_kept_uniform": len(specs) - len(known),
        "forms": dict(Counter(form.kind for form in chosen.values()).most_common()),
    }
