"""How a worker holds the original for a pass, chosen by what fits it (:mod:`emloc_ray.modeling.holding`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.planning.sizes import gradient_bytes, in_waves

if TYPE_CHECKING:
    from emloc_ray.planning.layout import Layout

HOLDS = ("resident", "offloaded", "all_offloaded")
"""Of a pass through the whole model, the fastest first."""

_ALIVE = 2  # blocks of an offloaded model: one that computes, and one on its way


def block_parameters(layout: Layout) -> dict[str, int]:
    """Parameters of each block: of its linears, and of other modules that have matrices."""
    inside = dict(layout.left_by_block)
    for spec in layout.specs:
        if not spec.between:
            inside[spec.block] = inside.get(spec.block, 0) + spec.num_parameters
    return inside


def held_bytes(layout: Layout, itemsize: int, tied: bool) -> dict[str, int]:
    """Bytes of weights on the device, by how the model is held."""
    inside = block_parameters(layout)
    largest = max(inside.values(), default=0)
    outside = layout.num_parameters - sum(inside.values())
    ends = layout.head_parameters * (1 if tied else 2)
    parameters = {
        "resident": layout.num_parameters,
        "offloaded": outside + _ALIVE * largest,
        "all_offloaded": max(0, outside - ends) + max(_ALIVE * largest, largest + layout.head_parameters),
    }
    return {hold: size * itemsize for hold, size in parameters.items()}


def moved_bytes(layout: Layout, itemsize: int, tied: bool) -> dict[str, int]:
    """Bytes of weights that come to the device in a pass through the whole model, by how it is held; block by block that is
    one pass for all rows."""
    inside = sum(block_parameters(layout).values()) * itemsize
    ends = layout.head_parameters * (1 if tied else 2) * itemsize
    return {"resident": 0, "offloaded": inside, "all_offloaded": inside + ends, "block_by_block": inside}


def allowed(asked: str) -> tuple[str, ...]:
    """The holds that ``model.hold`` allows for a pass of the whole model, the fastest first."""
    if asked == "resident":
        return HOLDS[:1]
    return HOLDS if asked == "auto" else HOLDS[1:]


def choose(asked: str, held: Mapping[str, float], beside: float, budget: float) -> str:
    """The fastest way that fits ``budget`` bytes with what is held ``beside`` the weights; the leanest where none does."""
    holds = allowed(asked)
    return next((hold for hold in holds if held[hold] + beside <= budget), holds[-1])


@dataclass(frozen=True)
class GradientPlan:
    """How sums of gradients are gathered: how the model is held, rows of a batch, and which linears' sums in each wave."""

    hold: str
    batch_size: int
    waves: tuple[tuple[LinearSpec, ...], ...]


def plan_gradients(
    asked: str,
    held: Mapping[str, float],
    specs: Sequence[LinearSpec],
    batch_size: int,
    beside: Callable[[int], float],
    budget: float,
    hiding_rows: float = 0.0,
) -> GradientPlan:
    """The waves that fit ``budget`` bytes and take least time; among equals the fewest, resident first, in the largest batch.

    ``beside(rows)``: bytes of a batch's pass forward and back. A wave costs a pass over all rows. A smaller batch costs nearly
    nothing where the model is resident. Elsewhere each batch moves the whole model while it is computed: of fewer than
    ``hiding_rows`` the moving takes longer. Where nothing fits: one linear's sum at a time, in the leanest way.
    """
    batches = [batch_size >> halvings for halvings in range(batch_size.bit_length())]
    largest = max(map(gradient_bytes, specs), default=0)
    plans = []
    for hold in allowed(asked):
        for rows in batches:
            left = budget - held[hold] - beside(rows)
            if left >= largest or (hold, rows) == (allowed(asked)[-1], 1):
                plans.append(GradientPlan(hold, rows, tuple(map(tuple, in_waves(specs, gradient_bytes, left)))))

    def cost(plan: GradientPlan) -> tuple[float, int]:
        moving = 0.0 if plan.hold == "resident" else hiding_rows / plan.batch_size
        return len(plan.waves) * max(1.0, moving), len(plan.waves)

    return min(plans, key=cost)


def blocks_share(model_config: Any, trust_remote_code: bool) -> bool:
    """Whether blocks read what is inside others, as keys and values of Gemma 3n and Gemma 4: not to be run one by one."""
    key = model_config.to_json_string(use_diff=False)
    if key not in _SHARES:
        _SHARES[key] = block_flow(model_config, trust_remote_code).shares
    return _SHARES[key]


_SHARES: dict[str, bool] = {}  # by the config, which is asked about several times while a run is planned
