"""A cache that many runs share: keys, whole entries or none, one maker at a time, room made, in a file system and on S3."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from s3_server import uri

from emloc_ray.errors import ConfigError, Stopped
from emloc_ray.io.runs import cache as artifact_cache
from emloc_ray.io.runs import cache_place
from emloc_ray.io.runs.cache import ArtifactCache, Entry, EntryGone
from emloc_ray.io.runs.cache_place import MARKER
from emloc_ray.io.store import transfer
from emloc_ray.io.store.atomic import atomic_file
from emloc_ray.io.store.digests import digest, noted_digest
from emloc_ray.io.store.node_cache import discard, hashes, mirror, open_artifact, sizes
from emloc_ray.io.store.object_store import ObjectStore

STAGE = "factorize"
CONTENTS = {"emulator/a.safetensors": b"a" * 1000, "emulator/deep/b.json": b"{}"}
KEY = ArtifactCache.key(STAGE, {"ranks": 8})
BUCKET = pytest.param("bucket", marks=pytest.mark.server)
PLACES = ("folder", BUCKET)
fork = multiprocessing.get_context("fork")


@pytest.fixture
def place(tmp_path: Path, node_cache: Path, request: pytest.FixtureRequest) -> Callable[..., str]:
    """``place(kind, name, host)``: a place of this test's own."""

    def get(kind: str, name: str, host: str = "127.0.0.1") -> str:
        if kind == "folder":
            return str(tmp_path / name)
        port = request.getfixturevalue("s3_port")
        folder = "".join(c if c.isalnum() else "-" for c in request.node.name)
        return uri(port, f"artifacts/{folder}/{name}").replace("127.0.0.1", host)

    return get


@pytest.fixture(params=PLACES)
def cache(place: Callable[..., str], request: pytest.FixtureRequest) -> ArtifactCache:
    return ArtifactCache(place(request.param, "shared"))


