"""Token shards: rows by position, whatever the shards' sizes; padding that nothing counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards, collate, length_batches, shard_name, write_index, write_shard
from emloc_ray.errors import ArtifactError

rows = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=20).map(
    lambda pairs: Tokens([token for token, _ in pairs], [completion for _, completion in pairs])
)


def write(directory: Path, shards: list[list[Tokens]]) -> TokenShards:
    for number, shard in enumerate(shards):
        write_shard(directory / shard_name(number), shard)
    write_index(directory, [len(shard) for shard in shards], {"tokens": 3})
    return TokenShards(directory)


@given(st.lists(st.lists(rows, max_size=5), max_size=5))
def test_round_trip_by_position_and_by_shard(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[Tokens]]
) -> None:
    read = write(tmp_path_factory.mktemp("t"), shards)
    flat = [row for shard in shards for row in shard]
    assert len(read) == len(flat)
    assert read.num_shards == len(shards)
    assert [read.row(position) for position in range(len(flat))] == flat
    assert [read.shard(number) for number in range(len(shards))] == shards
    assert read.index["tokens"] == 3


def test_a_rewritten_shard_is_read_anew(tmp_path: Path) -> None:
    old, new = Tokens([1, 2], [False, True]), Tokens([3, 4], [False, True])
    assert write(tmp_path, [[old]]).row(0) == old
    assert write(tmp_path, [[new]]).row(0) == new


def test_no_index_is_not_finished(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name(0), [Tokens([1], [True])])
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        TokenShards(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    read = write(tmp_path, [[Tokens([1], [True])], [Tokens([2], [True])]])
    (tmp_path / shard_name(1)).unlink()
    assert read.row(0).input_ids == [1]
    with pytest.raises(ArtifactError, match=shard_name(1)):
        read.row(1)


@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from([1, 8, 64]))
def test_collate_pads_right_and_counts_no_padding(many: list[Tokens], multiple: int) -> None:
    batch = collate(many, pad_token_id=5, multiple=multiple)
    longest = max(map(len, many))
    length = batch["input_ids"].shape[1]
    assert length % multiple == 0
    assert longest <= length < longest + multiple
    assert all(value.shape == (len(many), length) for value in batch.values())
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    for line, row in enumerate(many):
        n = len(row)
        assert batch["input_ids"][line].tolist() == row.input_ids + [5] * (length - n)
        assert batch["attention_mask"][line].tolist() == [1] * n + [0] * (length - n)
        assert batch["completion_mask"][line].tolist() == row.completion_mask + [False] * (length - n)


@given(st.lists(rows, max_size=20), st.integers(1, 6))
def test_length_batches_hold_every_row_once_with_little_padding(many: list[Tokens], batch_size: int) -> None:
    batches = length_batches(many, batch_size)
    flat = [id(row) for batch in batches for row in batch]
    assert sorted(flat) == sorted(map(id, many))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    lengths = [len(row) for batch in batches for row in batch]
    assert lengths == sorted(lengths)
