"""When work of which only the whole is seen counts as hanging."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from emloc_ray.stages.ray import pace
from emloc_ray.stages.ray.pace import Overdue, WholePace

Wait = Callable[[WholePace, float, int], None]


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Wait:
    """``wait(pace, seconds, done)``: looks every second for so long."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])

    def go(whole: WholePace, seconds: float, done: int) -> None:
        for _ in range(round(seconds)):
            now[0] += 1
            whole.check(done)

    return go


def test_silence_is_held_against_what_pieces_took(wait: Wait) -> None:
    whole = WholePace()
    wait(whole, 10**5, 0)  # nothing is known
    for done in range(1, 6):
        wait(whole, 200, done)
    wait(whole, 3700, 5)
    with pytest.raises(Overdue, match=r"^it gave nothing for .* is usual$"):
        wait(whole, 300, 5)


def test_silence_from_the_start_is_held_against_the_plan(wait: Wait) -> None:
    whole = WholePace(planned_s=60.0)
    wait(whole, 6 * 3600, 0)
    with pytest.raises(Overdue, match=r"^it gave nothing for 6.0 h, where 60 s was planned for all of the stage$"):
        wait(whole, 10, 0)


def test_a_process_that_was_stopped_itself_goes_on(wait: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = WholePace(planned_s=60.0)
    monkeypatch.setattr(pace.time, "monotonic", lambda: 10**6)
    whole.check(0)
