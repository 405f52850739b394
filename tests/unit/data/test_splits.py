"""Splits: disjoint, complete, and a function of rows and seed alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data.hash_order import row_hash
from emloc_ray.data.reading import SourceFile, scan
from emloc_ray.data.splits import MIXTURE_SEED, SPLITS, RowSelection, assign_splits

seeds = st.integers(0, 2**40)
HELD_OUT = ("eval", "selection", "validation")
files = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def selection(*sizes: int) -> RowSelection:
    """All rows of files of these sizes."""
    return RowSelection.all_rows([SourceFile(f"f{i}", "jsonl", size) for i, size in enumerate(sizes)])


def rows_of(chosen: RowSelection, begin: int = 0, end: int | None = None) -> list[int]:
    return [row for rows in chosen.chunks(begin, end) for row in rows.tolist()]


def members(chosen: RowSelection) -> set[int]:
    rows = rows_of(chosen)
    assert rows == sorted(set(rows))
    assert len(rows) == len(chosen)
    return set(rows)


def test_a_split_is_by_the_hash_in_ascending_order() -> None:
    first, rest = selection(40, 60).split(30, 5)
    order = np.argsort(row_hash(np.arange(100), 5), kind="stable")
    assert rows_of(first) == sorted(order[:30].tolist())
    assert rows_of(rest) == sorted(order[30:].tolist())
    again = rest.split(20, 9)[0]
    ordered = np.array(rows_of(rest))[np.argsort(row_hash(np.array(rows_of(rest)), 9))]
    assert rows_of(again) == sorted(ordered[:20].tolist())


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [((900, 100), (3, 1), (300, 100)), ((90, 100), (1, 1), (90, 90)), ((10, 1000), (100, 1), (10, 1))],
)
def test_sources_with_weights_keep_their_shares_and_no_row_comes_twice(
    sizes: tuple[int, int], weights: tuple[float, float], counts: tuple[int, int]
) -> None:
    files = [SourceFile(f"f{part}", "jsonl", size, part=part) for part, size in enumerate(sizes)]
    halves = [replace(files[0], num_rows=sizes[0] // 2)] * 2 + files[1:]  # a part may have several files
    for sources in (files, halves):
        chosen = RowSelection.mixed(sources, weights, 7)
        kept = members(chosen)
        assert (len([row for row in kept if row < sizes[0]]), len(kept)) == (counts[0], sum(counts))
        first, rest = chosen.split(5, 3)
        assert members(first) | members(rest) == kept
        assert len(first) == 5


@pytest.mark.parametrize("name", HELD_OUT)
def test_rows_held_out_of_a_mixture_have_its_shares(name: str) -> None:
    """They are drawn by other hashes than the mixture: by its own they would all come from the larger source."""
    files = [SourceFile(f"f{part}", "jsonl", size, part=part) for part, size in enumerate((100, 10_000))]
    sizes: dict[str, Any] = {f"num_{split}_samples": 20 if split == name else 0 for split in HELD_OUT}
    of_the_first = 0
    for seed in range(5):
        mixture = RowSelection.mixed(files, (1, 1), seed + MIXTURE_SEED)
        held_out = assign_splits({"train": mixture}, seed=seed, num_calibration_samples=1, **sizes)[name]
        of_the_first += sum(row < 100 for row in members(held_out))
    assert 30 <= of_the_first <= 70  # of 100


def test_validation_rows_are_kept_from_train_where_they_are_asked_for() -> None:
    sizes: dict[str, Any] = {"num_calibration_samples": 9, "num_selection_samples": 5, "num_eval_samples": 7, "seed": 3}
    without = assign_splits({"train": selection(100)}, **sizes)
    splits = assign_splits({"train": selection(100)}, **sizes, num_validation_samples=6)
    assert len(splits["validation"]) == 6
    for name in ("train", "selection", "eval"):
        assert not members(splits[name]) & members(splits["validation"])
    assert members(splits["train"]) | members(splits["validation"]) == members(without["train"])
    own = assign_splits({"train": selection(100), "validation": selection(4)}, **sizes, num_validation_samples=6)
    assert rows_of(own["validation"]) == [0, 1, 2, 3]
    assert members(own["train"]) == members(without["train"])


@given(files, st.integers(0, 100), seeds)
def test_split_parts_the_rows(sizes: list[int], count: int, seed: int) -> None:
    whole = selection(*sizes)
    first, rest = whole.split(count, seed)
    assert len(first) == min(count, len(whole))
    assert not members(first) & members(rest)
    assert members(first) | members(rest) == members(whole)
    assert first.sources == rest.sources == whole.sources


@given(files, st.integers(1, 60), st.integers(0, 60), seeds)
def test_samples_are_nested_and_repeatable(sizes: list[int], small: int, more: int, seed: int) -> None:
    whole = selection(*sizes)
    sample = whole.sample(small, seed)
    assert members(sample) == members(selection(*sizes).sample(small, seed))
    assert members(sample) <= members(whole.sample(small + more, seed))
    # What was sampled stays sampled when rows that were not are gone.
    kept = whole.split(small + more, seed)[0]
    assert members(kept.sample(small, seed)) == members(sample)


@given(files, seeds)
def test_a_file_added_at_the_end_moves_no_row(sizes: list[int], seed: int) -> None:
    before, after = selection(*sizes), selection(*sizes, 50)
    order_before = np.argsort(row_hash(np.array(rows_of(before)), seed))
    order_after = [row for row in np.argsort(row_hash(np.array(rows_of(after)), seed)) if row < len(before)]
    assert order_before.tolist() == order_after


def test_all_rows_where_none_or_too_many_are_asked() -> None:
    whole = selection(5, 4)
    assert (
        members(whole.sample(None, 0)) == members(whole.sample(9, 0)) == members(whole.sample(100, 0)) == set(range(9))
    )


def test_another_seed_is_another_sample_and_a_sample_is_spread() -> None:
    whole = selection(10_000)
    chosen = [members(whole.sample(1000, seed)) for seed in range(3)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert 50 < len(chosen[a] & chosen[b]) < 150  # 100 expected, 9.5 the deviation
    for rows in chosen:
        assert 4500 < np.mean(sorted(rows)) < 5500  # 91 the deviation
        assert 400 < sum(row % 2 for row in rows) < 600


@given(files, st.integers(1, 50), st.integers(0, 100), seeds)
def test_shards_cover_all_rows_once_in_order(sizes: list[int], rows_per_shard: int, count: int, seed: int) -> None:
    chosen = selection(*sizes).split(count, seed)[1]
    bounds = chosen.bounds(rows_per_shard).tolist()
    assert len(bounds) - 1 == -(-len(chosen) // rows_per_shard)
    shards = [rows_of(chosen, begin, end) for begin, end in itertools.pairwise(bounds)]
    assert [row for shard in shards for row in shard] == rows_of(chosen)
    assert all(len(shard) == rows_per_shard for shard in shards[:-1])
    assert all(0 < len(shard) <= rows_per_shard for shard in shards[-1:])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 20), st.data())
def test_rows_are_read_from_the_files_that_hold_them(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], count: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("r")
    for number, size in enumerate(sizes):
        lines = [json.dumps({"text": f"{number}:{row}"}) + "\n" for row in range(size)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    names = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    chosen = RowSelection.all_rows([scan(folder / f"{number}.jsonl") for number in range(len(sizes))]).split(count, 0)[
        1
    ]
    begin = data.draw(st.integers(0, len(names)))
    end = data.draw(st.integers(begin, len(names)))
    expected = [names[row] for row in rows_of(chosen) if begin <= row < end]
    found = list(chosen.read(begin, end))
    assert [row["text"] for _, row in found] == [f"{number}:{row}" for number, row in expected]
    assert [where for where, _ in found] == [f"{folder / f'{number}.jsonl'}, row {row + 1}" for number, row in expected]


def assign(
    given_splits: dict[str, RowSelection], seed: int = 0, evaluation: int | None = 256
) -> dict[str, RowSelection]:
    return assign_splits(
        given_splits, num_calibration_samples=128, num_selection_samples=64, num_eval_samples=evaluation, seed=seed
    )


@given(st.integers(3, 3000), seeds, st.sampled_from([None, 1, 256]))
def test_from_train_alone_nothing_leaks(size: int, seed: int, evaluation: int | None) -> None:
    splits = assign({"train": selection(size)}, seed, evaluation)
    assert tuple(splits) == SPLITS
    train, held_out, chosen_on = (members(splits[name]) for name in ("train", "eval", "selection"))
    assert not train & held_out
    assert not train & chosen_on
    assert not held_out & chosen_on
    assert train | held_out | chosen_on == set(range(size))
    assert members(splits["calibration"]) <= train
    assert len(splits["calibration"]) == min(128, len(train))
    tenth = max(1, size // 10)
    assert len(held_out) == min(evaluation or tenth, tenth)
    assert len(chosen_on) == min(64, tenth)
    assert len(train) >= 1


@pytest.mark.parametrize("name", ["calibration", "selection", "eval"])
def test_a_given_split_is_its_own_and_takes_nothing_from_train(name: str) -> None:
    own = RowSelection.all_rows([SourceFile("own", "jsonl", 1000)])
    with_it, without = assign({"train": selection(2000), name: own}), assign({"train": selection(2000)})
    assert with_it[name].sources == own.sources
    assert len(with_it[name]) == {"calibration": 128, "selection": 64, "eval": 256}[name]
    if name == "calibration":
        assert members(with_it["train"]) == members(without["train"])
    else:
        assert members(with_it["train"]) > members(without["train"])


def test_rows_to_heal_on_are_all_that_were_given_and_change_no_other_split() -> None:
    own = RowSelection.all_rows([SourceFile("own", "jsonl", 1000)])
    with_it, without = assign({"train": selection(2000), "healing": own}), assign({"train": selection(2000)})
    assert tuple(with_it) == (*SPLITS, "healing")
    assert with_it.pop("healing") == own
    assert with_it == without


def test_all_held_out_rows_where_asked() -> None:
    splits = assign({"train": selection(2000), "eval": selection(900)}, evaluation=None)
    assert len(splits["eval"]) == 900
