"""Packing by best-fit decreasing, against a search through all packs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data import packing
from emloc_ray.data.formats import Tokens
from emloc_ray.data.packing import join, num_sequences, pack_rows, packs_of
from emloc_ray.data.token_shards import collate, shard_name, write_index, write_shard

LIMIT = 24


def best_fit(lengths: list[int]) -> list[int]:
    """The spaces that packs are left with, each found by looking at all of them."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else LIMIT) - length)
    return sorted(spaces)


@given(st.lists(st.integers(1, LIMIT), max_size=80))
def test_every_row_is_in_one_pack_where_it_leaves_least_space(lengths: list[int]) -> None:
    packs = pack_rows(lengths, LIMIT)
    parts = [packs[number] for number in range(len(packs))]
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert sorted(LIMIT - sum(lengths[row] for row in part) for part in parts) == best_fit(lengths)
    again = pack_rows(lengths, LIMIT)
    assert (again.rows.tolist(), again.starts.tolist()) == (packs.rows.tolist(), packs.starts.tolist())


def test_positions_begin_again_at_each_row_and_at_the_padding() -> None:
    rows = [Tokens([5, 6, 7], [False, True, True]), Tokens([8, 9], [False, True])]
    batch = collate([join(rows), join(rows[1:])], pad_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [8, 9, 0, 0, 0, 0, 0, 0]]
    assert batch["completion_mask"].sum().item() == 4
    assert "position_ids" not in collate(rows, 0)


def test_other_rows_at_one_place_are_packed_by_their_own_lengths(tmp_path: Path) -> None:
    packed = []
    for lengths in ((1, 1, 6), (1, 6, 1)):
        write_shard(tmp_path / shard_name(0), [Tokens([5] * length, [True] * length) for length in lengths])
        write_index(tmp_path, [len(lengths)], {})
        packed.append(packs_of(tmp_path, 8).rows.tolist())
    assert packed == [[2, 0, 1], [1, 0, 2]]


def test_tasks_with_copies_of_the_same_rows_pack_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    monkeypatch.setattr(packing, "pack_rows", lambda lengths, limit: packed.append(limit) or pack_rows(lengths, limit))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / shard_name(0), [Tokens([5] * length, [True] * length) for length in (2, 3, 11)])
        write_index(tmp_path / name, [3], {})
        assert num_sequences(tmp_path / name, 13) == len(packs_of(tmp_path / name, 13)) == 2
    (tmp_path / "one" / shard_name(0)).chmod(0o400)  # as a link to it does, this changes its times
    assert num_sequences(tmp_path / "one", 13) == 2
    assert packed == [13]
    assert num_sequences(tmp_path / "one", 12) == 2
    assert packed == [13, 12]


def test_more_rows_than_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [row % LIMIT + 1 for row in range(50)]
    whole = pack_rows(lengths, LIMIT)
    monkeypatch.setattr(packing, "CHUNK", 7)
    parts = pack_rows(lengths, LIMIT)
    assert (parts.rows.tolist(), parts.starts.tolist()) == (whole.rows.tolist(), whole.starts.tolist())
