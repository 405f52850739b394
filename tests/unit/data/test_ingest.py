"""The order of samples: a function of seed, epoch, row and world size; streamed by Ray Data as it is written down."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from faulting.s3 import uri
from hypothesis import given
from hypothesis import strategies as st
from stage_artifacts import write_tokens

from emloc_ray.data import ingest
from emloc_ray.data.formats import Tokens
from emloc_ray.data.ingest import SampleOrder, read_micro_steps, stream_batches
from emloc_ray.data.packing import num_sequences, packs_of
from emloc_ray.data.token_shards import TokenShards, shard_name, write_index, write_shard
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import Stored

orders = st.builds(
    SampleOrder,
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    rank=st.just(0),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)


def global_steps(order: SampleOrder, begin: int, end: int) -> list[list[int]]:
    """For each global micro-step the rows of all ranks, rank after rank."""
    ranks = [
        replace(order, rank=rank).micro_steps(begin, end).reshape(end - begin, -1) for rank in range(order.world_size)
    ]
    return np.concatenate(ranks, axis=1).tolist()


@given(orders)
def test_an_epoch_is_a_permutation_of_its_own(order: SampleOrder) -> None:
    first = order.epoch(0)
    assert sorted(first) == list(range(order.num_rows))
    assert first.tolist() == order.epoch(0).tolist()
    if order.num_rows > 20:
        assert first.tolist() != order.epoch(1).tolist()
        assert first.tolist() != replace(order, seed=order.seed + 1).epoch(0).tolist()
        # Neither is the next seed's epoch this seed's next one, shifted.
        assert order.epoch(1).tolist() != replace(order, seed=order.seed + 1).epoch(0).tolist()


@given(orders, st.integers(1, 4))
def test_ranks_part_each_step_and_every_epoch_visits_every_row_once(order: SampleOrder, epochs: int) -> None:
    per_step = order.batch_size * order.world_size
    steps = -(-epochs * order.num_rows // per_step)
    stream = [row for step in global_steps(order, 0, steps) for row in step]
    assert len(stream) == steps * per_step
    for number in range(epochs):
        epoch = stream[number * order.num_rows : (number + 1) * order.num_rows]
        assert epoch == order.epoch(number).tolist()
        assert sorted(epoch) == list(range(order.num_rows))


@given(orders, st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_resuming_anywhere_gives_the_same(order: SampleOrder, a: int, b: int, c: int) -> None:
    begin, middle, end = sorted((a, b, c))
    whole = order.micro_steps(begin, end).tolist()
    assert order.micro_steps(begin, middle).tolist() + order.micro_steps(middle, end).tolist() == whole
    assert len(whole) == (end - begin) * order.batch_size
    assert order.micro_steps(0, end).tolist()[begin * order.batch_size :] == whole


@given(orders)
def test_the_world_s_size_only_deals_the_stream_out(order: SampleOrder) -> None:
    # One rank of a batch of w·b reads in a step what w ranks of b read together.
    alone = replace(order, world_size=1, batch_size=order.batch_size * order.world_size)
    assert global_steps(order, 0, 9) == global_steps(alone, 0, 9)


@pytest.fixture
def tokens_dir(tmp_path: Path) -> Path:
    """Row i is i + 1 times the token i; three shards of unlike size."""
    rows = [Tokens([i] * (i + 1), [False] * i + [True]) for i in range(17)]
    for number, (begin, end) in enumerate([(0, 5), (5, 6), (6, 17)]):
        write_shard(tmp_path / shard_name(number), rows[begin:end])
    write_index(tmp_path, [5, 1, 11], {})
    return tmp_path


@given(orders, st.integers(0, 8), st.integers(0, 8))
def test_what_was_seen_is_what_all_ranks_read(order: SampleOrder, begin: int, more: int) -> None:
    found = [rows.tolist() for rows in order.batches(begin, begin + more)]
    assert found == order.micro_steps(begin, begin + more).reshape(more, order.batch_size).tolist()
    ranks = [replace(order, rank=rank).micro_steps(0, more) for rank in range(order.world_size)]
    assert order.seen(more).tolist() == sorted(set(np.concatenate(ranks).tolist()))


def test_micro_steps_are_read_with_their_tokens(tokens_dir: Path) -> None:
    order = SampleOrder(num_rows=17, batch_size=3, rank=1, world_size=2, seed=5)
    table = read_micro_steps(tokens_dir, order, 2, 7)
    rows = order.micro_steps(2, 7).tolist()
    assert table["input_ids"].to_pylist() == [[row] * (row + 1) for row in rows]
    assert table["completion_mask"].to_pylist() == [[False] * row + [True] for row in rows]


def test_packs_are_read_in_the_same_order_each_row_once_an_epoch(tokens_dir: Path) -> None:
    packs = packs_of(tokens_dir, 20)
    assert len(packs) == num_sequences(tokens_dir, 20) < 17 == num_sequences(tokens_dir, None)
    order = SampleOrder(len(packs), batch_size=2, rank=0, world_size=1, seed=5, pack_length=20)
    steps = len(packs) // 2
    batches = list(stream_batches(tokens_dir, order, 0, steps))
    expected = [
        [packs[number] for number in numbers] for numbers in order.micro_steps(0, steps).reshape(-1, 2).tolist()
    ]
    assert [[sorted(set(pack.input_ids)) for pack in batch] for batch in batches] == [
        [sorted(p) for p in b] for b in expected
    ]
    assert all(sum(pack.row_lengths) == len(pack) <= 20 for batch in batches for pack in batch)
    assert list(stream_batches(tokens_dir, order, 1, steps)) == batches[1:]


@pytest.mark.usefixtures("ray_session")
def test_ray_data_streams_the_order_as_it_is(tokens_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "STEPS_PER_TASK", 4)  # several read tasks, which may finish in any order
    order = SampleOrder(num_rows=17, batch_size=3, rank=0, world_size=2, seed=5)
    map_batches, nodes = ray.data.Dataset.map_batches, list[str]()

    def recorded(dataset: Any, *arguments: Any, **options: Any) -> Any:
        nodes.append(options["scheduling_strategy"].node_id)
        return map_batches(dataset, *arguments, **options)

    monkeypatch.setattr(ray.data.Dataset, "map_batches", recorded)
    batches = list(stream_batches(tokens_dir, order, 3, 21))
    assert nodes == [ray.get_runtime_context().get_node_id()]  # which has the split
    expected = order.micro_steps(3, 21).reshape(-1, 3).tolist()
    assert [[row.input_ids[0] for row in batch] for batch in batches] == expected
    assert all(row.completion_mask == [False] * row.input_ids[0] + [True] for batch in batches for row in batch)


@pytest.mark.parametrize("what", ["lengths", "steps"])
def test_shards_of_a_store_are_fetched_several_at_once(
    what: str, s3_port: int, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, stored = write_tokens(tmp_path / "tokens", 24, 2), mirror(uri(s3_port, f"several/{what}")) / "tokens"
    for file in here.iterdir():
        copy_file(file, stored / file.name)
    shutil.rmtree(stored)  # as on another node
    asked: list[Path] = []
    second, download = threading.Event(), ObjectStore.download

    def together(store: ObjectStore, info: Stored, target: Path) -> None:
        if "shard-" in target.name:
            asked.append(target)
            if len(asked) > 1:
                second.set()
            assert second.wait(20)  # while the first is fetched
        download(store, info, target)

    monkeypatch.setattr(ObjectStore, "download", together)
    if what == "lengths":
        assert TokenShards(stored).lengths().tolist() == TokenShards(here).lengths().tolist()
    else:
        order = SampleOrder(num_rows=24, batch_size=2, rank=0, world_size=1, seed=3)
        assert read_micro_steps(stored, order, 0, 12).equals(read_micro_steps(here, order, 0, 12))
