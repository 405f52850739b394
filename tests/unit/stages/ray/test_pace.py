"""When work of which only the whole is seen counts as hanging."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import pytest

from emloc_ray.stages.ray import pace, tasks
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.pace import Ended, Overdue, Pace, WholePace
from emloc_ray.stages.ray.spans import Span, Timed
from emloc_ray.stages.ray.tasks import Flight, FlightTask, Next

SPAN = Span("", "process 1 on here", "", 0.0, 1.0)

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


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces' seconds each look is handed."""
    counts: list[int] = []
    monkeypatch.setattr(pace, "bound", lambda took, planned_s: counts.append(len(took)))
    return counts


def test_a_look_at_many_tasks_sorts_few_times_and_comes_once_a_second(
    handed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tasks.ray, "wait", lambda flying, **_: (flying, []))
    monkeypatch.setattr(tasks.ray, "get", lambda given: given)
    units = 10**5
    done = Timed(1, SPAN)
    given = iter([None, *[done] * units])

    class Slot(FlightTask):
        def take(self, given: Timed, losses: Losses) -> Next:
            now[0] += 0.001
            return "more" if operator.length_hint(self.submit()) else "over"

    flight = Flight(1, Losses("calibrate"))
    flight.add(Slot("slot 0", lambda: given))
    while flight.pump():
        pass
    assert units / 1000 <= len(handed) <= units / 1000 + 2
    assert max(handed) <= 1000


def test_a_look_at_many_tasks_as_one_sorts_few_times(handed: list[int], wait: Wait) -> None:
    whole = WholePace()
    for done in range(3000):
        wait(whole, 1, done)
    assert max(handed) <= 1000


@pytest.fixture
def silent_task(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, while no task gives anything."""
    now = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(pace.time, "monotonic", lambda: now[0])
        patch.setattr(pace.ray, "wait", lambda tasks, **_: ([], tasks))
        patch.setattr(pace.ray, "cancel", lambda *_, **__: None)
        yield now


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_task_that_tells_elsewhere_how_far_it_is_goes_on(silent_task: list[float], goes_on: bool) -> None:
    """As a training, which yields its end alone."""
    watch, ended = Pace(planned_s=600.0), list[Ended]()
    watch.gave("the training")
    for minute in range(8 * 60):
        silent_task[0] += 60
        watch.see(minute if goes_on else 0)
        ended += watch.end_overdue()
    assert [task for task, _ in ended] == ([] if goes_on else ["the training"])


def test_files_that_others_write_do_not_make_long_pieces_seem_short(silent_task: list[float]) -> None:
    """Groups of one shape end together; in the next hour nobody writes a file."""
    watch, ended = Pace(), list[Ended]()
    for task in range(4):
        watch.gave(task)
    for minute in range(1, 10 * 60):
        silent_task[0] += 60
        if minute % 60 < 4:  # each has ended, and begins another
            watch.see(minute)
            watch.gave(minute % 60)
        ended += watch.end_overdue()
    assert ended == []


def test_a_start_is_held_against_the_plan_and_is_no_piece(silent_task: list[float]) -> None:
    """To open a large model from a slow disk may take longer than many of its units."""
    watch = Pace(planned_s=600.0)
    for slot in range(6):
        watch.gave(slot, starts=True)
    silent_task[0] += 5 * 3600
    for _ in range(6):
        for slot in range(5):
            watch.gave(slot)
        silent_task[0] += 1
    assert watch.end_overdue() == []
    silent_task[0] += 3600
    late = dict(watch.end_overdue())
    assert "1.0 s is usual" in late[0]
    assert "10 min was planned" in late[5]
