"""The order of rows by hash, whole or in part, is what sorting all hashes gives."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data import hash_order
from emloc_ray.data.hash_order import row_chunks, row_hash, rows_at, shuffled


def test_hash_does_not_repeat_and_is_the_published_mix() -> None:
    hashes = row_hash(np.arange(100_000), 7)
    assert len(np.unique(hashes)) == 100_000
    # splitmix64 in plain integers
    z = (12345 + 7 * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    assert int(hashes[12345]) == z ^ (z >> 31)


@given(st.integers(1, 3000), st.integers(0, 2**40), st.data())
def test_any_part_of_the_order(num_rows: int, seed: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    whole = np.argsort(row_hash(np.arange(num_rows), seed), kind="stable")
    assert shuffled(num_rows, seed, begin, end).tolist() == whole[begin:end].tolist()


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=200), st.integers(0, 2**40))
def test_rows_with_gaps_in_chunks_of_any_size(rows: set[int], seed: int) -> None:
    known = np.array(sorted(rows))
    ordered = known[np.argsort(row_hash(known, seed), kind="stable")]
    parts = [known[:1], known[1:1], known[1:]]
    found = rows_at(lambda: iter(parts), seed, 0, len(known))
    assert found.tolist() == ordered.tolist()


def test_chunks_cover_the_numbers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_order, "CHUNK_ROWS", 7)
    chunks = list(row_chunks(3, 30))
    assert np.concatenate(chunks).tolist() == list(range(3, 30))
    assert max(map(len, chunks)) == 7


def test_memory_does_not_grow_with_the_rows() -> None:
    peaks = []
    for num_rows in (2**17, 2**21):
        tracemalloc.start()
        assert len(shuffled(num_rows, 1, num_rows // 2, num_rows // 2 + 1000)) == 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**19  # the numbers of the rows alone are 16 MiB
