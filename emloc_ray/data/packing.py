"""Rows joined into sequences of a fixed length that do not see each other: each is padded less than a row is."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.runs.fingerprint import looks_in
from emloc_ray.io.store.shared import Shared

CHUNK = 65536  # rows that are Python numbers at once


@dataclass(frozen=True)
class Packs:
    """Which rows each sequence joins: pack p is ``rows[starts[p] : starts[p + 1]]``."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return self.rows[self.starts[number] : self.starts[number + 1]].tolist()


def pack_rows(lengths: Sequence[int] | NDArray[np.int64], limit: int) -> Packs:
    """Packs rows of so many tokens by best-fit decreasing: the longest row first, each where it leaves least space of
    ``limit`` tokens. The same as TRL's ``packing_strategy="bfd"`` (https://arxiv.org/abs/2404.10830)."""
    counts = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-counts, kind="stable")
    pack_of = np.empty(len(counts), dtype=np.int64)
    with_space: dict[int, list[int]] = {}  # packs by the space that they have left
    spaces, num_packs = 0, 0  # bit s of spaces: there is a pack with space s
    for row, length in _pairs(order, counts):
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, pack = limit, num_packs
            num_packs += 1
        pack_of[row] = pack
        if left := space - length:
            with_space.setdefault(left, []).append(pack)
            spaces |= 1 << left
    grouped = order[np.argsort(pack_of[order], kind="stable")]
    return Packs(grouped, np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=num_packs))]).astype(np.int64))


def _pairs(order: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Rows in their order with their tokens."""
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        yield from zip(rows.tolist(), counts[rows].tolist(), strict=True)


def packs_of(tokens_dir: Path, limit: int) -> Packs:
    """The packs of a split's rows; made once for all tasks of a process whose rows are as long."""
    shards = TokenShards(tokens_dir)
    return _PACKS.get((_lengths_key(shards), limit), lambda: pack_rows(shards.lengths(), limit))


def num_sequences(tokens_dir: Path, limit: int | None) -> int:
    """The rows of a split, or the packs of at most ``limit`` tokens that they make."""
    shards = TokenShards(tokens_dir)
    if limit is None:
        return len(shards)
    return _COUNTS.get((_lengths_key(shards), limit), lambda: len(packs_of(tokens_dir, limit)))


def _lengths_key(shards: TokenShards) -> str:
    """A hash of the rows' lengths, under which tasks share their packs. Lengths are read again where the files have changed."""
    looks = str(shards.directory), json.dumps(shards.index), looks_in(shards.directory)
    return _KEYS.get(looks, lambda: hashlib.sha256(shards.lengths().tobytes()).hexdigest())


_PACKS, _COUNTS, _KEYS = Shared[Packs](4), Shared[int](4096), Shared[str](4096)


def join(rows: Sequence[Tokens]) -> Tokens:
    """Rows as one sequence that knows where each ends; rows that show images are not joined."""
    ids = [token for row in rows for token in row.input_ids]
    mask = [is_completion for row in rows for is_completion in row.completion_mask]
    return replace(rows[0], input_ids=ids, completion_mask=mask, row_lengths=tuple(map(len, rows)))
