"""Values that threads share are made once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from emloc_ray.io.store.shared import Shared

WAIT_S = 30.0


def test_one_thread_makes_a_value_and_others_wait_for_it() -> None:
    shared, made, both = Shared[int](4), list[str](), threading.Barrier(2, timeout=WAIT_S)

    def make(key: str) -> int:
        made.append(key)
        both.wait()  # the makers of two keys are at work at the same time
        return ord(key)

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda key: shared.get(key, lambda: make(key)), "abababab"))
    assert values == [ord(key) for key in "abababab"]
    assert sorted(made) == ["a", "b"]


def test_what_is_raised_is_no_value_and_the_next_one_tries_again() -> None:
    shared = Shared[int](4)
    with pytest.raises(ZeroDivisionError):
        shared.get("a", lambda: 1 // 0)
    assert shared.get("a", lambda: 1) == 1


def test_what_was_asked_for_longest_ago_goes() -> None:
    shared = Shared[str](2)
    for key in "abac":
        shared.get(key, lambda key=key: key)
    assert shared.get("a", lambda: "again") == "a"
    assert shared.get("b", lambda: "again") == "again"


def test_what_is_not_for_others_is_made_for_each() -> None:
    shared = Shared[int](4)
    assert [shared.get("a", lambda n=n: n, keeps=lambda value: value > 0) for n in (0, 1, 2)] == [0, 1, 1]
