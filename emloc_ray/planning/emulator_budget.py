"""The emulator's budget before a weight moves: whether it can be met, and what is planned with until data decides."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from emloc_ray.config.emulator import EmulatorConfig
from emloc_ray.core.forms import Form, Storing
from emloc_ray.core.ranks import rank_multiple
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.text import size_up

if TYPE_CHECKING:
    from emloc_ray.planning.layout import Layout


def forms_of(spec: LinearSpec, storing: Storing, emulator: EmulatorConfig) -> list[Form]:
    """What a linear may be stored as under a budget."""
    shape = spec.out_features, spec.in_features
    return storing.forms(*shape, rank_multiple(*shape, emulator.rank_multiple))


def spend_evenly(layout: Layout, emulator: EmulatorConfig, itemsize: int) -> Layout:
    """The layout with the bytes of the config's budget, and with what is planned with until data decides: every linear in the
    form that keeps most of it at its own share.

    Bits are those of the linears that are compressed, bytes those of the whole emulator; floats take ``itemsize`` bytes. Raises
    ConfigError where no forms meet the budget, or the linears as they are do.
    """
    storing, specs = layout.storing(itemsize), [layout.by_name[name] for name in layout.compressed]
    weights = layout.parameters_targeted
    rest = (layout.num_parameters - weights) * itemsize
    budget = int((emulator.budget_bits or 0.0) * weights / 8)
    if emulator.budget_bytes is not None:
        budget = emulator.budget_bytes - rest
    least = sum(min(_bytes(storing, spec, form) for form in forms_of(spec, storing, emulator)) for spec in specs)
    if budget < least:
        nearest = f"{math.ceil(800 * least / weights) / 100:g} bits"
        if emulator.budget_bytes is not None:
            nearest = f"{size_up(rest + least)}, of which {size_up(rest)} are no linears that are compressed"
        raise ConfigError(f"emulator.budget: {emulator.budget} is met by no ranks and bits: give at least {nearest}.")
    if budget >= weights * itemsize:
        whole = f"{8 * itemsize} bits" if emulator.budget_bytes is None else size_up(rest + weights * itemsize)
        raise ConfigError(
            f"emulator.budget: {emulator.budget} holds every linear as it is, in {whole}: give less, or set compression_ratio: 1"
            " in its place."
        )
    share = budget / weights
    even = {spec.name: _even(spec, storing, emulator, share * spec.num_parameters) for spec in specs}
    return dataclasses.replace(layout, budget=budget, allocation="sensitivity").with_forms(even)


def _even(spec: LinearSpec, storing: Storing, emulator: EmulatorConfig, share: float) -> Form:
    """The widest integers of at most ``share`` bytes; else 4-bit factors of the highest rank; else what takes least."""
    forms = forms_of(spec, storing, emulator)
    fitting = [form for form in forms if _bytes(storing, spec, form) <= share]
    integers = [form for form in fitting if form.rank is None and form.bits is not None and not form.residual_rank]
    factors = [form for form in fitting if form.rank is not None and form.bits == 4]
    most = integers or factors
    return (
        max(most, key=lambda form: _bytes(storing, spec, form))
        if most
        else min(forms, key=lambda form: _bytes(storing, spec, form))
    )


def _bytes(storing: Storing, spec: LinearSpec, form: Form) -> int:
    return storing.num_bytes(spec.out_features, spec.in_features, form)
