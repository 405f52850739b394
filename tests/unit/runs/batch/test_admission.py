"""The admission queue's laws by a clock handed in, and its threads."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.runs.batch import admission
from emloc_ray.runs.batch.admission import Admission, AdmissionQueue, Amount, Grant, Need, Standing, Ticket
from emloc_ray.errors import Stopped

ONE_CPU = Need(Amount(cpus=1), 1, 1)


class Clock:
    """Goes when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Queue(AdmissionQueue):
    """With its clock, and asking in one line."""

    def __init__(self, patience: float = 60.0) -> None:
        self.clock = Clock()
        super().__init__(self.clock, patience)

    def put(self, task: str, need: Need = ONE_CPU, **standing: Any) -> Ticket:
        return self.ask(Standing(task, **standing), "finetune", need)

    def order(self) -> list[str]:
        return [ticket.standing.task for ticket in self.waiting()]

    def started(self, cpus: float, gpus: float = 0.0) -> list[str]:
        return tasks(self.admit(Amount(cpus, gpus)))


def tasks(grants: list[Grant]) -> list[str]:
    return [grant.ticket.standing.task for grant in grants]


def cpus(count: float) -> Need:
    """One worker of so many."""
    return Need(Amount(cpus=count), 1, 1)


def test_amounts_add_up_and_fit_but_for_rounding() -> None:
    assert Amount(1, 2, 3) + Amount(1, 0, 1) - Amount(2, 1, 0) == Amount(0, 1, 4)
    assert Amount(1, 0.5, 3) * 2 == Amount(2, 1, 6)
    third = sum([Amount(gpus=0.1)] * 3, Amount())
    assert third.gpus > 0.3
    assert third.fits_in(Amount(gpus=0.3))
    assert not Amount(1, 0, 2**30).fits_in(Amount(1, 0, 2**30 - 1024))
    assert Amount(2, 1, 0).dominant_share(Amount(8, 2, 100)) == 0.5
    assert Amount(0, 1, 0).dominant_share(Amount(8, 0, 100)) == 1.0
    assert Amount().dominant_share(Amount(8, 0, 100)) == 0.0


def test_workers_that_fit() -> None:
    bag = Need(Amount(gpus=0.1, memory=10), workers=8, least=2)
    assert bag.workers_in(Amount(0, 1, 1000)) == 8
    assert bag.workers_in(Amount(0, 0.3, 1000)) == 3
    assert bag.workers_in(Amount(0, 1, 29)) == 2
    assert bag.workers_in(Amount(0, 1, 19)) == 0
    assert Need(Amount(), 3, 3).workers_in(Amount()) == 3
    for least in (0, 3):
        with pytest.raises(ValueError, match="least"):
            Need(Amount(), workers=2, least=least)


def test_priority_is_strict() -> None:
    queue = Queue()
    queue.put("urgent and long", remaining=1000.0, due=1.0)
    queue.put("low", priority=-1, remaining=9999.0)
    queue.put("high", priority=1)
    assert queue.order() == ["high", "urgent and long", "low"]
    assert queue.started(1) == ["high"]


def test_who_would_be_late_goes_first_and_the_earliest_due_before_all() -> None:
    queue = Queue()
    queue.put("long", remaining=500.0)
    queue.put("due at 100", due=100.0, remaining=60.0)
    queue.put("due at 90", due=90.0, remaining=40.0)
    assert queue.order() == ["long", "due at 100", "due at 90"]
    queue.clock.now = 45.0
    assert queue.order() == ["due at 100", "long", "due at 90"]
    queue.clock.now = 50.0
    assert queue.order() == ["due at 90", "due at 100", "long"]
    queue.clock.now = 500.0
    assert queue.order() == ["due at 90", "due at 100", "long"]


def test_longest_first_then_as_asked() -> None:
    queue = Queue()
    for task, remaining in (("a", 1.0), ("b", 5.0), ("c", 1.0), ("d", 9.0)):
        queue.put(task, remaining=remaining)
    assert queue.started(4) == ["d", "b", "a", "c"]


def test_slots_that_are_free_at_once_are_shared_between_owners() -> None:
    queue = Queue()
    for number in range(6):
        queue.put(f"a{number}", owner="a", remaining=100.0)
        queue.put(f"b{number}", owner="b", remaining=1.0)
    assert queue.started(4) == ["a0", "b0", "a1", "b1"]


