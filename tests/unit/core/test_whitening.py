"""The damped Gram, its root, and the products that skip half of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretend_device import METER, pretend_device
from torch import Tensor

from emloc_ray.core.factorization import factorize
from emloc_ray.core.gram import Gram
from emloc_ray.core.quantization import DAMPENING_FRAC, quantize
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError


def tokens_of(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("features", [1, 7, 191, 192, 193, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_damped_gram(features: int, dtype: torch.dtype) -> None:
    tokens = tokens_of(2 * features, features)
    whitening = Whitening(tokens.T @ tokens, dampening_frac=1e-3)
    damped = tokens.T @ tokens
    damped += 1e-3 * damped.trace() / features * torch.eye(features, dtype=torch.float64)
    weight = tokens_of(11, features, seed=1)
    tolerance: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    )
    outer = whitening.outer(weight.to(dtype))
    assert outer.dtype == dtype
    assert torch.equal(outer, outer.T)
    expected = weight @ damped @ weight.T / whitening.scale
    torch.testing.assert_close(outer.double(), expected, **tolerance)
    assert whitening.energy(weight.to(dtype)) == pytest.approx(float(expected.trace()), rel=1e-5)
    whitened = whitening.whiten(weight.to(dtype)).double()
    torch.testing.assert_close(whitened @ whitened.T, expected, **tolerance)
    torch.testing.assert_close(whitening.times(weight.T), damped @ weight.T / whitening.scale, rtol=1e-12, atol=1e-12)
    root = whitening.root(torch.float64)
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.T * whitening.scale, damped, rtol=1e-10, atol=1e-10)


def test_takes_a_gram_and_shares_its_root() -> None:
    tokens = tokens_of(30, 5)
    gram = Gram.zero(5, torch.float64)
    gram.update(tokens)
    whitening = Whitening(gram)
    plain = Whitening(tokens.T @ tokens)
    torch.testing.assert_close(whitening.matrix(torch.float64), plain.matrix(torch.float64))
    assert whitening.root(torch.float32) is whitening.root(torch.float32)


@pytest.mark.parametrize("features", [193, 700])
def test_a_matrix_whose_halves_differ_is_refused(features: int) -> None:
    tokens = (tokens_of(5000, features) @ torch.diag(torch.logspace(0, -3, features, dtype=torch.float64))).float()
    tokens[:, features // 2] *= 3000.0
    gram = Gram.zero(features)
    gram.update(tokens)
    weight, sentence = (
        torch.ones(2, features),
        "upper half of the Gram of a is not that of its lower one: give the Gram",
    )
    for matrix in (gram.matrix, gram.matrix.T, gram.matrix.double(), gram.matrix * 1e26, gram.symmetric().triu()):
        with pytest.raises(ValueError, match=sentence):
            Whitening(matrix, name="a")
        with pytest.raises(ValueError, match=sentence):
            factorize(weight, matrix, 1, name="a")
    factorize(weight, gram.symmetric(), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 30.0])
@pytest.mark.parametrize("features", [2, 700])
def test_rounding_alone_does_not_make_halves_differ(features: int, shift: float, dtype: torch.dtype) -> None:
    tokens = tokens_of(900, features) + shift
    tokens[:, ::5] *= 0.0
    tokens[:, 1] *= 1e4
    matrix = (tokens.T @ tokens).to(dtype)
    noise = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = matrix * (1 + torch.finfo(dtype).eps * noise.round())
    with torch.autocast("cpu", torch.bfloat16):
        made = Whitening(rounded)
        shifted = Whitening(matrix.float() - 1e-4 * matrix.float().diagonal().mean() * torch.eye(features))
    assert made.scale == pytest.approx(float(rounded.diagonal().double().mean()))
    assert shifted.scale == pytest.approx(float(matrix.diagonal().double().mean()), rel=1e-3)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scale_keeps_extreme_sums_in_range(factor: float) -> None:
    tokens = tokens_of(30, 5).float()
    whitening = Whitening(tokens.T @ tokens * factor)
    torch.testing.assert_close(whitening.matrix(torch.float32), Whitening(tokens.T @ tokens).matrix(torch.float32))
    assert whitening.scale == pytest.approx(float((tokens.T @ tokens).trace()) / 5 * factor)


def test_a_sum_that_rounding_made_indefinite_still_has_a_root() -> None:
    tokens = tokens_of(3, 6)
    gram = tokens.T @ tokens - 1e-3 * torch.eye(6, dtype=torch.float64)
    whitening = Whitening(gram)
    for dtype in (torch.float32, torch.float64):
        root = whitening.root(dtype)
        assert torch.equal(root, root.tril())
        torch.testing.assert_close(
            (root @ root.T).double(), whitening.matrix(torch.float64), rtol=0, atol=2e-3 / whitening.scale
        )


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_sum_of_few_tokens_has_a_cheap_root(num_tokens: int) -> None:
    tokens = tokens_of(num_tokens, 512).float()
    whitening = Whitening(tokens.T @ tokens)
    assert torch.linalg.eigvalsh(whitening.matrix(torch.float64))[0] < 0  # float32's rounding is above the damping
    root = whitening.cholesky(torch.float32)
    assert root is not None
    assert root is whitening.root(torch.float32)
    difference = (root.double() @ root.double().T) - whitening.matrix(torch.float64)
    assert difference.abs().max() < 1.5e-4  # of a diagonal whose mean is 1: damped up to a hundred times as much


def test_cholesky_takes_float64_where_float32_does_not_do() -> None:
    tokens = tokens_of(3, 300)
    tokens[:, 0] += 100.0
    tokens = tokens @ torch.linalg.qr(tokens_of(300, 300, 1)).Q
    whitening = Whitening(tokens.T @ tokens)
    assert int(torch.linalg.cholesky_ex(whitening.matrix(torch.float32)).info) != 0
    root = whitening.cholesky(torch.float32)
    assert root is not None
    assert root.dtype == torch.float32
    assert root is whitening.root(torch.float32)
    torch.testing.assert_close(
        (root.double() @ root.double().T), whitening.matrix(torch.float64), rtol=0, atol=1e-6 * 300
    )


def test_zero_gram_and_identity_whiten_alike() -> None:
    for whitening in (Whitening(torch.zeros(4, 4)), Whitening.identity(4)):
        assert whitening.is_identity
        assert torch.equal(whitening.matrix(torch.float32), torch.eye(4))
        assert torch.equal(whitening.root(torch.float64), torch.eye(4, dtype=torch.float64))
        weight = tokens_of(3, 4)
        torch.testing.assert_close(whitening.outer(weight), weight @ weight.T)
        assert torch.equal(whitening.whiten(weight), weight)
        assert whitening.energy(weight) == pytest.approx(float(weight.square().sum()))


def test_an_identity_takes_no_memory_until_its_matrix_is_asked_for() -> None:
    identity = Whitening.identity(10**6)
    assert (identity.in_features, identity.is_identity) == (10**6, True)
    assert torch.equal(identity.diagonal(), torch.ones(10**6))
    tokens = tokens_of(5, 4)
    whitening = Whitening(tokens.T @ tokens)
    assert torch.equal(whitening.diagonal(), whitening.matrix(torch.float32).diagonal())
    order, root = Whitening.identity(3).root_by_energy(1e-2)
    assert torch.equal(order, torch.arange(3))
    assert torch.equal(root, torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_lost", [False, True])
def test_the_root_by_energy_is_that_of_the_gram_in_order_which_stays_as_it_was(
    dtype: torch.dtype, is_lost: bool
) -> None:
    """Where float32 has no root too: that in float64 is of the sums as they were."""
    tokens = tokens_of(3, 300)
    tokens[:, 0] += 100.0
    tokens = tokens @ torch.linalg.qr(tokens_of(300, 300, 1)).Q
    gram, damping = (tokens.T @ tokens).to(dtype), 1e-6 if is_lost else 1e-2
    given = gram.clone()
    order, root = Whitening(gram).root_by_energy(damping)
    assert torch.equal(gram, given)
    assert torch.equal(order, given.diagonal().argsort())
    whole = Whitening(given[order][:, order], damping)
    assert bool(torch.linalg.cholesky_ex(whole.matrix(torch.float32)).info) is is_lost
    assert torch.equal(root, whole.root(torch.float32))


def test_rounding_to_integers_holds_the_gram_three_times() -> None:
    """As summed, damped, and the root by energy."""
    order, device = 768, pretend_device()
    tokens, weight = tokens_of(2 * order, order).float(), tokens_of(16, order).float().to(device)
    whitening = Whitening((tokens.T @ tokens).to(device))
    square, before = 4 * order**2, METER.current
    METER.restart()
    whitening.root_by_energy(DAMPENING_FRAC)
    assert METER.peak - before < 2.1 * square
    quantize(weight, whitening, 2, 64)
    assert 2 * square <= METER.peak - before < 2.5 * square


def test_integers_under_an_identity_ask_for_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, identity = tokens_of(6, 40), Whitening.identity(40)
    expected = quantize(weight, Whitening(torch.zeros(40, 40), 0.0), 4, 16).dense()
    monkeypatch.delattr(Whitening, "matrix")
    assert torch.equal(quantize(weight, identity, 4, 16).dense(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(value: float) -> None:
    gram = torch.eye(4)
    gram[2, 1] = value
    with pytest.raises(NumericsError, match=r"Gram of model\.q_proj holds a NaN or an Inf"):
        Whitening(gram, name="model.q_proj")


def test_refuses_what_is_no_gram() -> None:
    with pytest.raises(ValueError, match="square"):
        Whitening(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="dampening_frac"):
        Whitening(torch.eye(2), dampening_frac=-1e-6)
