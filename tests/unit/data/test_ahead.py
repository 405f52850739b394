"""Batches that are made while the one before is read."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data.ahead import batches_by_length, made_ahead, pinned
from emloc_ray.data.formats import Tokens


def test_items_are_made_in_order_by_another_thread_before_they_are_asked_for() -> None:
    made: dict[int, threading.Thread] = {}
    third = threading.Event()

    def make(item: int) -> int:
        made[item] = threading.current_thread()
        if item == 2:
            third.set()
        return item * 10

    results = made_ahead(range(9), make)
    assert next(results) == 0
    assert third.wait(10)
    assert 4 not in made  # no more than wait
    assert [*results] == [10 * item for item in range(1, 9)]
    assert threading.main_thread() not in made.values()
    assert [*made_ahead([], make)] == []


def test_what_is_not_ahead_is_made_when_it_is_asked_for() -> None:
    made: list[int] = []
    results = made_ahead(range(3), lambda item: made.append(item) or item, ahead=False)
    assert next(results) == 0
    assert made == [0]


def test_an_error_comes_at_its_turn_and_no_thread_is_left() -> None:
    before = threading.active_count()
    results = made_ahead([1, 0, 2], lambda item: 1 / item)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    left = made_ahead(range(100), lambda item: item)
    next(left)
    left.close()
    assert threading.active_count() == before


def test_nothing_is_pinned_without_a_gpu() -> None:
    batch = {"a": torch.zeros(2)}
    assert not torch.cuda.is_available()
    assert pinned(batch) is batch


@given(st.lists(st.integers(1, 20), max_size=20), st.integers(1, 6))
def test_batches_by_length_hold_every_row_once_under_its_number(lengths: list[int], batch_size: int) -> None:
    rows = [Tokens([number] * length, [True] * length) for number, length in enumerate(lengths)]
    batches = list(batches_by_length(rows, batch_size, pad_token_id=99))
    assert sorted(number for numbers, _ in batches for number in numbers) == list(range(len(rows)))
    assert all(len(numbers) == batch_size for numbers, _ in batches[:-1])
    in_order = [lengths[number] for numbers, _ in batches for number in numbers]
    assert in_order == sorted(lengths)
    for numbers, batch in batches:
        assert batch["input_ids"][:, 0].tolist() == numbers
        assert batch["attention_mask"].sum(dim=1).tolist() == [lengths[number] for number in numbers]