@pytest.mark.parametrize("slots", [3, 8])
@pytest.mark.parametrize("owners", [("a", "b"), ("a", "b", "c")])
def test_owners_shares_stay_within_a_stage_of_each_other(slots: int, owners: tuple[str, ...]) -> None:
    queue = Queue()
    lengths = itertools.cycle([100.0, 60.0, 35.0, 90.0, 80.0])
    for number in range(120):
        for place, owner in enumerate(owners):  # some ask for much more than others, and for longer
            for more in range(1 + 2 * place):
                queue.put(f"{owner}{number}.{more}", owner=owner, remaining=100.0 * place)
    ends: list[tuple[float, int, Grant]] = []
    while queue.clock.now < 1500.0:
        for grant in queue.admit(Amount(slots)):
            heapq.heappush(ends, (queue.clock.now + next(lengths), grant.ticket.number, grant))
        queue.clock.now, _, ended = heapq.heappop(ends)
        queue.release(ended)
        used = queue.used().values()
        assert max(used) - min(used) <= 100.0
    assert sum(queue.used().values()) == pytest.approx(queue.clock.now)


def test_running_stages_count_by_their_dominant_share() -> None:
    queue = Queue()
    queue.put("a", Need(Amount(cpus=1, gpus=1), 1, 1), owner="a")
    queue.put("b", cpus(3), owner="b")
    assert queue.started(8, 2) == ["a", "b"]
    queue.clock.now = 8.0
    assert queue.used() == {"a": 4.0, "b": 3.0}
    queue.put("a again", owner="a")
    queue.put("b again", owner="b")
    assert queue.order() == ["b again", "a again"]


def test_a_new_owner_starts_at_the_least_used() -> None:
    queue = Queue()
    for owner, size in (("a", 1), ("b", 3)):
        queue.put(owner, cpus(size), owner=owner)
    assert queue.started(4) == ["a", "b"]
    queue.clock.now = 100.0
    queue.put("new", owner="c")
    assert queue.used() == {"a": 25.0, "b": 75.0, "c": 25.0}


def test_a_short_absence_keeps_what_an_owner_is_behind_a_long_one_does_not() -> None:
    queue = Queue(patience=10.0)
    queue.put("a", owner="a")
    queue.put("b", cpus(3), owner="b")
    of_a, of_b = queue.admit(Amount(4))
    queue.clock.now = 100.0
    queue.release(of_a)
    queue.clock.now = 105.0
    ticket = queue.put("a again", owner="a")
    assert queue.used()["a"] == 25.0
    queue.withdraw(ticket)
    queue.clock.now = 120.0
    queue.put("a late", owner="a")
    assert queue.used() == {"a": 90.0, "b": 90.0}
    queue.release(of_b)


def test_an_owner_who_comes_after_all_have_gone_starts_where_they_stopped() -> None:
    queue = Queue()
    queue.put("a", owner="a")
    (grant,) = queue.admit(Amount(1))
    queue.clock.now = 1000.0
    queue.release(grant)
    queue.put("b", owner="b")
    assert queue.used() == {"a": 1000.0, "b": 1000.0}


def test_what_does_not_fit_is_passed_over_for_patience_seconds() -> None:
    queue = Queue(patience=60.0)
    queue.put("holds", cpus(2))
    (held,) = queue.admit(Amount(4))
    queue.put("wide", cpus(4), remaining=10.0)
    queue.clock.now = 100.0
    queue.put("narrow 1")
    assert queue.started(4) == ["narrow 1"]  # waiting alone is not being passed over
    queue.clock.now = 160.0
    queue.put("narrow 2")
    assert queue.started(4) == ["narrow 2"]
    queue.clock.now = 161.0
    queue.release(held)
    queue.put("narrow 3")
    assert queue.started(4) == []
    for grant in queue.held():
        queue.release(grant)
    assert queue.started(4) == ["wide"]


def test_a_wide_stage_does_not_starve_whatever_owners_use() -> None:
    """Narrow stages of three owners keep coming, its owner's among them and longer than it."""
    queue = Queue(patience=60.0)
    ends: list[tuple[float, int, Grant]] = []
    wide: list[float] = []
    for step in range(400):
        queue.clock.now = 5.0 * step
        while ends and ends[0][0] <= queue.clock.now:
            queue.release(heapq.heappop(ends)[-1])
        queue.put(f"narrow {step}", owner="abc"[step % 3], remaining=1.0)
        if step == 10:
            queue.put("wide", cpus(8), owner="a", remaining=2.0)
        for grant in queue.admit(Amount(8)):
            heapq.heappush(ends, (queue.clock.now + 43.0, grant.ticket.number, grant))
            if grant.ticket.standing.task == "wide":
                wide.append(grant.since - grant.ticket.since)
    assert len(wide) == 1
    assert wide[0] <= 60.0 + 2 * 43.0 + 5.0


