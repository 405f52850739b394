"""A shared stage's turn goes first to the task that has begun it, for which no other waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from emloc_ray.errors import Stopped
from emloc_ray.runs.batch.begun import Begun

TRIES = {"h": {"calibrate": ("key", 9.0), "heal": ("key", 1.0)}, "short": {"calibrate": ("key", 3.0)}}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def running() -> set[str]:
    return {"h", "short", "w"}


@pytest.fixture
def begun(running: set[str]) -> Begun:
    return Begun(TRIES, running.__contains__)


def pass_through(begun: Begun, task: str, stage: str = "calibrate", key: str = "key", seconds: float = 60.0) -> str:
    """Has its turn; is stopped after so many seconds."""
    end = time.monotonic() + seconds
    with begun.turn(task, stage, key, lambda: time.monotonic() > end):
        return task


def is_free(begun: Begun, task: str, stage: str = "calibrate", key: str = "key") -> bool:
    """Whether the task has its turn at once."""
    try:
        return bool(pass_through(begun, task, stage, key, seconds=0.0))
    except Stopped:
        return False


def waiting(pool: ThreadPoolExecutor, begun: Begun, task: str) -> Future[str]:
    future = pool.submit(pass_through, begun, task)
    assert not threading.Event().wait(0.3)
    assert not future.done()
    return future


def test_the_task_that_took_longest_goes_first_then_all_do(begun: Begun, pool: ThreadPoolExecutor) -> None:
    assert begun.tasks == {"h"}
    waiters = [waiting(pool, begun, task) for task in ("w", "short")]
    assert is_free(begun, "w", key="of other inputs")
    with begun.turn("h", "calibrate", "key", lambda: True):
        assert not is_free(begun, "w")
    assert [waiter.result(10) for waiter in waiters] == ["w", "short"]
    assert not is_free(begun, "w", "heal")  # with which it goes first as well


@pytest.mark.parametrize(
    "let_go",
    [
        lambda begun, running: running.discard("h"),  # it ended, failed or was cancelled
        lambda begun, running: begun.pass_on("h", "calibrate"),  # its stage takes resources
        lambda begun, running: begun.pass_on("h", "merge"),  # it has left the stage out
        lambda begun, running: pass_through(begun, "h", "factorize"),
        lambda begun, running: pass_through(begun, "h", "calibrate", "of other inputs now"),
    ],
)
def test_nobody_waits_for_a_task_that_will_not_come(
    let_go: Callable[[Begun, set[str]], object], begun: Begun, running: set[str], pool: ThreadPoolExecutor
) -> None:
    waiter = waiting(pool, begun, "w")
    let_go(begun, running)
    assert waiter.result(10) == "w"


def test_nobody_waits_for_a_task_that_does_not_run(begun: Begun, running: set[str]) -> None:
    running.remove("h")
    assert is_free(begun, "w")


def test_two_that_changed_places_do_not_wait_for_each_other(running: set[str], pool: ThreadPoolExecutor) -> None:
    begun = Begun({"h": {"calibrate": ("a", 1.0)}, "w": {"calibrate": ("b", 1.0)}}, running.__contains__)
    both = [pool.submit(pass_through, begun, task, "calibrate", key) for task, key in (("h", "b"), ("w", "a"))]
    assert [future.result(10) for future in both] == ["h", "w"]


def test_who_waits_can_be_stopped(begun: Begun) -> None:
    with pytest.raises(Stopped, match="Task w was stopped while h goes first with calibrate"):
        pass_through(begun, "w", seconds=0.0)
