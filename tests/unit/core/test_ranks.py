"""The rank that a compression ratio leaves: the parameters kept never exceed it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_ray.core.ranks import Storage, factor_parameters, possible_ranks, rank_for_ratio, rank_multiple


@pytest.mark.parametrize(
    ("out_features", "in_features", "ratio", "rank"),
    [
        (576, 576, 0.5, 144),
        (192, 576, 0.5, 72),
        (1536, 576, 0.5, 209),
        (576, 1536, 0.25, 104),
        (4096, 4096, 0.25, 512),
        (4096, 14336, 0.1, 318),
        (100, 100, 0.001, 1),
        (100, 100, 1.0, None),
        (100, 100, 1.5, None),
        (1, 1, 0.5, None),
        (1, 4096, 0.5, None),
        (2, 2, 0.9, None),
        (3, 2, 0.5, 1),
        (88, 50, 0.69, 22),
        (34, 85, 0.7, 17),
    ],
)
def test_known_ranks(out_features: int, in_features: int, ratio: float, rank: int | None) -> None:
    assert rank_for_ratio(out_features, in_features, ratio) == rank


@pytest.mark.parametrize(
    ("out_features", "in_features", "ratio", "multiple", "rank"),
    [
        (4096, 14336, 0.5, 64, 1536),
        (1024, 4096, 0.5, 8, 408),
        (576, 1536, 0.5, 1, 209),
        (4096, 4096, 0.02, 64, 40),  # 40.96: below 64, of 8
        (4096, 4096, 0.003, 64, 6),
    ],
)
def test_ranks_are_multiples_of_what_products_like(
    out_features: int, in_features: int, ratio: float, multiple: int, rank: int
) -> None:
    assert rank_multiple(out_features, in_features) == multiple
    assert rank_multiple(out_features, in_features, 7) == 7
    assert rank_for_ratio(out_features, in_features, ratio, multiple=multiple) == rank


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 99))
def test_a_rank_is_the_floor_of_a_ratio_as_it_is_written(out_features: int, in_features: int, hundredths: int) -> None:
    dense = out_features * in_features
    rank = max(1, hundredths * dense // (100 * (out_features + in_features)))
    expected = rank if rank * (out_features + in_features) < dense else None
    assert rank_for_ratio(out_features, in_features, hundredths / 100) == expected


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 20000), st.integers(1, 20000), st.floats(1e-4, 0.999))
def test_kept_parameters_never_exceed_the_ratio(out_features: int, in_features: int, ratio: float) -> None:
    rank = rank_for_ratio(out_features, in_features, ratio)
    dense = out_features * in_features
    if rank is None:
        assert max(1.0, ratio * dense / (out_features + in_features)) * (out_features + in_features) >= dense * (
            1 - 1e-12
        )
        return
    kept = rank * (out_features + in_features)
    assert kept < dense
    assert 1 <= rank <= min(out_features, in_features)
    if rank > 1:
        assert Fraction(kept) <= Fraction(ratio) * dense * (1 + Fraction(1, 10**12))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 5000), st.integers(2, 5000), st.floats(1e-3, 0.9), st.floats(0.0, 0.09))
def test_rank_grows_with_the_ratio(out_features: int, in_features: int, ratio: float, more: float) -> None:
    smaller, larger = (
        rank_for_ratio(out_features, in_features, ratio),
        rank_for_ratio(out_features, in_features, ratio + more),
    )
    assert larger is None or (smaller is not None and smaller <= larger)


@pytest.mark.parametrize(
    ("out_features", "in_features", "ratio", "rank"),
    [
        (576, 576, 0.5, 168),
        (192, 576, 0.5, 80),
        (1536, 576, 0.5, 235),
        (4096, 4096, 0.25, 548),
        (100, 100, 0.001, 1),
        (100, 100, 1.0, None),
        (1, 4096, 0.5, None),
        (2, 2, 0.9, 1),
        (2, 3, 0.9, 1),
        (64, 64, 0.9999, 63),
    ],
)
def test_known_ranks_of_pivoted_factors(out_features: int, in_features: int, ratio: float, rank: int | None) -> None:
    assert rank_for_ratio(out_features, in_features, ratio, "pivoted") == rank


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 20000), st.integers(1, 20000), st.floats(1e-4, 0.999))
def test_pivoted_factors_keep_the_most_that_the_ratio_leaves(out_features: int, in_features: int, ratio: float) -> None:
    rank = rank_for_ratio(out_features, in_features, ratio, "pivoted")
    smaller, room = min(out_features, in_features), Fraction(ratio) * out_features * in_features
    if rank is None:
        assert smaller == 1
        return
    assert 1 <= rank < smaller
    plain = rank_for_ratio(out_features, in_features, ratio)
    assert plain is None or rank >= plain
    if rank > 1:
        assert factor_parameters(out_features, in_features, rank, "pivoted") <= room * (1 + Fraction(1, 10**9))
    if rank + 1 < smaller:
        assert factor_parameters(out_features, in_features, rank + 1, "pivoted") >= room * (1 - Fraction(1, 10**9))


@settings(deadline=None, max_examples=200)
@given(
    st.integers(2, 20000),
    st.integers(2, 20000),
    st.floats(1e-4, 0.999),
    st.sampled_from([1, 8, 64]),
    st.sampled_from(["factors", "pivoted"]),
)
def test_possible_ranks_are_smaller_than_the_layer_and_lie_close(
    out_features: int, in_features: int, ratio: float, multiple: int, storage: Storage
) -> None:
    uniform = rank_for_ratio(out_features, in_features, ratio, storage, multiple)
    if uniform is None:
        return
    ranks = possible_ranks(out_features, in_features, uniform, storage, multiple)
    assert ranks == sorted({*ranks})
    assert uniform in ranks
    assert len(ranks) <= 130
    assert all(rank % multiple == 0 or rank in (1, uniform) for rank in ranks)
    dense = out_features * in_features
    assert all(factor_parameters(out_features, in_features, rank, storage) < dense for rank in ranks)
    widest = max((b - a for a, b in itertools.pairwise(ranks)), default=0)
    assert widest <= max(multiple, 0.02 * ranks[-1] + multiple)
