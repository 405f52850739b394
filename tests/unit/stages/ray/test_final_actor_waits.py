"""A final actor that does not answer is waited for a while, then ended, without a Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from emloc_ray.errors import StageError, Stopped
from emloc_ray.stages.ray import final_actor
from emloc_ray.stages.ray.final_actor import FinalActorHandle, Report
from emloc_ray.stages.ray.losses import MAX_RESTARTS, Losses
from emloc_ray.stages.ray.tasks import Resources


class SilentRay:
    """The step's answer comes last; of the reports the first one after ``silent`` looks."""

    exceptions = final_actor.ray.exceptions

    def __init__(self, silent: int) -> None:
        self.silent, self.now, self.killed, self.asked = silent, 0.0, 0, 0

    def remote(self, *arguments: Any) -> str:
        return "answer"

    def ask(self) -> str:
        self.asked += 1
        return "report"

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        self.now += timeout
        if references == ["report"]:
            self.silent -= 1
        ready = (references == ["report"] and self.silent < 0) or (references == ["answer"] and self.asked > 1)
        return (references if ready else [], [])

    def get(self, reference: str) -> Any:
        return {"done": True} if reference == "answer" else Report(3, 4, ("a note",), ())

    def kill(self, actor: Any, no_restart: bool) -> None:
        assert not no_restart
        self.killed += 1


@pytest.mark.parametrize(("silent", "killed"), [(0, 0), (5, 0), (40, 1)])
def test_a_silent_actor_is_ended_in_the_end(monkeypatch: pytest.MonkeyPatch, silent: int, killed: int) -> None:
    fake = SilentRay(silent)
    monkeypatch.setattr(final_actor, "ray", fake)
    monkeypatch.setattr(final_actor.time, "monotonic", lambda: fake.now)
    actor = SimpleNamespace(work=fake, report=SimpleNamespace(remote=fake.ask))
    monkeypatch.setattr(
        final_actor, "actor_kind", lambda: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: actor))
    )
    told: list[str] = []
    seen: list[tuple[int, int]] = []
    handle = FinalActorHandle("run")
    result = handle.work(
        "merge", lambda *_: {}, None, Resources(), lambda done, total: seen.append((done, total)), told.append
    )
    assert result == {"done": True}
    assert fake.killed == killed
    assert fake.asked == 3  # no report is asked for while one is waited for: what it told would be lost
    assert seen[-1] == (3, 4)
    assert told.count("a note") == 3
    assert sum("has not answered for 15 min: it is restarted" in text for text in told) == killed


def test_a_run_that_waits_for_it_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SilentRay(10**6)
    monkeypatch.setattr(final_actor, "ray", fake)
    actor = SimpleNamespace(work=fake, report=SimpleNamespace(remote=fake.ask))
    monkeypatch.setattr(
        final_actor, "actor_kind", lambda: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: actor))
    )

    def stop(done: int, total: int) -> None:
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        FinalActorHandle("run").work("merge", lambda *_: {}, None, Resources(), stop, lambda text: None)


@pytest.mark.parametrize("comes_on", [True, False])
def test_an_actor_that_is_lost_often_is_given_up_where_it_comes_no_further(
    comes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter(range(2 * MAX_RESTARTS))

    def get(reference: str) -> Any:
        if reference == "report":
            return Report(fake.asked if comes_on else 1, 99, (), ())
        if next(tries, None) is None:
            return {"done": True}
        raise ActorDiedError

    fake = SilentRay(0)
    fake.get = get  # type: ignore[method-assign]
    fake.wait = lambda references, timeout: (references, [])  # type: ignore[method-assign]
    monkeypatch.setattr(final_actor, "ray", fake)
    monkeypatch.setattr(Losses, "delays", (0.0,))
    actor = SimpleNamespace(work=fake, report=SimpleNamespace(remote=fake.ask))
    monkeypatch.setattr(
        final_actor, "actor_kind", lambda: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: actor))
    )
    handle = FinalActorHandle("run")

    def work() -> Any:
        return handle.work("merge", lambda *_: {}, None, Resources(), lambda done, total: None, lambda text: None)

    if comes_on:
        assert work() == {"done": True}
    else:
        with pytest.raises(StageError, match=f"^merge: the final actor lost its worker {MAX_RESTARTS + 1} times"):
            work()
