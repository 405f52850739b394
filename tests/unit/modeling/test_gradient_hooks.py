"""Sums of gradients gathered in the backward pass, against autograd's own of every row by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, save
from stage_artifacts import random_rows
from tiny import PAD, make_model
from vlms import VLMS, save_vlm

from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import example
from emloc_ray.data.token_shards import collate
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.experts import unfuse
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.loading import load_model
from emloc_ray.planning.skeleton import skeleton_of

MADE = ("llama", "qwen2", "gpt2", "opt", "mixtral")


def frozen(family: str, **options: Any) -> Any:
    return unfuse(make_model(family, **options).requires_grad_(False))


def names_of(model: Any) -> list[str]:
    return [spec.name for spec in block_linears(model)]


def gather(model: Any, parts: list[list[int]], tokens: str = "all", loss_on: str = "completion") -> GradientHooks:
    """Sums over rows in batches of these positions."""
    hooks, many = GradientHooks(model, names_of(model), loss_on=loss_on, seed=5), random_rows()
    for part in parts:
        hooks.forward(collate([many[position] for position in part], PAD), tokens, part)
    return hooks


def row_gradients(model: Any, row: Tokens, position: int, loss_on: str) -> dict[str, torch.Tensor]:
    """What autograd gives for one row with no padding: ``(tokens, out)`` a linear, float64; experts' are left out."""
    ids = torch.tensor([row.input_ids])
    outputs: dict[str, torch.Tensor] = {}
    names = [name for name in names_of(model) if ".experts." not in name]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_()))
    logits = model(input_ids=ids).logits[0]
    for handle in handles:
        handle.remove()
    places = [k for k in range(1, len(row)) if loss_on == "all" or row.completion_mask[k]]
    seed = (5 * 0x9E3779B97F4A7C15 + position + 1) % 2**63
    numbers = torch.rand(len(places), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = torch.zeros(())
    for place, number in zip(places, numbers.tolist(), strict=True):
        drawn, below = -1, 0.0
        probabilities = logits[place - 1].softmax(-1).double().tolist()
        while below <= number * sum(probabilities):
            drawn += 1
            below += probabilities[drawn]
        loss = loss + F.cross_entropy(logits[place - 1].unsqueeze(0), torch.tensor([drawn]), reduction="sum")
    found = torch.autograd.grad(loss, list(outputs.values()))
    return {name: g.reshape(-1, g.shape[-1]).double() for name, g in zip(outputs, found, strict=True)}


@pytest.mark.parametrize("family", MADE)
@pytest.mark.parametrize(("tokens", "loss_on"), [("all", "completion"), ("all", "all"), ("completion", "completion")])
def test_sums_equal_autograd_s_own(family: str, tokens: str, loss_on: str) -> None:
    model, many = frozen(family), random_rows()
    hooks = gather(model, [[0, 1, 2], [3]], tokens, loss_on)
    hooks.remove()
    expected: dict[str, torch.Tensor] = {}
    for position, row in enumerate(many):
        keep = torch.tensor([completion or tokens == "all" for completion in row.completion_mask])
        for name, gradient in row_gradients(model, row, position, loss_on).items():
            expected[name] = expected.get(name, 0) + gradient[keep].T @ gradient[keep]
    counted = sum(sum(row.completion_mask) if tokens == "completion" else len(row) for row in many)
    for name, total in expected.items():
        gram = hooks.grams[name]
        assert gram.num_tokens == counted
        torch.testing.assert_close(
            gram.symmetric().double(), total, rtol=1e-3, atol=1e-4 * float(total.diagonal().max())
        )


def test_experts_count_the_tokens_that_are_sent_to_them() -> None:
    model = frozen("mixtral")
    hooks = gather(model, [[0, 1], [2, 3]])
    every = [gram.num_tokens for name, gram in hooks.grams.items() if "layers.0.mlp.experts." in name]
    assert sum(every) == 2 * 2 * sum(len(row) for row in random_rows())  # two experts a token, two linears each
    assert all(float(gram.matrix.diagonal().sum()) > 0 for gram in hooks.grams.values() if gram.num_tokens)


def test_a_row_s_labels_are_its_own_whatever_the_batch() -> None:
    one, other = gather(frozen("llama"), [[0, 1, 2, 3]]), gather(frozen("llama"), [[3, 1], [2], [0]])
    again = gather(frozen("llama"), [[0, 1, 2, 3]])
    for name, gram in one.grams.items():
        assert torch.equal(gram.matrix, again.grams[name].matrix)
        torch.testing.assert_close(
            gram.symmetric(), other.grams[name].symmetric(), rtol=1e-3, atol=1e-4 * float(gram.matrix.diagonal().max())
        )


def test_no_weight_has_a_gradient_and_hooks_go_away() -> None:
    model = frozen("llama")
    before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    hooks = gather(model, [[0, 1]])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    hooks.remove()
    assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(dtype: str) -> None:
    exact, rough = gather(frozen("llama"), [[0, 1, 2, 3]]), gather(frozen("llama", dtype=dtype), [[0, 1, 2, 3]])
    for name, gram in exact.grams.items():
        found = rough.grams[name]
        assert found.matrix.dtype == torch.float32
        ratio = float(found.matrix.diagonal().sum() / gram.matrix.diagonal().sum())
        assert 0.5 < ratio < 2  # a few labels are drawn otherwise


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_names_the_layer(bad: float) -> None:
    model = frozen("llama")
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data[3, 3] = bad
    hooks = gather(model, [[0, 1]])
    with pytest.raises(NumericsError, match=r"Gradients of what model\.layers\.0\.self_attn\.q_proj gives hold NaN"):
        hooks.check_finite()


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *VLMS])
def test_gradients_reach_every_linear_of_every_family(family: str, tmp_path: Path) -> None:
    if family in VLMS:
        shown = example(save_vlm(family, tmp_path))
        words = torch.tensor([[7, 8, 9, 10]])
        batch = {**shown, "input_ids": torch.cat([shown["input_ids"], words], dim=1)}
        if "mm_token_type_ids" in shown:
            batch["mm_token_type_ids"] = torch.cat([shown["mm_token_type_ids"], torch.zeros_like(words)], dim=1)
        completion = torch.zeros_like(batch["input_ids"]).bool()
        completion[:, -4:] = True
        batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "completion_mask": completion}
        positions = [0]
    else:
        save(family, tmp_path)
        batch, positions = collate(random_rows(), PAD), [0, 1, 2, 3]
    model = load_model(tmp_path)
    specs = skeleton_of(model.config, empty_model(model.config), example(tmp_path)).specs
    hooks = GradientHooks(model, [spec.name for spec in specs], {spec.name: spec.stream for spec in specs})
    hooks.forward(batch, "all", positions)
    hooks.check_finite()
    for name, gram in hooks.grams.items():
        assert float(gram.matrix.diagonal().sum()) > 0 or gram.num_tokens == 0, name
