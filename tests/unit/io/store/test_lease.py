"""Of two drivers one holds the run; who died is recognised by the store's own clock; who was cut off notices."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import deaf_store, uri
from obstore.store import S3Store

from emloc_ray.errors import ArtifactError, ConfigError, StageError, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store import lease, objects
from emloc_ray.io.store.lease import Lease, find_holder
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.places import below
from emloc_ray.runs.log import RunLog, read_events


@pytest.fixture
def place(s3_port: int, node_cache: Path, request: pytest.FixtureRequest) -> str:
    return uri(s3_port, f"lease/{request.node.name}")


@pytest.fixture
def store(place: str) -> ObjectStore:
    return ObjectStore(place)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals in a tenth of a second; two seconds without one are death (the store counts in whole ones)."""
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 2.0)


def cut_off(holder: Lease) -> None:
    """As a process is that cannot reach the store, or is killed: no more renewals, nothing given back."""
    holder._over.set()
    assert holder._thread is not None
    holder._thread.join()


def test_the_second_is_told_who_holds_it(place: str, quick: None) -> None:
    first, second = RunDirectory(place), RunDirectory(place)
    first.lock()
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"is in use by process \d+ on "):
        second.lock(told.append)
    assert [" held this run until a moment ago: waiting up to 60 s" in text for text in told] == [True]
    assert (second.holder() or "").startswith("process ")
    first.unlock()
    assert second.holder() is None
    second.lock(told.append)
    second.unlock()
    assert len(told) == 1


def test_a_run_is_begun_again_right_after_its_holder_s_death(place: str, quick: None) -> None:
    dead, following = RunDirectory(place), RunDirectory(place)
    dead.lock()
    assert dead.lease is not None
    cut_off(dead.lease)
    following.lock()
    following.unlock()


