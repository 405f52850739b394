from __future__ import annotations

import pytest

from emloc_ray import timeline
from emloc_ray.timeline import Clock


def test_short_pauses_are_time_like_any_other() -> None:
    assert timeline.running_time([(0.0, 10.0), (5.0, 20.0), (70.0, 80.0)]) == Clock(0.0, 80.0)
    clock = timeline.running_time([(0.0, 10.0), (110.0, 120.0)])
    assert clock == Clock(0.0, 20.0, ((10.0, 110.0),))
    assert [clock.at(moment) for moment in (5.0, 50.0, 115.0)] == [5.0, 10.0, 15.0]
    assert timeline.running_time([]) is None


@pytest.mark.parametrize(
    ("seconds", "last", "count"), [(0.0, "0 s", 1), (59.0, "50 s", 6), (134.0, "120 s", 5), (7300.0, "120 min", 5)]
)
def test_ticks_are_round_and_inside(seconds: float, last: str, count: int) -> None:
    ticks = timeline.time_ticks(seconds)
    assert (ticks[-1][1], len(ticks)) == (last, count)
    assert ticks[-1][0] <= seconds


def test_ticks_of_a_year() -> None:
    assert len(timeline.time_ticks(365 * 86400.0)) <= 7
