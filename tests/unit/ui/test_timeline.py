"""Timelines of stages, from what a run's manifest and log say of it, whole or killed."""

from __future__ import annotations

import pytest
from run_samples import manifest

from emloc_ray.ui import timeline
from emloc_ray.ui.timeline import Clock


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


def test_a_line_a_finished_stage_in_the_order_of_their_begins() -> None:
    found = timeline.run_lines(manifest("data", "calibrate"))
    assert [(name, [bar.name for bar in bars]) for name, bars in found] == [
        ("data", ["data"]),
        ("calibrate", ["calibrate"]),
    ]
    assert timeline.run_lines({}) == []


def test_names_and_kinds_are_escaped() -> None:
    evil = '"><s title="<s>\x00'
    drawn = timeline.draw([(evil, [timeline.StageRun(evil, 1.0, 2.0)])], '"<s>')
    assert drawn is not None
    assert "<s" not in drawn["svg"].replace("<svg", "")
    assert 'class="other"' in drawn["svg"]
    assert "\x00" not in drawn["svg"]