def test_one_lease_holds_a_batch_and_its_tasks(place: str, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, following, told = RunDirectory(place), RunDirectory(place), list[str]()
    batch.lock()
    tasks = [RunDirectory(below(place, "tasks", name)) for name in ("a", "b")]
    before = threading.active_count()
    for task in tasks:
        task.lock(under=batch)
    assert threading.active_count() == before  # nothing more is renewed
    alone = RunDirectory(below(place, "tasks", "a"))
    threading.Event().wait(2.5)  # longer than a lease lasts unrenewed
    assert (alone.holder() or "").startswith("process ")
    with pytest.raises(ConfigError, match="is in use by process"):
        alone.lock()
    tasks[0].check_held()
    tasks[1].unlock()
    assert RunDirectory(below(place, "tasks", "b")).holder() is None
    assert batch.lease is not None
    cut_off(batch.lease)
    following.lock()
    assert alone.holder() is None
    with monkeypatch.context() as patched:
        patched.setattr(lease, "STALE_S", 60.0)
        alone.lock(told.append, under=following)
    assert told == []  # its holder's death is known
    with pytest.raises(TakenOver):
        tasks[0].check_held()
    tasks[0].unlock()
    assert (alone.holder() or "").startswith("process ")
    alone.unlock()
    following.unlock()


def test_of_many_at_once_one_takes_it(store: ObjectStore, quick: None) -> None:
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
    dead, following = Lease(store, "dead"), Lease(store, "following")
    assert dead.take() is None
    cut_off(dead)
    assert following.take() is None
    threading.Event().wait(3.5)  # long past what would be death without renewals
    assert find_holder(store) == "following"
    held = Lease(store, "third").take()
    assert held is not None
    assert held.name == "following"
    with pytest.raises(StageError, match="taken over by following"):
        dead.check()
    dead.give_back()
    assert find_holder(store) == "following"
    following.check()
    following.give_back()


def test_what_was_given_back_is_not_taken_again_by_a_thread_that_is_left(store: ObjectStore) -> None:
    batch = Lease(store, "batch")
    assert batch.take() is None
    task = Lease(store, "task", under=batch)
    batch.give_back()
    batch._renewed = -math.inf  # as it is half a minute later
    with pytest.raises(TakenOver, match="was given back"):
        task.check()
    assert find_holder(store) is None


def test_a_loss_is_told_though_the_store_did_not_answer_at_first(
    store: ObjectStore, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, following = Lease(store, "dead"), Lease(store, "following")
    assert dead.take() is None
    cut_off(dead)
    assert following.take() is None

    def unreachable(*_: object) -> None:
        raise ArtifactError("The store cannot be reached.")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "read_version", unreachable)
        for _ in range(2):
            with pytest.raises(ArtifactError, match="cannot be reached"):
                dead.check()
    with pytest.raises(StageError, match="taken over by following"):
        dead.check()
    following.give_back()


def test_a_store_that_does_not_answer_is_waited_for_by_all_tasks_of_a_batch_at_once(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, tries, waiting = Lease(store, "holder"), list[int](), threading.Barrier(17)

    def unreachable(*_: object) -> None:
        tries.append(1)
        if len(tries) == 1:
            waiting.wait(10)  # until all have asked
            time.sleep(1)  # and wait for it
        raise ArtifactError("The store cannot be reached.")

    def check(first: bool) -> None:
        if not first:
            waiting.wait(10)
        with pytest.raises(ArtifactError, match="cannot be reached"):
            holder.check()

    monkeypatch.setattr(ObjectStore, "replace", unreachable)
    with ThreadPoolExecutor(17) as pool:
        list(pool.map(check, [True] + [False] * 16))
    assert len(tries) == 2  # that which ran as they asked, and one for all of them


def test_who_was_cut_off_for_long_but_not_followed_goes_on(store: ObjectStore, quick: None) -> None:
    holder = Lease(store, "holder")
    assert holder.take() is None
    cut_off(holder)
    threading.Event().wait(3.5)
    assert find_holder(store) is None
    holder.check()
    assert find_holder(store) == "holder"
    holder.give_back()


def test_a_write_whose_answer_was_lost_is_one_s_own(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put twice, as by one who heard no answer to the first, is refused the second time."""
    holder = Lease(store, "holder")
    put = S3Store.put

    def again(self: S3Store, *given: Any, **options: Any) -> Any:
        put(self, *given, **options)
        return put(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "put", again)
        assert holder.take() is None
        holder._renew()
    holder._renew()
    holder.check()
    holder.give_back()
    assert find_holder(store) is None


def test_numbers_grow(store: ObjectStore) -> None:
    numbers = []
    for _ in range(3):
        lease = Lease(store, "holder")
        assert lease.take() is None
        numbers.append(lease.number)
        lease.give_back()
    assert numbers == sorted(set(numbers))
    assert Lease(store, "holder", after=10**12).number == 10**12 + 1


def test_the_clocks_of_the_nodes_do_not_matter(
    store: ObjectStore, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Lease(store, "holder")
    assert holder.take() is None
    monkeypatch.setattr("time.time", lambda: 4e9)
    held = Lease(store, "hours ahead").take()
    assert held is not None
    assert held.name == "holder"
    holder.give_back()


def test_a_run_that_was_taken_over_writes_nothing(place: str, quick: None) -> None:
    run, following = RunDirectory(place), RunDirectory(place)
    run.lock()
    run.create({})
    run.commit("merge", "inputs", [], {})
    assert run.lease is not None
    with RunLog(run) as log:
        cut_off(run.lease)
        following.lock()
        log.note("Something.")
    assert [event["event"] for event in read_events(following)] == ["run_started"]
    for write in (
        lambda: run.commit("evaluate", "inputs", [], {}),
        lambda: run.forget("merge"),
        lambda: run.forget("never ran"),  # what follows is that its files go
        lambda: run.write_metrics({"seed": 1}),
        lambda: run.create({"seed": 1}, fresh=True),
        run.check_held,
    ):
        with pytest.raises(StageError, match=r"taken over by process \d+ on "):
            write()
    manifest = following.manifest()
    assert (list(manifest["stages"]), manifest["config"], following.metrics()) == (["merge"], {}, {})
    run.unlock()
    assert following.holder() is not None
    following.unlock()


# A store that answers no.


@contextmanager
def answers(*answers: bytes) -> Iterator[int]:
    """The port of a server that gives these answers in turn, then always the last."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.wfile.write(left.pop(0) if len(left) > 1 else left[0])
            self.close_connection = True

        do_GET = do_PUT = handle_any

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
ABSENT = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
UNKNOWN = b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\n\r\n"
CUT = (
    b"HTTP/1.1 200 OK\r\nETag: x\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
    b"Date: Thu, 01 Jan 2026 00:00:09 GMT\r\nContent-Length: %d\r\n\r\n"
)


def test_what_a_store_refuses_is_a_sentence(node_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
    with answers(FORBIDDEN) as port:
        store = ObjectStore(uri(port, "run"))
        for ask in (Lease(store, "me").take, lambda: find_holder(store)):
            with pytest.raises(ArtifactError, match=r"does not read lock \(.*403.*see that .* credentials are valid"):
                ask()
    with answers(ABSENT, UNKNOWN) as port, pytest.raises(ConfigError, match="store without conditional writes"):
        Lease(ObjectStore(uri(port, "run")), "me").take()


@pytest.mark.parametrize("ignored", ["if-none-match", "if-match"])
def test_a_store_that_ignores_conditions_is_refused_and_left_as_it_was(
    s3_port: int, node_cache: Path, ignored: str
) -> None:
    with deaf_store(s3_port, ignored) as port:
        run = RunDirectory(uri(port, f"deaf/{ignored}"))
        with pytest.raises(ConfigError, match=r"^run_dir: s3://.* is on a store without conditional writes"):
            run.check()
        assert run.names() == []


def test_a_store_that_cannot_be_reached_is_a_sentence(node_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ArtifactError, match=r"does not read lock \(.*HTTP error"):
        find_holder(ObjectStore(uri(port, "run")))


def test_an_answer_cut_short_is_asked_for_again(node_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
    content = b'{"holder": "me", "token": "t"}'
    cut, whole = (CUT % len(content) + part for part in (content[:9], content))
    with answers(cut, cut, whole) as port:
        found = ObjectStore(uri(port, "run")).read("lock")
        assert found == content
