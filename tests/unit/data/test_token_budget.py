"""A number of tokens is reached by whole rows in the order of their hash, whatever the rounds in which they are counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emloc_ray.data.hash_order import row_hash
from emloc_ray.data.reading import SourceFile
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_budget import rows_within

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=300)


class Counter:
    """Knows the tokens of every row, and remembers which were asked for."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens)
        self.asked: list[int] = []
        self.selection = RowSelection.all_rows([SourceFile("f", "jsonl", len(tokens))])

    def __call__(self, selection: RowSelection) -> NDArray[np.int64]:
        rows = np.concatenate(list(selection.chunks()))
        self.asked += rows.tolist()
        return self.tokens[rows]

    def in_order(self, seed: int) -> list[int]:
        """The tokens of all rows in the order of their hash."""
        return self.tokens[np.argsort(row_hash(np.arange(len(self.tokens)), seed))].tolist()


@pytest.mark.parametrize("first_rows", [1, 7, 1000])
@given(lengths, st.integers(1, 4000), st.integers(0, 2**40))
def test_whole_rows_reach_it_and_all_but_the_last_do_not(
    first_rows: int, tokens: list[int], wanted: int, seed: int
) -> None:
    counter = Counter(tokens)
    rows = rows_within(counter.selection, wanted, seed, counter, first_rows=first_rows)
    ordered = counter.in_order(seed)
    if sum(tokens) < wanted:
        assert rows == len(tokens)
    else:
        assert sum(ordered[: rows - 1]) < wanted <= sum(ordered[:rows])
    assert len(counter.asked) == len(set(counter.asked))  # no row is counted twice


@given(lengths, st.integers(1, 2000), st.integers(0, 2000), st.integers(0, 2**40))
def test_fewer_tokens_take_fewer_of_the_same_rows(tokens: list[int], small: int, more: int, seed: int) -> None:
    counter = Counter(tokens)
    few, many = (rows_within(counter.selection, wanted, seed, counter) for wanted in (small, small + more))
    assert few <= many
    taken = [set(np.concatenate(list(counter.selection.sample(rows, seed).chunks())).tolist()) for rows in (few, many)]
    assert taken[0] <= taken[1]


def test_little_more_is_tokenized_than_is_taken() -> None:
    generator = np.random.default_rng(0)
    counter = Counter(generator.integers(10, 100, 100_000).tolist())
    rows = rows_within(counter.selection, 1_000_000, 3, counter)
    assert 17_000 < rows < 20_000
    assert len(counter.asked) < 1.1 * rows


def test_rounds_are_bounded() -> None:
    counter = Counter([1] * 2000)
    sizes = []

    def counted(selection: RowSelection) -> NDArray[np.int64]:
        sizes.append(len(selection))
        return counter(selection)

    assert rows_within(counter.selection, 1500, 0, counted, most_rows=300) == 1500
    assert max(sizes) == 300
