"""Of two drivers one holds the run; who died is recognised by the store's own clock; who was cut off notices."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import uri

from emloc_ray.errors import ConfigError, StageError
from emloc_ray.io import lease
from emloc_ray.io.lease import Lease, find_holder
from emloc_ray.io.object_store import ObjectStore
from emloc_ray.io.run_directory import RunDirectory


@pytest.fixture
def place(s3_port: int, node_cache: Path, request: pytest.FixtureRequest) -> str:
    return uri(s3_port, f"lease/{request.node.name}")


@pytest.fixture
def store(place: str) -> ObjectStore:
    return ObjectStore(place)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals in a tenth of a second; a second without one is death (the store counts in seconds)."""
    monkeypatch.setattr(lease, "_RENEW_S", 0.1)
    monkeypatch.setattr(lease, "_STALE_S", 1.0)


def test_the_second_is_told_who_holds_it(place: str) -> None:
    first, second = RunDirectory(place), RunDirectory(place)
    first.lock()
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on "):
        second.lock()
    assert (second.holder() or "").startswith("process ")
    first.unlock()
    assert second.holder() is None
    second.lock()
    second.unlock()


def test_of_many_at_once_one_takes_it(store: ObjectStore) -> None:
    leases = [Lease(store, str(number)) for number in range(8)]
    barrier = threading.Barrier(len(leases))

    def take(one: Lease) -> bool:
        barrier.wait()
        return one.take() is None

    with ThreadPoolExecutor(len(leases)) as pool:
        taken = list(pool.map(take, leases))
    assert taken.count(True) == 1
    for one in leases:
        one.give_back()
    assert find_holder(store) is None


def test_a_dead_holder_is_followed_a_living_one_is_not(store: ObjectStore, quick: None) -> None:
    dead = Lease(store, "dead")
    assert dead.take() is None
    dead._over.set()  # as a killed process does: no more renewals, nothing given back
    waited = threading.Event()
    following = Lease(store, "following")
    while (held := following.take()) is not None:
        assert held.name == "dead"
        waited.wait(0.3)
    waited.wait(2.5)  # long past what would be death without renewals
    assert find_holder(store) == "following"
    dead._over.clear()
    dead._renew()  # as a process does that was only cut off
    with pytest.raises(StageError, match="taken over by following"):
        dead.check()
    dead.give_back()
    assert find_holder(store) == "following"
    following.check()
    following.give_back()


def test_the_clocks_of_the_nodes_do_not_matter(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Lease(store, "holder")
    assert holder.take() is None
    monkeypatch.setattr("time.time", lambda: 4e9)
    held = Lease(store, "hours ahead").take()
    assert held is not None
    assert held.name == "holder"
    holder.give_back()


def test_a_run_that_was_taken_over_commits_nothing(place: str, tmp_path: Path) -> None:
    run = RunDirectory(place)
    run.lock()
    run.create({})
    assert run._lease is not None
    run._lease._lost = "process 7 on elsewhere"
    with pytest.raises(StageError, match="taken over by process 7 on elsewhere"):
        run.commit("merge", "inputs", [], {})
    assert run.stage("merge") is None
