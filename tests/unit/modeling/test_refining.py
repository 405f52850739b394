"""A block's factors are fitted where that helps on rows held out, and stay as they were where not."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Literal

import pytest
import torch
from tiny import make_emulator, make_model
from torch import Tensor, nn

from emloc_ray.core.factorization import LowRankFactors, factorize
from emloc_ray.core.quantization import quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.refinement import balanced
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError
from emloc_ray.modeling import refining
from emloc_ray.modeling.emulator import FactorizedLinear, ResidualLinear
from emloc_ray.modeling.integer_linear import IntegerLinear
from emloc_ray.modeling.refining import fit_block, refined_in


class Mlp:
    """An MLP in factors, what the dense one gives for random inputs, and the error between the two."""

    def __init__(self, storage: Literal["factors", "pivoted"] = "factors", dtype: str = "float32") -> None:
        self.wanted = make_model("llama", dtype=dtype).model.layers[0].mlp.requires_grad_(False)
        ranks = {f"model.layers.0.mlp.{name}": 8 for name in ("gate_proj", "up_proj", "down_proj")}
        self.block = make_emulator(make_model("llama", dtype=dtype), ranks, storage).model.layers[0].mlp
        draws = torch.Generator().manual_seed(0)
        mix = torch.randn(64, 64, generator=draws) / 4  # inputs of few directions, which the weights' SVD does not know
        mix[8:] *= 0.05
        self.inputs = [(torch.randn(16, 64, generator=draws) @ mix).to(getattr(torch, dtype)) for _ in range(8)]
        self.reading: set[threading.Thread] = set()

    def read(self, number: int) -> Tensor:
        self.reading.add(threading.current_thread())
        return self.inputs[number]

    def error(self, x: Tensor) -> tuple[Tensor, int]:
        return (self.block(x) - self.wanted(x)).float().square().sum(), len(x)

    def fit(self, **changes: Any) -> Any:
        options = {"steps": 60, "learning_rate": 0.02, **changes}
        steps = options.pop("fitted", [[number] for number in range(6)])
        return fit_block(self.block, self.read, self.error, steps, range(6, 8), **options)

    def held_out(self) -> float:
        with torch.no_grad():
            return sum(float(self.error(x)[0]) for x in self.inputs[6:]) / 32


def in_integers(dtype: str) -> nn.Module:
    """The MLP's linears as factors in 4 bits, in 2 bits, and in 2 bits with factors beside them."""
    block: Any = make_model("llama").model.layers[0].mlp
    gate, up, down = (getattr(block, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))
    alike = [Whitening.identity(weight.shape[1]) for weight in (gate, up, down)]
    block.gate_proj = FactorizedLinear(64, 128, 9)
    block.gate_proj.store_in(4, 16)
    block.up_proj, block.down_proj = IntegerLinear(64, 128, 2, 16), ResidualLinear(128, 64, 3, 2, 16)
    factors = factorize(gate, alike[0], 9).factors
    made = [
        *quantize_factors(factors, gate, alike[0], 4, 16),
        quantize(up, alike[1], 2, 16),
        *quantize_with_factors(down, alike[2], 2, 3, 4, 16),
    ]
    residual = block.down_proj
    places = [block.gate_proj.up, block.gate_proj.down, block.up_proj, residual.base, residual.up, residual.down]
    for linear, stored in zip(places, made, strict=True):
        for key, tensor in stored.tensors(getattr(torch, dtype)).items():
            linear.register_buffer(key, tensor)
    return block.requires_grad_(False)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_comes_closer_to_what_is_wanted(storage: Literal["factors", "pivoted"], dtype: str) -> None:
    mlp = Mlp(storage, dtype)
    before = mlp.held_out()
    shapes = {name: tuple(weight.shape) for name, weight in mlp.block.named_parameters()}
    fit = mlp.fit()
    assert fit.before == pytest.approx(before)
    assert fit.after == pytest.approx(mlp.held_out())
    assert fit.after < 0.8 * before
    assert {name: tuple(weight.shape) for name, weight in mlp.block.named_parameters()} == shapes
    assert all(weight.dtype == getattr(torch, dtype) for weight in mlp.block.parameters())
    assert not any(weight.requires_grad for weight in mlp.block.parameters())
    assert {type(linear) for linear in refined_in(mlp.block).values()} == {nn.Linear}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_come_closer_and_stay_integers(dtype: str) -> None:
    """Factors in 4 bits, 2 bits, and 2 bits with factors beside them."""
    mlp = Mlp(dtype=dtype)
    mlp.block = in_integers(dtype)
    before, stored = mlp.held_out(), {name: tensor.clone() for name, tensor in mlp.block.named_buffers()}
    fit = mlp.fit()
    assert fit.before == pytest.approx(before)
    assert fit.after == pytest.approx(mlp.held_out())
    assert fit.after < 0.9 * before
    after = dict(mlp.block.named_buffers())
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
    changed = {name.rsplit(".", 1)[-1] for name, tensor in after.items() if not torch.equal(tensor, stored[name])}
    assert changed == {"int2", "int4", "scales", "zeros"}
    assert not [*mlp.block.parameters()]


