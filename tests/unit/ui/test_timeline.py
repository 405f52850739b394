"""Timelines of stages, from what a run's manifest and log say of it, whole or killed."""

from __future__ import annotations

from typing import Any

import pytest
from run_samples import BEGIN, event, events, manifest

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


def lines(*stages: str, told: list[dict[str, Any]] | None = None) -> dict[str, list[tuple[str, float, float]]]:
    """Each line's bars, in seconds after the samples' beginning."""
    found = timeline.run_lines(manifest(*stages), events() if told is None else told)
    return {
        line.name: [(bar.kind, bar.begun_at - BEGIN, bar.finished_at - BEGIN) for bar in line.bars] for line in found
    }


def test_a_killed_run_shows_what_had_run() -> None:
    assert lines("data", "calibrate") == {
        "data": [("data", 0, 0)],
        "calibrate": [("calibrate", 1, 1)],
        "factorize": [("factorize unfinished", 2, 12)],
    }


def test_a_run_of_which_there_is_a_manifest_alone_or_a_log_alone() -> None:
    assert list(lines("data", told=[])) == ["data"]
    assert lines()["factorize"] == [("factorize unfinished", 2, 12)]
    assert lines(told=[]) == {}
    assert timeline.run_lines({}, ()) == []


def test_a_stage_recorded_right_before_the_kill_is_finished() -> None:
    found = lines("data", "calibrate", told=[*events()[:2]])
    assert found == {"data": [("data", 0, 0)], "calibrate": [("calibrate", 1, 1)]}


def test_tries_end_where_they_failed_or_told_last() -> None:
    again = [event("run_started", 500), event("started", 501, stage="factorize"), event("run_failed", 507)]
    found = lines("data", "calibrate", told=[*events(), *again])
    assert found["factorize"] == [("factorize unfinished", 2, 12), ("factorize unfinished", 501, 507)]


def test_a_try_that_was_stopped_stays_beside_the_one_that_came_to_an_end() -> None:
    again = [event("run_stopped", -3), event("run_started", -2), event("started", -1, stage="calibrate")]
    found = lines("data", "calibrate", told=[*events()[:2], *again, event("finished", 1, stage="calibrate")])
    assert found == {"calibrate": [("calibrate unfinished", -30, -3), ("calibrate", 1, 1)], "data": [("data", 0, 0)]}


def test_a_stage_that_is_redone_is_shown_anew() -> None:
    redone = [event("run_started", 100), event("started", 110, stage="calibrate"), event("progress", 119)]
    found = lines("data", told=[*events(), event("finished", 30, stage="factorize"), *redone])
    assert found == {"data": [("data", 0, 0)], "calibrate": [("calibrate unfinished", 110, 119)]}


def test_a_log_that_somebody_wrote_into_spoils_no_page() -> None:
    odd: list[Any] = [
        {"time": "noon", "event": "started", "stage": "data", "message": ""},
        {"time": None, "event": "finished", "message": ""},
        event("started", 3, stage=["data"]),
        event("finished", 4),
    ]
    assert timeline.draw(timeline.run_lines(manifest("data"), odd), "x") is not None


def test_names_and_kinds_are_escaped() -> None:
    evil = [event("started", 1, stage='"><s title="<s>\x00'), event("progress", 2)]
    drawn = timeline.draw(timeline.run_lines(manifest("data"), evil), '"<s>')
    assert drawn is not None
    assert "<s" not in drawn["svg"].replace("<svg", "")
    assert 'class="other"' in drawn["svg"]
    assert "\x00" not in drawn["svg"]
