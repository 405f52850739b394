"""The emulator's budget before a weight moves: whether it can be met, and what is planned with until data decides."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from emloc_ray.config.emulator import EmulatorConfig
from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.core.ranks import rank_multiple
from emloc_ray.errors import ConfigError
from emloc_ray.text import size_up

if TYPE_CHECKING:
    from emloc_ray.planning.layout import Layout


def spend_evenly(layout: Layout, emulator: EmulatorConfig, itemsize: int) -> Layout:
    """The layout with the bytes of the config's budget, and with what is planned with until data decides: every linear in the
    form that keeps most of it at its own share.

    Bits are those of the linears that are compressed, bytes those of the whole emulator; floats take ``itemsize`` bytes. Raises
    ConfigError where no forms meet the budget, or the linears as they are do.
    """
    specs, weights = [layout.by_name[name] for name in layout.compressed], layout.parameters_targeted
    rest = (layout.num_parameters - weights) * itemsize
    budget, costs = _budget_and_costs(layout, emulator, itemsize, rest)
    if budget >= weights * itemsize:
        whole = f"{8 * itemsize} bits" if emulator.budget_bytes is None else size_up(rest + weights * itemsize)
        raise ConfigError(
            f"emulator.budget: {emulator.budget} holds every linear as it is, in {whole}: give less, or set compression_ratio: 1"
            " in its place."
        )
    share = budget / weights
    even = {shape: _even(costs[shape], share * math.prod(shape)) for shape in costs}
    forms = {spec.name: even[spec.out_features, spec.in_features] for spec in specs}
    return dataclasses.replace(layout, budget=budget, allocation="sensitivity").with_forms(forms)


def budget_of_linears(layout: Layout, emulator: EmulatorConfig, itemsize: int, rest: int) -> int:
    """The bytes of all compressed linears within the config's budget, where floats take ``itemsize`` bytes and all else ``rest``
    bytes. Raises ConfigError where no forms meet it."""
    return _budget_and_costs(layout, emulator, itemsize, rest)[0]


_Costs = dict[tuple[int, int], dict[Form, int]]


def _budget_and_costs(layout: Layout, emulator: EmulatorConfig, itemsize: int, rest: int) -> tuple[int, _Costs]:
    form_sizes, weights = layout.form_sizes(itemsize), layout.parameters_targeted
    specs = [layout.by_name[name] for name in layout.compressed]
    shapes = Counter((spec.out_features, spec.in_features) for spec in specs)
    costs = {shape: _costs(shape, form_sizes, emulator) for shape in shapes}
    budget = int((emulator.budget_bits or 0.0) * weights / 8)
    if emulator.budget_bytes is not None:
        budget = emulator.budget_bytes - rest
    least = sum(number * min(costs[shape].values()) for shape, number in shapes.items())
    if budget < least:
        nearest = f"{math.ceil(800 * least / weights) / 100:g} bits"
        if emulator.budget_bytes is not None:
            nearest = f"{size_up(rest + least)}, of which {size_up(rest)} are no linears that are compressed"
        raise ConfigError(f"emulator.budget: {emulator.budget} is met by no ranks and bits: give at least {nearest}.")
    return budget, costs


def _costs(shape: tuple[int, int], form_sizes: FormSizes, emulator: EmulatorConfig) -> dict[Form, int]:
    """What a linear ``(out, in)`` may be stored as under a budget, with the bytes of each."""
    forms = form_sizes.forms(*shape, rank_multiple(*shape, emulator.rank_multiple))
    return {form: form_sizes.num_bytes(*shape, form) for form in forms}


def _even(costs: Mapping[Form, int], share: float) -> Form:
    """The widest integers of at most ``share`` bytes; else 4-bit factors of the highest rank; else what takes least."""
    fitting = [form for form, cost in costs.items() if cost <= share]
    integers = [form for form in fitting if form.rank is None and form.bits is not None and not form.residual_rank]
    factors = [form for form in fitting if form.rank is not None and form.bits == 4]
    most = integers or factors
    return max(most, key=costs.__getitem__) if most else min(costs, key=costs.__getitem__)
