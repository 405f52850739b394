"""Waits for what may never come."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from emloc_ray.data.polling import polled


class Stop(Exception):
    pass


def test_items_come_in_order_and_then_what_was_raised() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise KeyError("broken")

    got: list[int] = []
    with polled(range(3), lambda: None) as rows:
        assert list(rows) == [0, 1, 2]
    with pytest.raises(KeyError, match="broken"), polled(items(), lambda: None) as rows:
        got.extend(rows)
    assert got == [0, 1, 2]


def test_who_waits_for_what_hangs_can_stop_and_the_work_is_ended() -> None:
    hangs, ended, looks = threading.Event(), threading.Event(), []

    def items() -> Iterator[int]:
        yield 0
        hangs.wait(60)
        yield 1
        raise AssertionError("it is asked for more after it was left")

    def look() -> None:
        looks.append(len(noted))
        if len(looks) == 3:
            raise Stop

    noted: list[int] = []
    with pytest.raises(Stop), polled(items(), look, ended.set, look_s=0.05) as rows:
        noted.extend(rows)
    assert ended.is_set()
    assert (noted, looks[-1]) == ([0], 1)
    hangs.set()
