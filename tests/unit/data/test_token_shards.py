"""Token shards: rows by position, whatever the shards' sizes; padding that nothing counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from faulting.s3 import uri
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data.formats import RowImage, Tokens
from emloc_ray.data.token_shards import (
    TokenShards,
    collate,
    from_table,
    shard_name,
    to_table,
    write_index,
    write_shard,
    written_counts,
)
from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.node_cache import ListedFiles, mirror
from emloc_ray.io.store.objects import Objects

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


def test_images_are_written_some_at_a_time_and_stay_in_the_file(tmp_path: Path) -> None:
    def some() -> Iterator[Tokens]:
        for number in range(9):
            yield Tokens([number, 1], [False, True], (RowImage(bytes([number]) * 4, 1),) if number % 3 else ())

    flat = list(some())
    path = tmp_path / shard_name(0)
    assert write_shard(path, some(), {"rows": 9}, with_images=True, batch_bytes=10) == 9
    # Ten bytes are full with three images: the last batch is the counts' own.
    assert pa.ipc.open_file(pa.memory_map(str(path))).num_record_batches == 3
    assert written_counts(path) == {"rows": 9}
    write_index(tmp_path, [9], {"images": 6, "tokens": 18, "image_bytes": 24})
    shards = TokenShards(tmp_path)
    assert [shards.row(position) for position in range(9)] == flat
    assert isinstance(shards.row(1).images[0].content, memoryview)
    assert shards.row_bytes == (50 * 18 + 24) / 9
    assert from_table(to_table(shards.shard(0), with_images=True)) == flat
    path.write_bytes(path.read_bytes()[:-20])
    assert written_counts(path) is None


def test_no_index_is_not_finished(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name(0), [Tokens([1], [True])])
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        TokenShards(tmp_path)


def test_a_split_on_a_store_is_listed_once_by_each_reader(
    s3_port: int, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = mirror(uri(s3_port, "token-shards/run"))
    shards = [[Tokens([shard, row], [False, True]) for row in range(5)] for shard in range(100)]
    write(root / "data" / "tokens" / "train", shards)
    there = tmp_path / "another node" / root.name / "data" / "tokens" / "train"
    listed: list[str] = []
    below = Objects.below
    monkeypatch.setattr(Objects, "below", lambda store, path="": (listed.append(path), below(store, path))[1])
    for _ in range(2):
        read = TokenShards(there)
        assert [read.row(position) for position in range(500)] == [row for shard in shards for row in shard]
    assert listed == ["data/tokens/train"] * 2


def test_a_shard_that_a_node_dropped_for_room_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write(tmp_path, [[Tokens([1], [True])], [Tokens([2], [True])]])
    first = tmp_path / shard_name(0)
    content, fetched = first.read_bytes(), []
    assert shards.row(0).input_ids == [1]
    first.unlink()

    def fetch(files: ListedFiles, path: Path) -> None:
        fetched.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(ListedFiles, "ensure", fetch)
    assert shards.row(0).input_ids == [1]
    assert shards.row(0).input_ids == [1]
    assert fetched == [first]


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
