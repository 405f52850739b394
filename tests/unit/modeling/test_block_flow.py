"""The flow between blocks: followed through views, sums and writes in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_config
from transformers import LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from emloc_ray.modeling.block_flow import BlockFlow, Lineage, block_flow


def test_a_chain_needs_only_the_block_before() -> None:
    flow = block_flow(make_config("llama", num_hidden_layers=4))
    assert flow.order == tuple(f"model.layers.{k}" for k in range(4))
    assert flow.needs == (frozenset(), frozenset({0}), frozenset({1}), frozenset({2}))
    assert [flow.last_use(k) for k in range(4)] == [1, 2, 3, 3]


def test_blocks_that_run_again_are_not_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(self: LlamaModel, input_ids: torch.Tensor, **options: Any) -> BaseModelOutputWithPast:
        x = self.embed_tokens(input_ids)
        angles = self.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in [*self.layers, *self.layers]:
            x = layer(x, position_embeddings=angles)
        return BaseModelOutputWithPast(last_hidden_state=x)

    assert not block_flow(make_config("llama")).shares
    monkeypatch.setattr(LlamaModel, "forward", again)
    flow = block_flow(make_config("llama"))
    assert flow.shares
    assert flow.order == ("model.layers.0", "model.layers.1")


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
