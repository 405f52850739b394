"""Spend: the form of every linear under one budget of bytes, written as JSON."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.stages.factorize.knapsack import pack

FORMS = "forms.json"


@dataclass(frozen=True)
class Spending:
    """``budget``: bytes for all linears. ``form_sizes``: how they are stored. ``even``: each linear's form at its own share of
    the budget. A linear that the calibration says nothing of keeps that form if all fit so, else takes its smallest one."""

    budget: int
    form_sizes: FormSizes
    even: Mapping[str, Form]

    @property
    def without_even(self) -> Spending:
        """Itself without the even forms, which tasks do not need."""
        return replace(self, even={})


def read_forms(directory: Path) -> dict[str, Form]:
    """The forms that :func:`spend` wrote."""
    layers: dict[str, Any] = read_json(directory / FORMS)["layers"]
    return {name: Form(layer["rank"], layer["bits"], layer["residual_rank"]) for name, layer in layers.items()}


def spend(
    spending: Spending,
    specs: Sequence[LinearSpec],
    forms: Callable[[LinearSpec], list[Form]],
    losses: Mapping[str, Tensor],
    out_dir: Path,
) -> dict[str, Any]:
    """Writes ``forms.json`` into ``out_dir``: for every linear its form, the form's bytes and its expected loss in nats a sample.
    Together the forms lose least within the budget.

    ``losses``: the loss of each of a linear's ``forms``, ``(len(forms(spec)),)`` by name; all zeros where the calibration says
    nothing of the linear.
    """

    def num_bytes(spec: LinearSpec, form: Form) -> int:
        return spending.form_sizes.num_bytes(spec.out_features, spec.in_features, form)

    has_losses = {spec.name: float(losses[spec.name].sum()) > 0 for spec in specs}
    measured = [spec for spec in specs if has_losses[spec.name]]
    unmeasured = [spec for spec in specs if not has_losses[spec.name]]
    options = [forms(spec) for spec in measured]
    costs = [[num_bytes(spec, form) for form in choices] for spec, choices in zip(measured, options, strict=True)]
    losses_of = [losses[spec.name].tolist() for spec in measured]
    left_for_unmeasured = spending.budget - sum(map(min, costs))
    chosen = {spec.name: spending.even[spec.name] for spec in unmeasured}
    if sum(num_bytes(spec, chosen[spec.name]) for spec in unmeasured) > left_for_unmeasured:
        chosen = {spec.name: min(forms(spec), key=functools.partial(num_bytes, spec)) for spec in unmeasured}
    fixed = sum(num_bytes(spec, chosen[spec.name]) for spec in unmeasured)
    packed = pack(costs, losses_of, spending.budget - fixed)
    chosen |= {spec.name: choices[pick] for spec, choices, pick in zip(measured, options, packed.picks, strict=True)}
    even_loss = sum(
        loss[choices.index(spending.even[spec.name])]
        for spec, choices, loss in zip(measured, options, losses_of, strict=True)
    )
    by_name = {spec.name: loss[pick] for spec, loss, pick in zip(measured, losses_of, packed.picks, strict=True)}
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
        "num_kept_uniform": len(unmeasured),
        "forms": dict(Counter(form.kind for form in chosen.values()).most_common()),
    }