def test_higher_priority_still_goes_before_what_has_waited_long() -> None:
    queue = Queue(patience=10.0)
    queue.put("holds", cpus(2))
    queue.admit(Amount(4))
    queue.put("wide", cpus(4), remaining=9.0)
    queue.put("narrow")
    assert queue.started(4) == ["narrow"]
    queue.clock.now = 11.0
    queue.put("other")
    queue.put("high", priority=1)
    assert queue.order() == ["high", "wide", "other"]
    assert queue.started(4) == ["high"]


def test_what_has_waited_long_makes_way_when_withdrawn() -> None:
    queue = Queue(patience=10.0)
    queue.put("holds", cpus(2))
    queue.admit(Amount(4))
    wide = queue.put("wide", cpus(4), remaining=9.0)
    queue.put("narrow")
    queue.admit(Amount(4))
    queue.clock.now = 11.0
    queue.put("other")
    assert queue.started(4) == []
    queue.withdraw(wide)
    queue.withdraw(wide)
    assert queue.started(4) == ["other"]


def test_svds_fill_the_cores_that_training_leaves_free() -> None:
    queue = Queue()
    training = Need(Amount(cpus=2, gpus=4, memory=100), workers=1, least=1)
    queue.put("training", training, remaining=9.0)
    queue.put("second training", training, remaining=8.0)
    queue.put("all svds at once", Need(Amount(cpus=1, memory=10), workers=32, least=32), remaining=7.0)
    queue.put("svds in a bag", Need(Amount(cpus=1, memory=10), workers=32, least=1), remaining=6.0)
    first, second = queue.admit(Amount(16, 4, 1000))
    assert tasks([first, second]) == ["training", "svds in a bag"]
    assert (first.workers, second.workers) == (1, 14)
    assert second.amount == Amount(14, 0, 140)


def test_a_bag_waits_for_its_least() -> None:
    queue = Queue()
    queue.put("holds", cpus(6))
    (held,) = queue.admit(Amount(8))
    queue.put("bag", Need(Amount(cpus=1), workers=5, least=3))
    assert queue.started(8) == []
    queue.release(held)
    queue.release(held)
    assert [grant.workers for grant in queue.admit(Amount(8))] == [5]


def test_what_never_fits_runs_alone_with_its_least() -> None:
    queue = Queue()
    queue.put("small")
    (small,) = queue.admit(Amount(4, 0))
    queue.put("oversize", Need(Amount(cpus=1, gpus=1), workers=3, least=2), remaining=9.0)
    assert queue.started(4) == []
    queue.release(small)
    queue.put("other")
    (alone,) = queue.admit(Amount(4, 0))
    assert (alone.ticket.standing.task, alone.workers, alone.share) == ("oversize", 2, 1.0)
    assert queue.started(4) == []
    assert queue.started(4, 2) == ["other"]  # the cluster has grown to hold it
    queue.release(alone)


def test_capacity_may_shrink_and_grow() -> None:
    queue = Queue()
    for task in "abcdef":
        queue.put(task)
    grants = queue.admit(Amount(3))
    assert tasks(grants) == ["a", "b", "c"]
    assert queue.started(2) == []
    queue.release(grants[0])
    assert queue.started(2) == []
    queue.release(grants[1])
    assert queue.started(2) == ["d"]
    assert queue.started(0) == []
    assert queue.started(4) == ["e", "f"]


needs = st.builds(
    lambda cpus, gpus, least, more: Need(Amount(cpus, gpus), least + more, least),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 9.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(1, 3),
    st.integers(0, 3),
)
standings = st.builds(
    Standing,
    task=st.just("task"),
    priority=st.integers(0, 1),
    owner=st.sampled_from("abc"),
    due=st.none() | st.integers(0, 200).map(float),
    remaining=st.integers(0, 50).map(float),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), standings, needs),
        st.tuples(st.just("admit"), st.sampled_from([8.0, 4.0, 0.3]), st.sampled_from([0.3, 2.0])),
        st.tuples(st.sampled_from(["release", "withdraw", "later"]), st.integers(0, 40), st.none()),
    ),
    max_size=60,
)


