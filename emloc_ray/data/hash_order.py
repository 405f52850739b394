"""Rows in the order of a hash of their number, computed in chunks: for sampling and shuffling."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

CHUNK_ROWS = 2**16
_BUCKETS = 2**16
_BUCKET_BITS = np.uint64(48)


def row_hash(rows: Rows, seed: int) -> NDArray[np.uint64]:
    """A 64-bit mix of row number and seed (splitmix64, https://prng.di.unimi.it/splitmix64.c). For one seed it is a bijection:
    no two rows have the same hash."""
    with np.errstate(over="ignore"):
        z = rows.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def row_chunks(begin: int, end: int) -> Iterator[Rows]:
    """The numbers ``[begin, end)``, at most ``CHUNK_ROWS`` at once."""
    for start in range(begin, end, CHUNK_ROWS):
        yield np.arange(start, min(end, start + CHUNK_ROWS))


def bucket_counts(chunks: Iterator[Rows], seed: int) -> NDArray[np.int64]:
    """How many rows have a hash in each of 65,536 equal parts of its range."""
    counts = np.zeros(_BUCKETS, dtype=np.int64)
    for rows in chunks:
        counts += np.bincount(_bucket(row_hash(rows, seed)), minlength=_BUCKETS)
    return counts


def rows_at(
    chunks: Callable[[], Iterator[Rows]], seed: int, begin: int, end: int, counts: NDArray[np.int64] | None = None
) -> Rows:
    """The rows at the places ``[begin, end)`` of their order by hash: ``argsort(row_hash(rows))[begin:end]``.

    A radix selection: one pass counts the hashes by bucket (unless ``counts`` are given), another sorts the rows of the buckets
    that hold the places. O(n) time and, beside the result, a chunk, the counts (0.5 MiB) and two buckets of n / 65,536 rows.
    """
    ends = np.cumsum(bucket_counts(chunks(), seed) if counts is None else counts)
    first, last = np.searchsorted(ends, [begin, end - 1], side="right")
    inside = [np.empty(0, dtype=np.int64)]
    for rows in chunks():
        buckets = _bucket(row_hash(rows, seed))
        inside.append(rows[(buckets >= first) & (buckets <= last)])
    candidates = np.concatenate(inside)
    ordered = candidates[np.argsort(row_hash(candidates, seed))]
    before = int(ends[first - 1]) if first else 0
    return ordered[begin - before : end - before]


def shuffled(num_rows: int, seed: int, begin: int, end: int) -> Rows:
    """The places ``[begin, end)`` of the permutation of ``range(num_rows)`` by hash."""
    return rows_at(lambda: row_chunks(0, num_rows), seed, begin, end, _counts(num_rows, seed))


@functools.lru_cache(maxsize=4)
def _counts(num_rows: int, seed: int) -> NDArray[np.int64]:
    return bucket_counts(row_chunks(0, num_rows), seed)


def _bucket(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes >> _BUCKET_BITS).astype(np.int64)