@pytest.fixture
def local(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(str(tmp_path / "cache"))


def root_of(place: str) -> Path:
    return mirror(place) if "://" in place else Path(place)


def made(root: Path, contents: dict[str, bytes] = CONTENTS) -> dict[str, dict[str, Any]]:
    """Files of a run, and what its manifest says of them."""
    for path, content in contents.items():
        with atomic_file(root / path) as file:
            file.write(content)
    return {
        path: {"size": sizes(root / path)[root / path], "sha256": hashes(root / path)[root / path]} for path in contents
    }


def added(cache: ArtifactCache, root: Path, key: str = KEY, contents: dict[str, bytes] = CONTENTS) -> None:
    assert cache.add(STAGE, key, root, made(root, contents), {"rank": 8}, {"ranks": 8}) is None


def held(root: Path, contents: dict[str, bytes] = CONTENTS) -> dict[str, bytes]:
    found = {}
    for path in contents:
        with open_artifact(root / path) as (file, _):
            found[path] = file.read()
    return found


def folder(cache: ArtifactCache, key: str = KEY) -> Path:
    return Path(cache.place) / STAGE / key


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def leaves(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all that is no container, or an empty one."""
    if isinstance(value, (dict, list)) and value:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for at, item in inner for found in leaves(item, (*way, at))]
    return [way]


def turned(value: Any) -> Any:
    """Equal, with its keys in another order."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(item) for item in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=4), values, st.data())
def test_any_change_changes_the_key(inputs: dict[str, Any], other: Any, data: st.DataObject) -> None:
    way = data.draw(st.sampled_from(leaves(inputs)))
    changed = copy.deepcopy(inputs)
    target: Any = changed
    for at in way[:-1]:
        target = target[at]
    assume(json.dumps(turned(target[way[-1]])) != json.dumps(turned(other)))
    target[way[-1]] = other
    key = ArtifactCache.key(STAGE, inputs)
    assert len(key) == 64
    assert ArtifactCache.key(STAGE, changed) != key
    assert ArtifactCache.key(STAGE, {**inputs, "longer": None}) != key
    assert ArtifactCache.key(f"{STAGE}x", inputs) != key
    assert ArtifactCache.key(STAGE, turned(inputs)) == key


def test_the_format_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_cache, "FORMAT", 99)
    assert ArtifactCache.key(STAGE, {"ranks": 8}) != KEY


def test_what_has_no_text_of_its_own_makes_no_key() -> None:
    with pytest.raises(TypeError):
        ArtifactCache.key(STAGE, {"a": object()})


@pytest.mark.parametrize("to", ["folder", BUCKET, pytest.param("other bucket", marks=pytest.mark.server)])
@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("by", PLACES)
def test_what_one_run_made_another_has(place: Callable[..., str], by: str, at: str, to: str) -> None:
    first, cache = root_of(place(by, "first")), ArtifactCache(place(at, "shared"))
    assert cache.find(STAGE, KEY) is None
    before = time.time()
    added(cache, first)
    discard(first / "emulator")
    entry = cache.find(STAGE, KEY, verify=True)
    assert entry is not None
    assert (entry.stage, entry.key, entry.bytes, entry.result) == (STAGE, KEY, 1002, {"rank": 8})
    assert (entry.inputs, entry.origin) == ({"ranks": 8}, "first")
    assert before - 5 < entry.created_at <= time.time()
    other = root_of(place(to.split()[-1], "second", "localhost" if to.startswith("other") else "127.0.0.1"))
    with atomic_file(other / "emulator" / "deep" / "b.json") as file:
        file.write(b"of a run that was killed")
    assert cache.link(entry, other) == [other / path for path in CONTENTS]
    assert held(other) == CONTENTS
    assert {path.relative_to(other).as_posix() for path in sizes(other / "emulator")} == set(CONTENTS)
    assert {hashes(other)[other / path] for path in CONTENTS} == {file["sha256"] for file in entry.files.values()}
    if to == "folder":
        assert noted_digest(other / "emulator" / "a.safetensors") == entry.files["emulator/a.safetensors"]["sha256"]


@pytest.mark.server
def test_in_one_store_nothing_goes_through_this_node(
    place: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ArtifactCache(place("bucket", "shared"))
    files = made(mirror(place("bucket", "first")))
    monkeypatch.setattr(ObjectStore, "download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(ObjectStore, "add_version", lambda *_: pytest.fail("uploaded"))
    assert cache.add(STAGE, KEY, mirror(place("bucket", "first")), files, {}, {}) is None
    entry = cache.find(STAGE, KEY)
    assert entry is not None
    cache.link(entry, mirror(place("bucket", "second")))
    assert held(mirror(place("bucket", "second"))) == CONTENTS


@pytest.mark.server
def test_a_store_that_cannot_copy_is_read_and_written(
    place: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "LARGEST_COPY", 500)
    cache = ArtifactCache(place("bucket", "shared"))
    added(cache, mirror(place("bucket", "first")))
    entry = cache.find(STAGE, KEY, verify=True)
    assert entry is not None
    cache.link(entry, mirror(place("bucket", "second")))
    assert held(mirror(place("bucket", "second"))) == CONTENTS


def test_what_is_altered_since_it_was_read_is_read_again(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "first")
    assert local.find(STAGE, KEY, verify=True) is not None
    file = folder(local) / "files" / "emulator" / "a.safetensors"
    file.chmod(0o644)
    file.write_bytes(b"b" * 1000)
    assert local.find(STAGE, KEY, verify=True) is None
    assert not folder(local).exists()


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_an_entry_that_carries_code_is_refused_and_goes(local: ArtifactCache, tmp_path: Path, suffix: str) -> None:
    """Once: no later run meets it again."""
    field = pa.field("input_ids", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    table, path = pa.table([[b"code"]], schema=pa.schema([field])), tmp_path / "first" / "data" / f"shard.{suffix}"
    path.parent.mkdir(parents=True)
    if suffix == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    files = {f"data/{path.name}": {"size": path.stat().st_size, "sha256": digest(path)}}
    assert local.add(STAGE, KEY, tmp_path / "first", files, {}, {}) is None
    assert local.find(STAGE, KEY, verify=True) is None
    assert not folder(local).exists()


def test_an_entry_that_lost_a_file_goes_for_good(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY, verify=True)
    assert entry is not None
    (folder(local) / "files" / "emulator" / "a.safetensors").unlink()
    with pytest.raises(EntryGone):
        local.link(entry, tmp_path / "second")
    assert not folder(local).exists()
    assert not any(path.is_file() for path in (tmp_path / "second").rglob("*"))


def test_where_blocks_can_be_shared_a_run_s_file_is_its_own(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(target: Any, code: int, source: int) -> None:
        os.sendfile(target.fileno(), source, 0, os.fstat(source).st_size)

    monkeypatch.setattr(fcntl, "ioctl", clone)
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY, verify=True)
    assert entry is not None
    local.link(entry, tmp_path / "second")
    (tmp_path / "second" / "emulator" / "a.safetensors").write_bytes(b"b" * 1000)
    assert held(tmp_path / "first") == CONTENTS
    assert local.find(STAGE, KEY, verify=True) is not None


def test_on_one_file_system_nothing_is_copied(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))  # a file system that shares no blocks

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY)
    assert entry is not None
    for _ in range(2):  # the second time the link is there already
        local.link(entry, tmp_path / "second")
    first, second = (tmp_path / run / "emulator" / "a.safetensors" for run in ("first", "second"))
    assert first.stat().st_ino == second.stat().st_ino
    assert second.stat().st_nlink == 3
    assert second.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_there_are_no_links_it_is_copied(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY, verify=True)
    assert entry is not None
    local.link(entry, tmp_path / "second")
    assert held(tmp_path / "second") == CONTENTS
    copied = tmp_path / "second" / "emulator" / "a.safetensors"
    assert copied.stat().st_nlink == 1
    assert noted_digest(copied) == digest(copied)
    (folder(local) / "files" / "emulator" / "a.safetensors").write_bytes(b"b" * 1000)  # seen as it is copied
    with pytest.raises(EntryGone, match="altered"):
        local.link(entry, tmp_path / "third")
    assert not any(path.is_file() for path in (tmp_path / "third").rglob("*"))
    assert local.entries() == []


@pytest.mark.parametrize("how", ["truncated", "gone", "altered", "no JSON", "no entry", "outside"])
def test_a_broken_entry_is_a_miss_and_goes(local: ArtifactCache, tmp_path: Path, how: str) -> None:
    added(local, tmp_path / "first")
    file, entry = folder(local) / "files" / "emulator" / "a.safetensors", folder(local) / "entry.json"
    if how == "truncated":
        os.truncate(file, 999)
    elif how == "gone":
        file.unlink()
    elif how == "altered":
        file.write_bytes(b"b" * 1000)
        assert local.find(STAGE, KEY) is not None
    elif how == "no JSON":
        entry.write_text("{")
    elif how == "no entry":
        entry.unlink()
    else:
        entry.write_text(entry.read_text().replace("emulator/deep", "../emulator"))
    assert local.find(STAGE, KEY, verify=True) is None
    assert folder(local).exists() == (how == "no entry")
    added(local, tmp_path / "first")
    assert local.find(STAGE, KEY, verify=True) is not None


@pytest.mark.server
def test_a_broken_entry_of_a_store_is_a_miss_and_goes(place: Callable[..., str]) -> None:
    cache = ArtifactCache(place("bucket", "shared"))
    store = ObjectStore(cache.place)
    for break_it in (
        lambda info: store.remove(info.path),
        lambda info: store.write(f"{STAGE}/{KEY}/files/emulator/a.safetensors/{info.sha256}", b"cut"),
        lambda info: store.write(f"{STAGE}/{KEY}/entry.json", b"{"),
    ):
        added(cache, root_of(place("bucket", "first")))
        break_it(store.versions(f"{STAGE}/{KEY}/files")["emulator/a.safetensors"])
        assert cache.find(STAGE, KEY) is None
        assert store.below(STAGE) == []
    added(cache, root_of(place("bucket", "first")))
    info = store.versions(f"{STAGE}/{KEY}/files")["emulator/a.safetensors"]
    store.write(f"{STAGE}/{KEY}/files/emulator/a.safetensors/{info.sha256}", b"b" * 1000)
    entry = cache.find(STAGE, KEY)
    assert entry is not None
    assert cache.find(STAGE, KEY, verify=True) is None
    with pytest.raises(EntryGone):
        cache.link(entry, root_of(place("folder", "second")))


def test_what_is_wrong_in_the_run_is_not_taken(local: ArtifactCache, tmp_path: Path) -> None:
    files = made(tmp_path / "first")
    os.truncate(tmp_path / "first" / "emulator" / "a.safetensors", 999)
    assert "a.safetensors is cut short" in str(local.add(STAGE, KEY, tmp_path / "first", files, {}, {}))
    assert local.entries() == []
    assert [path for path in Path(local.place).rglob("*") if path.is_file()] == [Path(local.place) / MARKER]


def test_a_full_disk_is_told_and_leaves_nothing(
    cache: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = transfer.transfer, []

    def full(*arguments: Any) -> None:
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    files = made(tmp_path / "first")
    with monkeypatch.context() as patch:
        patch.setattr(artifact_cache, "transfer", full)
        assert "No space left" in str(cache.add(STAGE, KEY, tmp_path / "first", files, {}, {}))
    assert cache.find(STAGE, KEY) is None
    assert [names for names in cache._at.scan() if names[0] == STAGE] == []
    assert held(tmp_path / "first") == CONTENTS


def test_a_run_that_cannot_take_it_gets_nothing(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY)
    assert entry is not None
    (tmp_path / "second" / "emulator").mkdir(parents=True)
    (tmp_path / "second" / "emulator" / "deep").write_text("a file where a directory has to be")
    with pytest.raises(EntryGone, match="does not give factorize of first"):
        local.link(entry, tmp_path / "second")
    assert not (tmp_path / "second" / "emulator" / "a.safetensors").exists()
    assert local.find(STAGE, KEY) is not None


def stop_before_the_entry(place: str, root: Path, files: dict[str, Any]) -> None:
    cache = ArtifactCache(place)
    place_module: Any = cache_place
    parsed = place_module.atomic_file

    def stop(path: Path) -> Any:
        if path.name == "entry.json":
            os._exit(9)
        return parsed(path)

    place_module.atomic_file = stop
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
    for number in range(7):
        added(cache, tmp_path / str(number), ArtifactCache.key(STAGE, number), {"emulator/x": bytes([number]) * 1000})
        time.sleep(0.01)
    assert len(weighed) == 3  # at first, and where the sixth and the seventh may be too much
    assert [entry.key for entry in entries()] == [ArtifactCache.key(STAGE, number) for number in (6, 5, 4, 3, 2)]


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


def test_what_was_altered_in_place_is_not_found(local: ArtifactCache, tmp_path: Path) -> None:
    assert local.find(STAGE, KEY, verify=True) is None  # a miss says nothing of what another adds later
    added(local, tmp_path / "first")
    (file,) = Path(local.place).rglob("a.safetensors")
    file.write_bytes(b"x" * 1000)
    assert local.find(STAGE, KEY, verify=True) is None
    assert local.entries() == []


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
        time.sleep(0.3)
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


@pytest.mark.server
def test_a_store_of_something_else_is_refused(place: Callable[..., str]) -> None:
    ObjectStore(place("bucket", "other")).write("notes.txt", b"mine")
    with pytest.raises(ConfigError, match="holds files of something else"):
        ArtifactCache(place("bucket", "other"))
    with pytest.raises(ConfigError, match=r"artifact cache s3://b/c\?x=1 is no place"):
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