def play(moves: list[tuple[Any, Any, Any]], patience: float) -> list[tuple[int, int]]:
    """Checks every step; gives number and workers of all that was granted, in order."""
    queue = Queue(patience)
    asked: set[int] = set()
    log: list[tuple[int, int]] = []

    def admit(capacity: Amount) -> None:
        fitted = sum((grant.amount for grant in queue.held()), Amount()).fits_in(capacity)
        grants = queue.admit(capacity)
        log.extend((grant.ticket.number, grant.workers) for grant in grants)
        for grant in grants:
            assert grant.ticket.need.least <= grant.workers <= grant.ticket.need.workers
        held = sum((grant.amount for grant in queue.held()), Amount())
        assert held.fits_in(capacity) or len(queue.held()) == 1 or not grants
        assert fitted or not grants
        assert queue.held() or not queue.waiting()
        if patience == math.inf and held.fits_in(capacity):
            assert not [ticket for ticket in queue.waiting() if ticket.need.workers_in(capacity - held)]

    for move, first, second in moves:
        if move == "ask":
            asked.add(queue.ask(first, "stage", second).number)
        elif move == "admit":
            admit(Amount(first, second))
        elif move == "later":
            queue.clock.now += first
        elif move == "release" and queue.held():
            queue.release(queue.held()[first % len(queue.held())])
        elif move == "withdraw" and queue.waiting():
            ticket = queue.waiting()[first % len(queue.waiting())]
            queue.withdraw(ticket)
            asked.remove(ticket.number)
    for _ in range(len(asked) + 1):
        admit(Amount(4, 1))
        for grant in queue.held():
            queue.release(grant)
    assert sorted(number for number, _ in log) == sorted(asked)
    return log


@given(steps, st.sampled_from([0.0, 10.0, math.inf]))
def test_no_more_is_held_than_there_is_and_all_comes_to_its_turn(
    moves: list[tuple[Any, Any, Any]], patience: float
) -> None:
    assert play(moves, patience) == play(moves, patience)


