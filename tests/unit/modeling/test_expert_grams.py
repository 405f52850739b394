"""Experts' Grams, against what the router chose and the fused parameters say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_artifacts import random_rows
from tiny import EXPERT_FAMILIES, PAD, VOCABULARY, make_model

from emloc_ray.data.token_shards import collate
from emloc_ray.errors import StageError
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.experts import experts_of, unfuse
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.inputs import model_call


@torch.no_grad()
def routed(model: Any, batch: dict[str, torch.Tensor], tokens: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each experts module of a fused model reads of the tokens that count, and which experts those are sent to."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    call = model_call(model.config, batch, tokens=tokens)
    keep = call.counted["row"].flatten()

    def hook(name: str) -> Any:
        def record(module: Any, args: Any) -> None:
            found[name] = (args[0][keep], args[1][keep])

        return record

    modules = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules]
    model(**call.inputs)
    for handle in handles:
        handle.remove()
    return found


def expected(model: Any, x: torch.Tensor, name: str, index: int) -> dict[str, torch.Tensor]:
    """The Grams of one expert's two linears over the inputs ``x``."""
    fused = model.get_submodule(name)
    gate, up = (x @ fused.gate_up_proj[index].T).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    return {f"{name}.{index}.gate_up": x.T @ x, f"{name}.{index}.down": inner.T @ inner}


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("tokens", ["all", "completion"])
@pytest.mark.parametrize("reread", [False, True])
@torch.no_grad()
def test_an_expert_counts_the_tokens_sent_to_it_or_all_and_never_padding(
    family: str, tokens: str, reread: bool
) -> None:
    model = make_model(family)
    batch = collate(random_rows(), PAD)
    inputs = routed(model, batch, tokens)
    unfused = unfuse(make_model(family))
    names = [spec.name for spec in block_linears(unfused) if spec.routed_share is not None]
    hooks = GramHooks(unfused, [[name] for name in names], reread=reread)
    hooks.forward(batch, tokens)
    seen = 0
    for name, (x, chosen) in inputs.items():
        for index in range(4):
            mine = x if reread else x[(chosen == index).any(dim=1)]
            for linear, gram in expected(model, mine, name, index).items():
                assert hooks.grams[linear].num_tokens == len(mine)
                torch.testing.assert_close(hooks.grams[linear].symmetric(), gram, rtol=1e-4, atol=1e-5)
                seen += 1
    assert seen == len(names)
    hooks.remove()
    assert not any(module.reread for module in experts_of(unfused).values())


@torch.no_grad()
def test_reading_again_leaves_the_output_as_it_is() -> None:
    model = unfuse(make_model("mixtral"))
    ids = torch.randint(2, VOCABULARY, (2, 9))
    before = model(ids).logits
    hooks = GramHooks(model, [["model.layers.0.mlp.experts.1.down"]], reread=True)
    assert torch.equal(model(ids).logits, before)
    assert hooks.grams["model.layers.0.mlp.experts.1.down"].num_tokens == 18


@torch.no_grad()
def test_a_second_pass_that_ran_out_of_memory_leaves_no_trace() -> None:
    model = unfuse(make_model("mixtral"))
    ids, name = torch.randint(2, VOCABULARY, (2, 9)), "model.layers.0.mlp.experts.1.down"
    hooks = GramHooks(model, [[name]], reread=True)
    experts = model.model.layers[0].mlp.experts

    def run_out(module: Any, args: Any) -> None:
        if experts.rereading:
            raise MemoryError

    handle = experts.get_submodule("1.down").register_forward_pre_hook(run_out)
    with pytest.raises(MemoryError):
        model(ids)
    handle.remove()
    before = hooks.grams[name].num_tokens
    model(ids)
    assert hooks.grams[name].num_tokens - before == 18


def test_tokens_that_a_model_picks_in_a_way_of_its_own_are_told_not_miscounted() -> None:
    model = make_model("llama")
    hooks = GramHooks(model, [["model.layers.0.mlp.up_proj"]])
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0][:, :3],))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 0.0)
    with pytest.raises(StageError, match=r"reads 12 of a batch's 64 tokens.*calibration\.batch_size to 1"):
        hooks.forward(collate(random_rows(), PAD))