def test_integers_that_do_not_help_are_taken_back() -> None:
    mlp = Mlp()
    mlp.block = in_integers("float32")
    stored = {name: tensor.clone() for name, tensor in mlp.block.named_buffers()}
    assert not mlp.fit(steps=3, learning_rate=30.0).is_better
    assert all(torch.equal(tensor, stored[name]) for name, tensor in mlp.block.named_buffers())


def test_integers_that_become_nan_are_not_hidden_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, computed = Mlp(), []
    mlp.block = in_integers("float32")

    def broken(x: Tensor) -> tuple[Tensor, int]:
        total, tokens = Mlp.error(mlp, x)
        computed.append(total)
        return total * (float("nan") if len(computed) == 4 else 1.0), tokens  # in a step, after two batches held out

    monkeypatch.setattr(mlp, "error", broken)
    with pytest.raises(NumericsError, match=r"gives NaN or Inf while it is refined: lower emulator\.refinement"):
        mlp.fit(steps=3)


def test_batches_are_read_beside_the_steps() -> None:
    mlp = Mlp()
    mlp.fit(steps=3)
    assert mlp.reading
    assert threading.main_thread() not in mlp.reading


def test_what_does_not_help_on_rows_held_out_is_taken_back() -> None:
    mlp = Mlp()
    before = {name: weight.clone() for name, weight in mlp.block.named_parameters()}
    fit = mlp.fit(steps=3, learning_rate=30.0)
    assert not fit.is_better
    for name, weight in mlp.block.named_parameters():
        assert torch.equal(weight, before[name])


def test_a_step_over_batches_is_that_of_all_their_rows_at_once() -> None:
    apart, together = Mlp(), Mlp()
    apart.fit(steps=3, fitted=[[0, 1], [2, 3]])
    together.inputs[:2] = [torch.cat(together.inputs[:2]), torch.cat(together.inputs[2:4])]
    together.fit(steps=3, fitted=[[0], [1]])
    for one, other in zip(apart.block.parameters(), together.block.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_factors() -> None:
    found = []
    for seed in (1, 1, 2):
        mlp = Mlp()
        mlp.fit(steps=5, seed=seed)
        found.append(mlp.block.up_proj.up.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_block_without_factors_is_left_alone() -> None:
    mlp = Mlp()
    mlp.block = make_model("llama", seed=3).model.layers[0].mlp.requires_grad_(False)
    fit = mlp.fit()
    assert fit.before == fit.after > 0


def test_a_block_that_gives_nan_is_named() -> None:
    mlp = Mlp()
    mlp.inputs[7][0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^the first block gives NaN or Inf before it is refined: set model.dtype"):
        mlp.fit(steps=1, name="the first block")
    mlp.inputs[7][0, 0] = 0.0
    mlp.inputs[0][0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^the first block gives NaN or Inf while it is refined"):
        mlp.fit(steps=6, name="the first block")


def test_a_fit_holds_no_second_copy_of_balanced_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def watched(up: Tensor, down: Tensor) -> LowRankFactors:
        found = balanced(up, down)
        made.extend(weakref.ref(part) for part in found)
        return found

    monkeypatch.setattr(refining, "balanced", watched)
    mlp = Mlp()
    with refining.trained_parts(mlp.block):
        assert len(made) == 6
        assert [ref() for ref in made] == [None] * 6


def test_codes_go_as_far_among_many_whose_gradients_are_small() -> None:
    ways = []
    for count in (2**10, 2**24):
        codes = nn.Parameter(torch.zeros(count))
        optimizer = refining.adam([(codes, 4.0)], 0.01)
        codes.grad = torch.full_like(codes, 1.0 / count)
        optimizer.step()
        ways.append(-float(codes.detach()[0]))
    assert ways == pytest.approx([0.04 / (1 + 0.035)] * 2, rel=1e-3)