# Threads


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(200) as executor:
        yield executor


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ones."""
    monkeypatch.setattr(admission, "_TICK_S", 0.01)


def never() -> bool:
    return False


def until(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.005)
    raise AssertionError("It did not come about within ten seconds.")


def holder(queue: Admission, pool: ThreadPoolExecutor, need: Need = ONE_CPU) -> tuple[threading.Event, Future[None]]:
    """A task that has started, and the event that ends it."""
    over, started = threading.Event(), threading.Event()

    def hold() -> None:
        with queue.admitted(Standing("holder"), "finetune", need, never):
            started.set()
            assert over.wait(10)

    future = pool.submit(hold)
    assert started.wait(10)
    return over, future


def test_two_hundred_threads_go_through_four_slots(pool: ThreadPoolExecutor) -> None:
    queue = Admission(lambda: Amount(cpus=4))
    inside, most, lock = 0, 0, threading.Lock()

    def task(number: int) -> int:
        nonlocal inside, most
        for stage in ("calibrate", "finetune"):
            with queue.admitted(Standing(str(number), owner=str(number % 3)), stage, ONE_CPU, never) as workers:
                with lock:
                    inside += 1
                    most = max(most, inside)
                assert workers == 1
                with lock:
                    inside -= 1
        return number

    assert sorted(pool.map(task, range(200))) == list(range(200))
    assert 1 <= most <= 4
    assert (queue.waiting().waiting, queue.waiting().held) == ((), ())


def test_a_bag_learns_its_number_of_workers() -> None:
    queue = Admission(lambda: Amount(cpus=4))
    bag = Need(Amount(cpus=1), workers=9, least=1)
    with queue.admitted(Standing("task"), "factorize", bag, never) as workers:
        assert workers == 4


def test_who_waits_and_what_is_held_can_be_shown(pool: ThreadPoolExecutor) -> None:
    clock = Clock()
    queue = Admission(lambda: Amount(cpus=1), clock)
    assert queue.waiting().capacity is None
    over, held = holder(queue, pool)
    clock.now = 5.0
    waiting = pool.submit(lambda: list(queue_once(queue, "waits")))
    until(lambda: len(queue.waiting().waiting) == 1)
    shown = queue.waiting()
    assert [(t.standing.task, t.stage, t.since) for t in shown.waiting] == [("waits", "merge", 5.0)]
    assert [(g.ticket.standing.task, g.since) for g in shown.held] == [("holder", 0.0)]
    assert shown.capacity == Amount(cpus=1)
    over.set()
    held.result(10)
    assert waiting.result(10) == [1]


def queue_once(queue: Admission, task: str, stopped: Callable[[], bool] = never, priority: int = 0) -> Iterator[int]:
    with queue.admitted(Standing(task, priority), "merge", ONE_CPU, stopped) as workers:
        yield workers


@pytest.mark.parametrize("woken", [True, False])
def test_who_is_stopped_while_waiting_leaves_the_queue(woken: bool, pool: ThreadPoolExecutor) -> None:
    queue = Admission(lambda: Amount(cpus=1))
    over, held = holder(queue, pool)
    stop = threading.Event()
    waiting = pool.submit(lambda: list(queue_once(queue, "fr-law", stop.is_set)))
    until(lambda: len(queue.waiting().waiting) == 1)
    stop.set()
    if woken:
        queue.wake()
    with pytest.raises(Stopped, match=r"fr-law .* stage merge"):
        waiting.result(10)
    assert queue.waiting().waiting == ()
    over.set()
    held.result(10)


def test_who_was_stopped_before_asking_does_not_start() -> None:
    queue = Admission(lambda: Amount(cpus=1))
    with pytest.raises(Stopped):
        list(queue_once(queue, "late", lambda: True))
    assert list(queue_once(queue, "next")) == [1]


def test_an_error_inside_releases() -> None:
    queue = Admission(lambda: Amount(cpus=1))
    with pytest.raises(ZeroDivisionError), queue.admitted(Standing("task"), "merge", ONE_CPU, never):
        raise ZeroDivisionError
    assert queue.waiting().held == ()
    assert list(queue_once(queue, "next")) == [1]


def test_growth_is_noticed_without_a_release(pool: ThreadPoolExecutor, ticks: None) -> None:
    size = [1.0]
    queue = Admission(lambda: Amount(cpus=size[0]), refresh_s=0.02)
    over, held = holder(queue, pool)
    waiting = pool.submit(lambda: list(queue_once(queue, "waits")))
    until(lambda: len(queue.waiting().waiting) == 1)
    size[0] = 2.0
    assert waiting.result(10) == [1]
    over.set()
    held.result(10)


def test_capacity_is_asked_for_once_a_refresh(pool: ThreadPoolExecutor, ticks: None) -> None:
    clock, calls = Clock(), []

    def capacity() -> Amount:
        calls.append(clock())
        return Amount(cpus=4)

    queue = Admission(capacity, clock, refresh_s=10.0)
    for time in (0.0, 9.0, 10.0, 10.5, 30.0):
        clock.now = time
        assert list(pool.map(lambda n: list(queue_once(queue, str(n))), range(20))) == [[1]] * 20
    assert calls == [0.0, 10.0, 30.0]


def test_a_slow_capacity_keeps_nobody_from_releasing_and_starting(pool: ThreadPoolExecutor) -> None:
    clock, slow, asked = Clock(), threading.Event(), threading.Event()

    def capacity() -> Amount:
        if clock.now:
            asked.set()
            assert slow.wait(10)
        return Amount(cpus=1)

    queue = Admission(capacity, clock)
    over, held = holder(queue, pool)
    clock.now = 100.0
    asking = pool.submit(lambda: list(queue_once(queue, "asking")))
    assert asked.wait(10)
    meanwhile = pool.submit(lambda: list(queue_once(queue, "meanwhile", priority=1)))
    until(lambda: len(queue.waiting().waiting) == 2)
    over.set()
    held.result(10)
    assert meanwhile.result(10) == [1]
    slow.set()
    assert asking.result(10) == [1]


def test_a_capacity_that_fails_is_told_and_asked_for_again() -> None:
    clock, errors = Clock(), [ConnectionError("no cluster")]

    def capacity() -> Amount:
        if errors:
            raise errors.pop()
        return Amount(cpus=1)

    queue = Admission(capacity, clock)
    with pytest.raises(ConnectionError):
        list(queue_once(queue, "first"))
    assert queue.waiting().waiting == ()
    clock.now = 2.0
    assert list(queue_once(queue, "second")) == [1]


def test_what_is_lifted_goes_before_others_from_then_on() -> None:
    queue = AdmissionQueue(lambda: 0.0)
    need = Need(Amount(cpus=1), 1, 1)
    held = queue.ask(Standing("running"), "s", need)
    assert [grant.ticket for grant in queue.admit(Amount(cpus=1))] == [held]
    for name, priority in (("low", 0), ("middle", 1)):
        queue.ask(Standing(name, priority), "s", need)
    assert [ticket.standing.task for ticket in queue.waiting()] == ["middle", "low"]
    queue.lift("low", 9)
    assert [(ticket.standing.task, ticket.standing.priority) for ticket in queue.waiting()] == [
        ("low", 9),
        ("middle", 1),
    ]
    queue.lift("low", 3)  # never down
    assert queue.waiting()[0].standing.priority == 9
