"""Which stages start: by order, by what fits, with room for the first that waits; and threads that wait for it."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.errors import Stopped
from emloc_ray.runs.batch.admission import Admission, AdmissionQueue, Amount, Need, Ticket
from emloc_ray.runs.batch.work import TaskPlan, TaskTurns
from emloc_ray.stages.ray.tasks import Resources

ONE_CPU = Need(Amount(cpus=1), 1, 1)


def cpus(count: float) -> Need:
    """One worker of so many."""
    return Need(Amount(cpus=count), 1, 1)


def admission(capacity: Amount) -> Admission:
    made = Admission()
    made.update(capacity)
    return made


def bag(least: int, workers: int) -> Need:
    return Need(Amount(cpus=1, memory=10), workers, least)


class Queue(AdmissionQueue):
    """Asks in one line; tasks are in the order of asking unless told otherwise."""

    def put(self, task: str, need: Need = ONE_CPU, order: int | None = None) -> Ticket:
        ticket = Ticket(task, "finetune", len(self.waiting) + len(self.running) if order is None else order, need)
        self.ask(ticket)
        return ticket

    def started(self, cpus: float, gpus: float = 0.0, memory: float = 0.0) -> dict[str, int]:
        return {ticket.task: workers for ticket, workers in self.admit(Amount(cpus, gpus, memory)).items()}


def test_amounts_add_up_and_fit_but_for_rounding() -> None:
    assert Amount(1, 2, 3) + Amount(1, 0, 1) - Amount(2, 1, 0) == Amount(0, 1, 4)
    assert Amount(1, 0.5, 3) * 2 == Amount(2, 1, 6)
    assert Amount(1, 5, 3).smaller(Amount(2, 1, 3)) == Amount(1, 1, 3)
    third = sum([Amount(gpus=0.1)] * 3, Amount())
    assert third.gpus > 0.3
    assert third.fits_in(Amount(gpus=0.3))
    assert not Amount(1, 0, 2**30).fits_in(Amount(1, 0, 2**30 - 1024))


def test_workers_that_fit() -> None:
    need = Need(Amount(gpus=0.1, memory=10), workers=8, least=2)
    assert need.workers_in(Amount(0, 1, 1000)) == 8
    assert need.workers_in(Amount(0, 0.3, 1000)) == 3
    assert need.workers_in(Amount(0, 1, 29)) == 2
    assert need.workers_in(Amount(0, 1, 19)) == 0
    assert Need(Amount(), 3, 3).workers_in(Amount()) == 3


def test_stages_start_in_order() -> None:
    queue = Queue()
    for task, order in (("c", 2), ("a", 0), ("b", 1)):
        queue.put(task, order=order)
    assert list(queue.started(2)) == ["a", "b"]
    assert [ticket.task for ticket in queue.waiting] == ["c"]


def test_later_stages_fill_what_the_first_that_waits_leaves_free() -> None:
    queue = Queue()
    training = Need(Amount(cpus=2, gpus=4), 1, 1)
    first = queue.put("training", training)
    queue.put("second training", training)
    queue.put("in step", bag(32, 32))
    queue.put("bag", bag(1, 32))
    assert queue.started(16, 4, 1000) == {
        "training": 1,
        "bag": 14,
    }  # the other two CPUs come with the first training's end
    queue.leave(first)
    assert queue.started(16, 4, 1000) == {"second training": 1}


def test_the_first_that_waits_keeps_its_room() -> None:
    queue = Queue()
    holds = queue.put("holds", cpus(3))
    assert queue.started(4) == {"holds": 1}
    wide = queue.put("wide", cpus(3))
    narrow = queue.put("narrow")
    queue.put("other")
    assert queue.started(4) == {"narrow": 1}
    queue.leave(narrow)
    assert queue.started(4) == {"other": 1}  # one CPU in all goes past it
    queue.put("third")
    queue.leave(holds)
    assert queue.started(4) == {"wide": 1}
    queue.leave(wide)
    assert queue.started(4) == {"third": 1}


def test_who_leaves_gives_its_room_back() -> None:
    queue = Queue()
    queue.put("holds", cpus(2))
    queue.started(4)
    wide = queue.put("wide", cpus(4))
    queue.put("narrow")
    assert queue.started(4) == {}
    queue.leave(wide)
    queue.leave(wide)
    assert queue.started(4) == {"narrow": 1}


def test_a_wide_stage_does_not_starve() -> None:
    """Narrow stages keep coming behind it."""
    queue = Queue()
    ends: list[tuple[float, int, Ticket]] = []
    waited = None
    for step in range(400):
        now = 5.0 * step
        while ends and ends[0][0] <= now:
            queue.leave(heapq.heappop(ends)[-1])
        queue.put(f"narrow {step}", order=step)
        if step == 10:
            queue.put("wide", cpus(8), order=step)
        for ticket in queue.admit(Amount(8)):
            heapq.heappush(ends, (now + 43.0, ticket.order, ticket))
            if ticket.task == "wide":
                waited = now - 50.0
    assert waited is not None
    assert waited <= 2 * 43.0 + 5.0


def test_a_bag_waits_for_its_least() -> None:
    queue = Queue()
    held = queue.put("holds", cpus(6))
    queue.started(8, memory=100)
    queue.put("bag", bag(3, 5))
    assert queue.started(8, memory=100) == {}
    queue.leave(held)
    assert queue.started(8, memory=100) == {"bag": 5}


def test_what_exceeds_the_cluster_runs_alone_and_keeps_nobody_waiting() -> None:
    queue = Queue()
    small = queue.put("small")
    queue.started(4)
    alone = queue.put("oversize", Need(Amount(cpus=1, gpus=1), workers=3, least=2))
    other = queue.put("other")
    assert queue.started(4) == {"other": 1}
    queue.leave(small)
    assert queue.started(4) == {}
    queue.leave(other)
    queue.put("next")
    assert queue.started(4) == {"oversize": 2}
    assert queue.started(4) == {}
    assert queue.started(4, 2) == {"next": 1}  # the cluster has grown to hold it
    queue.leave(alone)


def test_capacity_may_shrink_and_grow() -> None:
    queue = Queue()
    tickets = [queue.put(task, order=order) for order, task in enumerate("abcdef")]
    assert list(queue.started(3)) == ["a", "b", "c"]
    for ticket in tickets[:2]:
        assert queue.started(2) == {}
        queue.leave(ticket)
    assert list(queue.started(2)) == ["d"]
    assert queue.started(0) == {}
    assert list(queue.started(4)) == ["e", "f"]


needs = st.builds(
    lambda cpus, gpus, least, more: Need(Amount(cpus, gpus), least + more, least),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 9.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(1, 3),
    st.integers(0, 3),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 9), needs),
        st.tuples(st.just("admit"), st.sampled_from([8.0, 4.0, 0.3]), st.sampled_from([0.3, 2.0])),
        st.tuples(st.sampled_from(["end", "withdraw"]), st.integers(0, 40), st.none()),
    ),
    max_size=60,
)


@given(steps)
def test_no_more_runs_than_fits_and_every_stage_starts(moves: list[tuple[Any, Any, Any]]) -> None:
    queue = Queue()
    asked: set[Ticket] = set()
    started: set[Ticket] = set()

    def amount() -> Amount:
        return sum((ticket.need.per_worker * n for ticket, n in queue.running.items()), Amount())

    def admit(capacity: Amount) -> None:
        fitted = amount().fits_in(capacity)
        begun = queue.admit(capacity)
        assert not started & begun.keys()
        started.update(begun)
        assert all(ticket.need.least <= n <= ticket.need.workers for ticket, n in begun.items())
        assert amount().fits_in(capacity) or len(queue.running) == 1 or not begun
        assert fitted or not begun
        assert queue.running or not queue.waiting

    for move, first, second in moves:
        if move == "ask":
            asked.add(queue.put("task", second, order=first))
        elif move == "admit":
            admit(Amount(first, second))
        elif move == "end" and queue.running:
            queue.leave(list(queue.running)[first % len(queue.running)])
        elif move == "withdraw" and queue.waiting:
            ticket = queue.waiting[first % len(queue.waiting)]
            queue.leave(ticket)
            asked.remove(ticket)
    for _ in range(len(asked) + 1):
        admit(Amount(4, 1))
        for ticket in list(queue.running):
            queue.leave(ticket)
    assert started == asked


# Threads


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(128) as executor:
        yield executor


def never() -> bool:
    return False


def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.005)
    raise AssertionError("It did not come about within ten seconds.")


def pass_through(queue: Admission, task: str, stopped: Callable[[], bool] = never, need: Need = ONE_CPU) -> int:
    with queue.admitted(Ticket(task, "merge", 0, need), stopped) as workers:
        return workers


def holder(queue: Admission, pool: ThreadPoolExecutor) -> tuple[threading.Event, Future[None]]:
    """A task that has started, and the event that ends it."""
    over, started = threading.Event(), threading.Event()

    def hold() -> None:
        with queue.admitted(Ticket("holder", "finetune", 0, ONE_CPU), never):
            started.set()
            assert over.wait(10)

    future = pool.submit(hold)
    assert started.wait(10)
    return over, future


def test_many_threads_go_through_four_slots(pool: ThreadPoolExecutor) -> None:
    queue = admission(Amount(cpus=4))
    inside, most, lock = 0, 0, threading.Lock()

    def task(number: int) -> None:
        nonlocal inside, most
        for stage in ("calibrate", "finetune"):
            with queue.admitted(Ticket(str(number), stage, number, ONE_CPU), never) as workers:
                assert workers == 1
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    list(pool.map(task, range(128)))
    assert 1 <= most <= 4
    assert (queue.queue.waiting, queue.queue.running) == ([], {})


def test_who_is_stopped_while_waiting_leaves_the_queue(pool: ThreadPoolExecutor) -> None:
    queue = admission(Amount(cpus=1))
    over, held = holder(queue, pool)
    stop = threading.Event()
    waiting = pool.submit(pass_through, queue, "fr-law", stop.is_set)
    until(lambda: len(queue.queue.waiting) == 1)
    stop.set()
    with pytest.raises(Stopped, match=r"fr-law .* stage merge"):
        waiting.result(10)
    assert queue.queue.waiting == []
    over.set()
    held.result(10)


def test_who_was_stopped_before_asking_does_not_start() -> None:
    queue = admission(Amount(cpus=1))
    with pytest.raises(Stopped):
        pass_through(queue, "stopped", lambda: True)
    assert pass_through(queue, "next") == 1


def test_an_error_inside_releases() -> None:
    queue = admission(Amount(cpus=1))
    with pytest.raises(ZeroDivisionError), queue.admitted(Ticket("task", "merge", 0, ONE_CPU), never):
        raise ZeroDivisionError
    assert pass_through(queue, "next") == 1


def test_a_release_and_growth_start_who_waits(pool: ThreadPoolExecutor) -> None:
    queue = Admission()
    waiting = pool.submit(pass_through, queue, "before the capacity is known")
    until(lambda: len(queue.queue.waiting) == 1)
    queue.update(Amount(cpus=1))
    assert waiting.result(10) == 1
    over, held = holder(queue, pool)
    waiting = pool.submit(pass_through, queue, "waits for growth")
    until(lambda: len(queue.queue.waiting) == 1)
    queue.update(Amount(cpus=2))
    assert waiting.result(10) == 1
    queue.update(Amount(cpus=1))
    waiting = pool.submit(pass_through, queue, "waits for a release")
    until(lambda: len(queue.queue.waiting) == 1)
    over.set()
    held.result(10)
    assert waiting.result(10) == 1


def test_a_stage_asks_for_its_workers_with_the_memory_that_is_planned() -> None:
    queue = admission(Amount(cpus=3, memory=100))
    waited: list[str] = []
    turns = TaskTurns("a", 5, queue, TaskPlan(60.0, {"factorize": 7, "finetune": 9}), never, waited.append)
    with turns.take("factorize", Resources(8), 1) as granted:
        assert granted == Resources(3)
        [(ticket, workers)] = queue.queue.running.items()
        assert ticket.need.per_worker * workers == Amount(cpus=3, memory=21)
        assert (ticket.task, ticket.order) == ("a", 5)
    with turns.take("finetune", Resources(2, 1.0), 2) as granted:
        assert granted == Resources(2, 1.0)
    assert waited == ["factorize", "finetune"]
