"""A task's turns: what it asks for, and whose priority it goes with."""

from __future__ import annotations

import threading
import time

from emloc_ray.runs.batch.admission import Admission, Amount, Need, Standing
from emloc_ray.runs.batch.turns import Expected, Makers, TaskTurns
from emloc_ray.stages.ray.tasks import Resources

EXPECTED = {"calibrate": Expected(10.0, 5), "factorize": Expected(20.0, 7), "finetune": Expected(30.0, 9)}


def never() -> bool:
    return False


def turns(admission: Admission, makers: Makers, task: str, priority: int = 0) -> TaskTurns:
    return TaskTurns(Standing(task, priority), admission, makers, EXPECTED, never)


def test_a_stage_asks_for_its_workers_with_the_memory_that_is_planned() -> None:
    admission = Admission(lambda: Amount(cpus=3, memory=100))
    task = turns(admission, Makers(admission), "a")
    with task.take("factorize", Resources(8)) as granted:
        assert granted == Resources(3)
        [held] = admission.waiting().held
        assert held.amount == Amount(cpus=3, memory=21)
        assert held.ticket.standing.remaining == 50.0
    with task.take("finetune", Resources(2, 1.0)) as granted:
        assert granted == Resources(2, 1.0)
    with task.take("data", Resources()):  # before all that is planned
        assert admission.waiting().held[0].ticket.standing.remaining == 60.0


def test_a_maker_goes_with_the_priority_of_those_who_wait_for_it() -> None:
    """Low makes what high waits for; middle, which nobody waits for, is not to hold up both."""
    admission = Admission(lambda: Amount(cpus=1, memory=100))
    makers = Makers(admission)
    low, middle, high = (turns(admission, makers, name, n) for n, name in enumerate(("low", "middle", "high")))
    order: list[str] = []

    def stage(task: TaskTurns) -> None:
        with task.take("calibrate", Resources()):
            order.append(task.standing.task)

    def make() -> None:
        with low.makes("key"):
            stage(low)

    with admission.admitted(Standing("first", 9), "s", Need(Amount(cpus=1), 1, 1), never):
        threads = [threading.Thread(target=make), threading.Thread(target=stage, args=(middle,))]
        for thread in threads:
            thread.start()
        while len(admission.waiting().waiting) < 2:
            time.sleep(0.01)
        assert [ticket.standing.task for ticket in admission.waiting().waiting] == ["middle", "low"]
        waiting = high.waits_for("key")
        waiting.__enter__()
        assert [ticket.standing.task for ticket in admission.waiting().waiting] == ["low", "middle"]
    for thread in threads:
        thread.join(20)
    waiting.__exit__(None, None, None)
    assert order == ["low", "middle"]
    # What is made after somebody has begun to wait for it goes with that priority from the start.
    with high.waits_for("other"), low.makes("other"), low.take("calibrate", Resources()):
        assert admission.waiting().held[0].ticket.standing.priority == 2
    with low.take("calibrate", Resources()):
        assert admission.waiting().held[0].ticket.standing.priority == 0
