"""The flow between blocks: followed through views, sums and writes in place."""

from __future__ import annotations

import torch
from tiny import make_config

from emloc_ray.modeling.block_flow import BlockFlow, Lineage, block_flow


def test_a_chain_needs_only_the_block_before() -> None:
    flow = block_flow(make_config("llama", num_hidden_layers=4))
    assert flow.order == tuple(f"model.layers.{k}" for k in range(4))
    assert flow.needs == (frozenset(), frozenset({0}), frozenset({1}), frozenset({2}))
    assert [flow.last_use(k) for k in range(4)] == [1, 2, 3, 3]


def test_lineage_follows_views_sums_and_writes_in_place() -> None:
    lineage = Lineage()
    a, b, c = (torch.ones(4, device="meta") for _ in range(3))
    lineage.mark(a, frozenset({0}))
    lineage.mark(b, frozenset({1}))
    with lineage:
        both = (a[1:].reshape(3, 1) + 1).squeeze() * b[:3]
        c[:1] = 0
        into = torch.zeros(4, device="meta")
        into.add_(b)
    assert lineage.of(both) == {0, 1}
    assert lineage.of([c, {"x": a}]) == {0}
    assert lineage.of(into) == {1}


def test_an_earlier_output_that_is_read_late_is_kept() -> None:
    flow = BlockFlow(("a", "b", "c", "d"), (frozenset(), frozenset({0}), frozenset({1}), frozenset({0, 2})))
    assert [flow.last_use(k) for k in range(4)] == [3, 2, 3, 3]
