"""A cache under pressure: makers that are killed, room that is made, entries that go meanwhile, places that cannot be used."""

# ruff: noqa: F811

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_cache import KEY, STAGE, added, cache, folder, fork, held, local, made, place, root_of  # noqa: F401

from emloc_ray.errors import ConfigError, Stopped
from emloc_ray.io.runs import cache as artifact_cache
from emloc_ray.io.runs import cache_place
from emloc_ray.io.runs.cache import ArtifactCache, Entry, EntryGone
from emloc_ray.io.runs.cache_place import MARKER
from emloc_ray.io.store import transfer, turns
from emloc_ray.io.store.object_store import ObjectStore


def stop_before_the_entry(place: str, root: Path, files: dict[str, Any]) -> None:
    cache = ArtifactCache(place)
    place_module: Any = cache_place
    written = place_module.write_bytes

    def stop(path: Path, content: bytes) -> None:
        if path.name == "entry.json":
            os._exit(9)
        written(path, content)

    place_module.write_bytes = stop
    cache.add(STAGE, KEY, root, files, {}, {})


def test_killed_before_the_entry_is_written(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = made(tmp_path / "first")
    process = fork.Process(target=stop_before_the_entry, args=(local.place, tmp_path / "first", files))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    (left,) = (Path(local.place) / STAGE).iterdir()
    assert sorted(path.name for path in left.rglob("*") if path.is_file()) == ["a.safetensors", "b.json"]
    assert local.find(STAGE, KEY) is None
    assert local.entries() == []
    added(local, tmp_path / "first")
    assert left.exists()  # it might be another's at work
    monkeypatch.setattr(cache_place, "LEFT_S", -1.0)
    local.prune(10**9)
    assert [path.name for path in (Path(local.place) / STAGE).iterdir()] == [KEY]
    assert local.find(STAGE, KEY) is not None


@pytest.mark.server
def test_what_is_left_in_a_store_goes(place: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtifactCache(place("bucket", "shared"))
    added(cache, root_of(place("bucket", "first")))
    store = ObjectStore(cache.place)
    store.remove(f"{STAGE}/{KEY}/entry.json")
    assert cache.find(STAGE, KEY) is None
    assert cache.prune(0) == []
    assert len(store.below(STAGE)) == 2
    monkeypatch.setattr(cache_place, "LEFT_S", -5.0)
    cache.prune(10**9)
    assert store.below(STAGE) == []


def used(cache: ArtifactCache, key: str, at: float) -> None:
    os.utime(folder(cache, key) / "entry.json", (at, at))


def test_room_is_made_by_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = ArtifactCache(str(tmp_path / "cache"), max_bytes=3500)
    keys = [ArtifactCache.key(STAGE, number) for number in range(5)]
    for number, key in enumerate(keys[:3]):
        added(cache, tmp_path / str(number), key, {"emulator/x": bytes([number]) * 1000})
        used(cache, key, 1000.0 + number)
    entry = cache.find(STAGE, keys[0])
    assert entry is not None
    cache.link(entry, tmp_path / "user")
    added(cache, tmp_path / "3", keys[3], {"emulator/x": b"3" * 1000})
    assert {entry.key for entry in cache.entries()} == {keys[0], keys[2], keys[3]}
    used(cache, keys[0], 4000.0)
    used(cache, keys[3], 3000.0)
    assert [entry.key for entry in cache.entries()] == [keys[0], keys[3], keys[2]]
    assert [entry.key for entry in cache.prune(1000)] == [keys[2], keys[3]]
    assert (tmp_path / "3" / "emulator" / "x").read_bytes() == b"3" * 1000
    added(cache, tmp_path / "4", keys[4], {"emulator/x": b"4" * 9000})  # never the one just added
    assert [entry.key for entry in cache.entries()] == [keys[4]]
    assert [entry.key for entry in cache.prune(0)] == [keys[4]]
    assert list((Path(cache.place) / STAGE).iterdir()) == []


def test_a_place_with_room_is_not_read_for_each_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ArtifactCache(str(tmp_path / "cache"), max_bytes=5500)
    weighed: list[int] = []
    entries = cache.entries
    monkeypatch.setattr(cache, "entries", lambda: weighed.append(1) or entries())
    for number in range(9):
        added(cache, tmp_path / str(number), ArtifactCache.key(STAGE, number), {"emulator/x": bytes([number]) * 1000})
        time.sleep(0.01)
    assert len(weighed) == 3  # at first, and where the sixth and the eighth may be too much: each makes room for two
    assert [entry.key for entry in entries()] == [ArtifactCache.key(STAGE, number) for number in (8, 7, 6, 5, 4)]


def test_what_it_holds_is_known_where_nothing_bounds_it(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "run", contents={"emulator/x": b"x" * 1000})
    other = ArtifactCache(local.place)
    assert other.held_bytes is None
    other.weigh()
    assert other.held_bytes == local.held_bytes == 1000


@pytest.mark.server
def test_room_is_made_in_a_store(place: Callable[..., str]) -> None:
    cache = ArtifactCache(place("bucket", "shared"))
    keys = [ArtifactCache.key(STAGE, number) for number in range(3)]
    for number, key in enumerate(keys):
        added(cache, root_of(place("bucket", str(number))), key, {"emulator/x": bytes([number]) * 1000})
        time.sleep(1.1)  # the server's times are whole seconds
    (entry,) = [entry for entry in cache.entries() if entry.key == keys[0]]
    cache.link(entry, root_of(place("bucket", "user")))
    assert [entry.key for entry in cache.entries()] == [keys[0], keys[2], keys[1]]
    assert [entry.key for entry in cache.prune(2000)] == [keys[1]]
    assert cache.find(STAGE, keys[1]) is None
    assert len(ObjectStore(cache.place).below(STAGE)) == 5  # two entries of two objects, one of them used


def test_a_file_of_two_entries_counts_once(local: ArtifactCache, tmp_path: Path) -> None:
    keys = [ArtifactCache.key(STAGE, number) for number in range(3)]
    files = made(tmp_path / "first", {"emulator/x": b"x" * 1000})
    for number, key in enumerate(keys[:2]):
        assert local.add(STAGE, key, tmp_path / "first", files, {}, {}) is None
        used(local, key, 1000.0 + number)
    added(local, tmp_path / "second", keys[2], {"emulator/x": b"y" * 1000})
    assert local.prune(2000) == []
    assert [entry.key for entry in local.prune(1500)] == keys[:2]


def test_pruned_while_it_is_linked(local: ArtifactCache, tmp_path: Path) -> None:
    """Each link gives all files or none, whatever others remove and add meanwhile."""
    contents = {f"emulator/{number}": bytes([number]) * 100 for number in range(20)}
    files = made(tmp_path / "first", contents)
    over, had, missed = threading.Event(), 0, 0

    def churn() -> None:
        other = ArtifactCache(local.place)
        while not over.is_set():
            assert other.add(STAGE, KEY, tmp_path / "first", files, {}, {}) is None
            over.wait(0.05)
            other.prune(0)

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        until = time.monotonic() + 60
        while time.monotonic() < until and (had < 10 or missed < 10):
            entry, root = local.find(STAGE, KEY), tmp_path / f"run-{had + missed}"
            try:
                assert entry is None or len(local.link(entry, root)) == 20
            except EntryGone:
                entry = None
            had, missed = had + (entry is not None), missed + (entry is None)
            if entry is None:
                assert not any(path.is_file() for path in root.rglob("*"))
                over.wait(0.001)  # else this thread keeps Python's lock from the other
            else:
                assert held(root, contents) == contents
        over.set()
        churning.result(60)
    assert min(had, missed) >= 10


def test_gone_in_the_middle_of_a_link(
    cache: ArtifactCache, place: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    added(cache, root_of(place("folder", "first")))
    entry, root = cache.find(STAGE, KEY), root_of(place("folder", "second"))
    assert entry is not None
    real, pruned = transfer.transfer, threading.Lock()

    def put(*arguments: Any) -> None:
        with pruned:
            real(*arguments)
            ArtifactCache(cache.place).prune(0)

    with monkeypatch.context() as patch:
        patch.setattr(artifact_cache, "transfer", put)
        with pytest.raises(EntryGone):
            cache.link(entry, root)
    assert not any(path.is_file() for path in root.rglob("*"))
    assert cache.find(STAGE, KEY) is None


def test_gone_before_it_is_linked(cache: ArtifactCache, place: Callable[..., str]) -> None:
    added(cache, root_of(place("folder", "first")))
    entry = cache.find(STAGE, KEY)
    assert entry is not None
    assert cache.prune(0) == [entry]
    with pytest.raises(EntryGone):
        cache.link(entry, root_of(place("folder", "second")))
    assert cache.find(STAGE, KEY) is None


def work(place: str, log: Path, begun: Any = None) -> None:
    cache = ArtifactCache(place)
    with cache.alone(KEY):
        with log.open("a") as file:
            file.write("in\n")
        if begun is not None:
            begun.set()
        time.sleep(0.1)
        with log.open("a") as file:
            file.write("out\n")


def test_threads_make_it_one_after_the_other(cache: ArtifactCache, tmp_path: Path) -> None:
    threads = [threading.Thread(target=work, args=(cache.place, tmp_path / "log")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3


def test_processes_make_it_one_after_the_other(local: ArtifactCache, tmp_path: Path) -> None:
    processes = [fork.Process(target=work, args=(local.place, tmp_path / "log")) for _ in range(2)]
    for process in processes:
        process.start()
    work(local.place, tmp_path / "log")
    for process in processes:
        process.join(60)
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3


def test_a_few_link_at_a_time_and_who_waits_can_be_stopped(local: ArtifactCache) -> None:
    with contextlib.ExitStack() as links:
        for _ in range(8):
            links.enter_context(local.linking(lambda: True))
        with pytest.raises(Stopped), local.linking(lambda: True):
            pass
    with local.linking(lambda: True):
        pass


def hold(place: str, begun: Any) -> None:
    with ArtifactCache(place).alone(KEY):
        begun.set()
        time.sleep(600)


def test_a_killed_maker_lets_the_next_one_in(local: ArtifactCache) -> None:
    begun = fork.Event()
    process = fork.Process(target=hold, args=(local.place, begun))
    process.start()
    assert begun.wait(60)
    with pytest.raises(Stopped), local.alone(KEY, lambda: True):
        pass
    with local.alone(ArtifactCache.key(STAGE, "another")):
        pass
    process.kill()
    process.join(60)
    with local.alone(KEY, lambda: True):
        pass


def test_a_maker_that_is_paused_is_told_of_and_not_waited_for_for_ever(
    local: ArtifactCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = fork.Event()
    process = fork.Process(target=hold, args=(local.place, begun))
    process.start()
    assert begun.wait(60)
    monkeypatch.setattr(turns, "WORD_S", 0.0)
    told: list[str] = []
    try:
        with local.alone(KEY, tell=told.append, patience_s=0.3):
            who = f"process {process.pid} on {socket.gethostname()} makes the artifact {KEY[:12]} of {local.place}"
            assert told == [f"{who}: waiting for that.", told[-1]]
            assert told[-1].startswith(f"{who}, and nothing came of it for ")
            with pytest.raises(Stopped), local.alone(KEY, lambda: True):  # a thread of this process waits for this one
                pass
    finally:
        process.kill()
        process.join(60)


def test_who_waits_can_be_stopped(cache: ArtifactCache) -> None:
    asked: list[bool] = []

    def stopped() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    with (
        cache.alone(KEY),
        pytest.raises(Stopped, match="Stopped while another run makes"),
        ArtifactCache(cache.place).alone(KEY, stopped),
    ):
        pytest.fail("two at once")
    assert asked == [False, False, True]
    with cache.alone(KEY, lambda: True):  # free: nobody is asked
        pass


def test_a_child_process_does_not_hold_the_lock_on(local: ArtifactCache) -> None:
    with local.alone(KEY):
        process = fork.Process(target=time.sleep, args=(600,))
        process.start()
    try:
        with local.alone(KEY, lambda: True):
            pass
    finally:
        process.kill()
        process.join(60)


def test_a_place_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files of something else \(notes.txt\)"):
        ArtifactCache(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="cannot be read"):
        ArtifactCache(str(tmp_path / "other" / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with ArtifactCache(str(tmp_path / "empty")).alone(KEY):
        ArtifactCache(str(tmp_path / "empty"))
    (tmp_path / "empty" / MARKER).write_text('{"format": 0}')
    with pytest.raises(ConfigError, match="none of this version"):
        ArtifactCache(str(tmp_path / "empty"))


def test_a_place_that_was_emptied_but_for_its_locks_is_made_again(local: ArtifactCache) -> None:
    """As ``rm -rf cache/*`` leaves it."""
    with local.alone(KEY):
        pass
    (Path(local.place) / MARKER).unlink()
    with local.alone(KEY):
        assert ArtifactCache(local.place).is_made()


@pytest.mark.server
def test_a_store_of_something_else_is_refused(place: Callable[..., str]) -> None:
    ObjectStore(place("bucket", "other")).write("notes.txt", b"mine")
    with pytest.raises(ConfigError, match="holds files of something else"):
        ArtifactCache(place("bucket", "other"))
    with pytest.raises(ConfigError, match=r"artifact cache s3://b/c is no place"):
        ArtifactCache("s3://b/c?x=1")


def test_a_place_is_made_by_its_first_use(cache: ArtifactCache) -> None:
    assert cache.find(STAGE, KEY) is None
    assert cache.entries() == cache.prune(0) == []
    store = cache._at.store
    assert not (Path(cache.place).exists() if store is None else store.below())


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    cache = ArtifactCache("/proc/emloc-ray-cache")
    with pytest.raises(ConfigError, match="cannot be written"), cache.alone(KEY):
        pass
    assert "does not keep factorize" in str(cache.add(STAGE, KEY, tmp_path, {}, {}, {}))


def test_a_lock_that_is_refused_is_held(local: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))  # NFS says so

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(Stopped), local.alone(KEY, lambda: True):
        pass


def test_a_place_without_locks_is_told(local: ArtifactCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="cannot be locked"), local.alone(KEY):
        pass


def test_a_stage_without_files_has_its_result(cache: ArtifactCache, place: Callable[..., str]) -> None:
    root = root_of(place("folder", "first"))
    assert cache.add(STAGE, KEY, root, {}, {"accuracy": 0.5}, None) is None
    entry: Entry | None = cache.find(STAGE, KEY)
    assert entry is not None
    assert (cache.link(entry, root), entry.result, entry.bytes) == ([], {"accuracy": 0.5}, 0)
