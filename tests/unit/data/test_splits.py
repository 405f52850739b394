"""Splits: disjoint, complete, and a function of rows and seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data.reading import SourceFile
from emloc_ray.data.splits import SPLITS, RowSelection, assign_splits, row_hash

seeds = st.integers(0, 2**40)
files = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def selection(*sizes: int) -> RowSelection:
    """All rows of files of these sizes."""
    return RowSelection.all_rows([SourceFile(f"f{i}", "jsonl", size) for i, size in enumerate(sizes)])


def members(chosen: RowSelection) -> set[int]:
    assert chosen.rows.tolist() == sorted(set(chosen.rows.tolist()))
    return set(chosen.rows.tolist())


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
    order_before = np.argsort(row_hash(before.rows, seed), kind="stable")
    order_after = [row for row in np.argsort(row_hash(after.rows, seed), kind="stable") if row < len(before)]
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


def test_hash_does_not_repeat_and_is_the_published_mix() -> None:
    hashes = row_hash(np.arange(100_000), 7)
    assert len(np.unique(hashes)) == 100_000
    # splitmix64 in plain integers
    z = (12345 + 7 * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    assert int(hashes[12345]) == z ^ (z >> 31)


@given(files, st.integers(1, 50), st.integers(0, 100), seeds)
def test_units_cover_all_rows_once_in_order(sizes: list[int], rows_per_unit: int, count: int, seed: int) -> None:
    chosen = selection(*sizes).split(count, seed)[1]
    units = chosen.units(rows_per_unit)
    starts = np.cumsum([0, *sizes])
    covered = [[int(starts[file]) + row for file, rows in unit for row in rows] for unit in units]
    assert [row for unit in covered for row in unit] == chosen.rows.tolist()
    assert all(len(unit) == rows_per_unit for unit in covered[:-1])
    assert all(0 < len(unit) <= rows_per_unit for unit in covered[-1:])
    assert all(0 <= row < sizes[file] for unit in units for file, rows in unit for row in rows)


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


def test_all_held_out_rows_where_asked() -> None:
    splits = assign({"train": selection(2000), "eval": selection(900)}, evaluation=None)
    assert len(splits["eval"]) == 900
