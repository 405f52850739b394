"""A node's copy of a store: what is current stays, what is not is fetched, what was redone elsewhere is not believed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest
import torch
from faulting.s3 import uri

from emloc_ray.data.reading import scan
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint, read_shard, write_index
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store import node_cache, node_copies, object_store
from emloc_ray.io.store.atomic import atomic_directory, copy_file, write_bytes, write_json
from emloc_ray.io.store.digests import digest, noted_digest
from emloc_ray.io.store.node_cache import (
    discard,
    ensure,
    exists,
    hashes,
    local_only,
    mirror,
    open_newest,
    origin,
    publish,
    sizes,
)
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import Objects, Stored


def fill_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=1000, free=free))


@pytest.fixture(autouse=True)
def empty_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk is where the tests run: the cache makes room only where a test says so."""
    fill_disk(monkeypatch, free=1000)


@pytest.fixture
def root(s3_port: int, node_cache: Path, request: pytest.FixtureRequest) -> Path:
    return mirror(uri(s3_port, f"cache/{request.node.name}"))


@pytest.fixture
def other(root: Path, tmp_path: Path) -> Path:
    """The same run on another node."""
    return tmp_path / "other" / root.name


def test_what_was_hashed_on_the_way_is_not_read_again_for_its_upload(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(object_store, "digest", lambda file: (read.append(file), digest(file))[1])
    shard = root / "model" / "model.safetensors"
    write_tensors(shard, {"w": torch.ones(1)})
    assert hashes(shard) == {shard: digest(shard)}
    assert read == ([shard] if noted_digest(shard) is None else [])  # a file system may keep no attributes


def test_a_checkpoint_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shards = root / "model", [f"model-{number:05d}-of-00020.safetensors" for number in range(20)]
    for number, shard in enumerate(shards):
        write_tensors(folder / shard, {f"w{number}": torch.ones(1)})
    write_index(folder, {f"w{number}": shard for number, shard in enumerate(shards)}, 80, 20)
    asked: list[str] = []
    below, read_version = Objects.below, Objects.read_version
    monkeypatch.setattr(Objects, "below", lambda store, path="": (asked.append("list"), below(store, path))[1])
    monkeypatch.setattr(
        Objects,
        "read_version",
        lambda store, *path, **known: (asked.append("head"), read_version(store, *path, **known))[1],
    )
    assert len(list(Checkpoint(folder))) == 20
    assert asked == ["list", "head"]


def test_what_is_given_away_is_what_was_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another process of the node makes of its copy meanwhile: it may have read the store just before."""
    write_bytes(root / "manifest.json", b"old")
    replace = os.replace

    def overtaken(source: Path, target: Path) -> None:
        replace(source, target)
        Path(target).write_bytes(b"old")

    with monkeypatch.context() as patch:
        patch.setattr("emloc_ray.io.store.replacing.os.replace", overtaken)
        write_bytes(root / "manifest.json", b"new")
    ensure(root / "manifest.json")
    assert (root / "manifest.json").read_bytes() == b"new"


def test_a_path_says_what_it_mirrors(root: Path, tmp_path: Path) -> None:
    found = origin(root / "emulator" / "config.json")
    assert found is not None
    assert (found.root, found.path) == (root, "emulator/config.json")
    assert mirror(found.store.uri) == root
    assert origin(tmp_path) is None
    assert origin(tmp_path / "store=12" / "part.parquet") is None  # a column of a partitioned data set


def test_a_run_may_end_in_tmp(s3_port: int, node_cache: Path) -> None:
    root = mirror(uri(s3_port, "cache/v1.tmp"))
    write_bytes(root / "emulator" / "config.json", b"1")
    write_bytes(root / "half.tmp" / "config.json", b"1")
    assert list(sizes(root)) == [root / "emulator" / "config.json"]


def test_what_one_node_writes_the_others_read(root: Path, other: Path) -> None:
    write_bytes(root / "emulator" / "a.safetensors", b"1")
    write_bytes(root / "emulator" / "b.json", b"2")
    write_json(root / "manifest.json", {})
    ensure(other / "emulator", weights=False)
    assert not (other / "emulator" / "a.safetensors").exists()
    ensure(other / "emulator")
    ensure(other / "manifest.json")
    assert (other / "emulator" / "a.safetensors").read_bytes() == b"1"
    assert (other / "manifest.json").read_bytes() == b"{}\n"
    assert sizes(other / "emulator") == {other / "emulator" / "a.safetensors": 1, other / "emulator" / "b.json": 1}
    assert hashes(other / "emulator")[other / "emulator" / "b.json"] == digest(root / "emulator" / "b.json")


def test_what_one_node_writes_another_copies_and_counts(root: Path, other: Path) -> None:
    write_bytes(root / "model" / "config.json", b"{}")
    write_bytes(root / "data" / "rows" / "train.jsonl", b'{"prompt": "p"}\n')
    copy_file(other / "model" / "config.json", other / "merged" / "config.json")
    assert exists(root / "merged" / "config.json")
    assert scan(other / "data" / "rows" / "train.jsonl").num_rows == 1


def test_an_old_copy_gives_way(root: Path, other: Path) -> None:
    write_bytes(root / "slots" / "s", b"first")
    ensure(other / "slots" / "s")
    write_bytes(root / "slots" / "s", b"later")
    with open_newest(other / "slots" / "s") as (file, size, _):
        assert (file.read(), size) == (b"later", 5)
    ensure(other / "slots" / "s")
    assert (other / "slots" / "s").read_bytes() == b"later"


def test_a_node_reads_the_version_that_another_found(root: Path, other: Path) -> None:
    """As where the driver reads headers, and workers read the tensors that it found."""
    shard = root / "model" / "model.safetensors"
    for value in (1.0, 2.0):
        write_tensors(shard, {"weight": torch.full((3,), value)})
        entry = read_shard(shard).entries[0]
        there = dataclasses.replace(entry, file=other / "model" / shard.name)
        assert there.read_rows().tolist() == [value] * 3
    write_tensors(shard, {"weight": torch.zeros(3)})
    assert there.read_rows().tolist() == [2.0] * 3
    there.file.unlink()
    with pytest.raises(ArtifactError, match="written anew while it was read"):
        there.read_rows()


def test_what_a_killed_writer_did_not_give_to_the_store_is_not_believed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write_bytes(root / "a" / "f", b"whole")
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "add_version", killed)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(root / "a" / "f", b"other")
    assert (root / "a" / "f").read_bytes() == b"other"
    with open_newest(root / "a" / "f") as (file, *_):
        assert file.read() == b"whole"
    ensure(root / "a")
    assert (root / "a" / "f").read_bytes() == b"whole"


def test_a_look_at_a_file_removes_nothing_that_others_have_just_fetched(root: Path, other: Path) -> None:
    write_bytes(root / "a" / "f", b"x")
    (other / "a").mkdir(parents=True)
    (other / "a" / "f").write_bytes(b"x")  # in its place, and not noted yet
    with open_newest(other / "a" / "f") as (file, size, _):
        assert (file.read(), size) == (b"x", 1)
    assert (other / "a" / "f").is_file()


def test_a_directory_loses_what_the_store_no_longer_holds(root: Path, other: Path) -> None:
    """As a merged model of one file whose successor is in several: transformers would read the one."""
    for name in ("model.safetensors", "config.json"):
        write_bytes(root / "merged" / name, b"x")
    ensure(other / "merged")
    discard(root / "merged" / "model.safetensors")
    ensure(other / "merged", weights=False)
    assert [file.name for file in (other / "merged").iterdir()] == ["config.json"]


def test_a_copy_of_what_is_no_more_goes(root: Path, other: Path) -> None:
    for name in ("manifest.json", "slots/s"):
        write_bytes(root / name, b"x")
        ensure(other / name)
        discard(root / name)
        assert not (root / name).exists()
        assert not exists(other / name)
        ensure(other / name)
        assert not (other / name).exists()


def test_a_current_copy_is_not_fetched_again(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(root / "a" / "f", b"x")
    ensure(other / "a")
    monkeypatch.setattr(ObjectStore, "download", lambda *_: pytest.fail("fetched again"))
    ensure(other / "a")
    ensure(root / "a")


def test_workers_of_a_node_fetch_a_file_once(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(root / "a" / "f", b"x")
    fetched: list[Path] = []
    download = ObjectStore.download

    def counted(self: ObjectStore, info: Stored, target: Path) -> None:
        fetched.append(target)
        time.sleep(0.2)
        download(self, info, target)

    monkeypatch.setattr(ObjectStore, "download", counted)
    threads = [threading.Thread(target=ensure, args=(other / "a" / "f",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_workers_of_a_node_hash_a_file_side_by_side(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(root / "a" / "f", b"x")
    ensure(other / "a" / "f")
    at_once = threading.Barrier(2)

    def opened(*version: object) -> IO[bytes]:
        at_once.wait(10)
        return (other / "a" / "f").open("rb")

    monkeypatch.setattr(node_cache, "open_copy", opened)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ensure, [other / "a" / "f"] * 2))
    assert not at_once.broken


def test_what_was_hashed_while_it_was_fetched_is_not_hashed_again(
    root: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(root / "a" / "f", b"x")
    monkeypatch.setattr(node_copies, "digest_of", lambda _: pytest.fail("hashed again"))
    ensure(other / "a" / "f")
    with open_newest(other / "a" / "f") as (file, *_):
        assert file.read() == b"x"


def test_a_directory_that_is_being_written_is_not_seen(root: Path, other: Path) -> None:
    write_bytes(root / "adapter" / "old", b"x")
    with atomic_directory(root / "adapter") as temporary:
        write_bytes(temporary / "new", b"y")
        assert list(sizes(other / "adapter")) == [other / "adapter" / "old"]
    assert list(sizes(other / "adapter")) == [other / "adapter" / "new"]
    found = origin(root)
    assert found is not None
    assert found.store.names() == ["adapter"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, free=0)


def test_the_cache_makes_room(root: Path, other: Path, full_disk: None) -> None:
    for name in ("a/old", "a/used", "a/new"):
        write_bytes(root / name, b"x" * 10)
    ensure(other / "a" / "old")
    ensure(other / "a" / "used")
    found = origin(other / "a" / "old")
    assert found is not None
    os.utime(found.note, (0, 0))
    ensure(other / "a" / "new")
    assert sorted(file.name for file in (other / "a").iterdir()) == ["new", "used"]
    ensure(other / "a" / "old")
    assert (other / "a" / "old").read_bytes() == b"x" * 10


def test_copies_take_no_more_than_they_may(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copies, "IN_USE_S", 0.0)
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", "25B")
    for number, name in enumerate(("a/first", "a/second", "a/third", "a/fourth")):
        write_bytes(root / name, b"x" * 10)
        ensure(other / name)
        found = origin(other / name)
        assert found is not None
        os.utime(found.note, (number, number))
    assert sorted(file.name for file in (other / "a").iterdir()) == ["fourth", "third"]
    write_bytes(root / "a" / "fifth", b"x")
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", "much")
    with pytest.raises(ConfigError, match="EMLOC_RAY_CACHE_SIZE is 'much': give a number and a unit"):
        ensure(other / "a" / "fifth")


def test_what_a_call_has_fetched_stays_until_its_end(root: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copies, "IN_USE_S", 0.0)
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", "25B")
    for name in ("first", "second", "third", "fourth"):
        write_bytes(root / "a" / name, b"x" * 10)
    ensure(other / "a")
    assert len(list((other / "a").iterdir())) == 4


def test_room_is_made_for_what_is_written_here_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copies, "IN_USE_S", 0.0)
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", "25B")
    for number, name in enumerate(("a/first", "a/second", "a/third")):
        write_bytes(root / name, b"x" * 10)
        here = origin(root / name)
        assert here is not None
        os.utime(here.note, (number, number))
    write_bytes(root / "a" / "fourth", b"x" * 10)
    assert sorted(file.name for file in (root / "a").iterdir()) == ["fourth", "third"]


def test_a_copy_is_hashed_at_its_first_use_in_a_process(root: Path, other: Path) -> None:
    write_bytes(root / "a" / "f", b"right")
    ensure(other / "a" / "f")
    here, status = origin(other / "a" / "f"), (other / "a" / "f").stat()
    assert here is not None
    (other / "a" / "f").write_bytes(b"wrong")  # by whom the note of it is no secret
    os.utime(other / "a" / "f", ns=(status.st_atime_ns, status.st_mtime_ns))
    node_copies._hashed.clear()
    with open_newest(other / "a" / "f") as (file, *_):
        assert file.read() == b"right"
    ensure(other / "a" / "f")
    assert (other / "a" / "f").read_bytes() == b"right"


@pytest.mark.parametrize("how", ["open to all", "another's", "a link"])
def test_a_place_for_copies_that_others_may_write_is_refused(
    s3_port: int, node_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    root = mirror(uri(s3_port, f"refused/{how.replace(' ', '-').replace(chr(39), '')}"))
    node_cache.mkdir()
    if how == "a link":
        (tmp_path / "elsewhere").mkdir()
        root.parent.symlink_to(tmp_path / "elsewhere")
    else:
        root.parent.mkdir()
        root.parent.chmod(0o777 if how == "open to all" else 0o700)
    if how == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match=r"is not this user's alone: remove it, or let EMLOC_RAY_CACHE name another"):
        ensure(root / "a" / "f")
    assert list(root.parent.iterdir()) == []


def test_what_is_no_copy_stays_where_room_is_made(
    root: Path, other: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [local_only(other) / "hidden" / "h", *(other / name for name in ("log.jsonl", "a/on-its-way", "a/log"))]
    for file in kept:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 10)
        os.utime(file, (time.time() - 3600.0, time.time() - 3600.0))
    publish(other / "a" / "log")
    monkeypatch.setattr(node_copies, "IN_USE_S", 0.0)
    write_bytes(root / "b" / "new", b"x" * 10)
    ensure(other / "b" / "new")
    assert all(file.is_file() for file in kept)


def test_a_worker_that_is_stopped_while_it_fetches_is_not_waited_for_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        node_copies.alone(tmp_path, "a/f"),
        pytest.raises(BlockingIOError),
        node_copies.alone(tmp_path, "a/f", waits=False),
    ):
        pass
    with node_copies.alone(tmp_path, "a/f"), node_copies.alone(tmp_path, "a/f", patience_s=0.1):
        assert f"process {os.getpid()} on " in caplog.text
        assert f" is at a/f in {tmp_path}, and nothing came of it for " in caplog.text


def test_workers_may_make_room_at_once(
    root: Path, other: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = [f"new/{number}" for number in range(8)]
    for name in [*new, *(f"old/{number}" for number in range(40))]:
        write_bytes(root / name, b"x" * 10)
    ensure(other / "old")
    monkeypatch.setattr(node_copies, "IN_USE_S", 0.0)
    with ThreadPoolExecutor(len(new)) as pool:
        list(pool.map(ensure, [other / name for name in new]))
    assert not list((other / "old").iterdir())


def test_what_was_begun_with_other_inputs_goes_for_all_nodes(root: Path, other: Path) -> None:
    discard_unless(root / "merged", {"a": 1})
    write_bytes(root / "merged" / "shard", b"x")
    discard_unless(other / "merged", {"a": 1})
    assert exists(other / "merged" / "shard")
    discard_unless(other / "merged", {"a": 2})
    assert not exists(root / "merged" / "shard")


def test_hidden_states_stay_on_their_node(root: Path, tmp_path: Path) -> None:
    assert origin(local_only(root / "hidden")) is None
    assert local_only(tmp_path / "store=eu") == tmp_path / "store=eu"  # such as Hive's folders


def test_a_place_too_long_for_a_directory_is_refused_before_it_is_held(s3_port: int) -> None:
    letters = 255 - len(mirror(uri(s3_port, ""), int(time.time())).name)
    assert len(mirror(uri(s3_port, "x" * letters), int(time.time())).name) == 255
    mirror(uri(s3_port, "x" * letters))
    with pytest.raises(ConfigError, match="shorten it"):
        mirror(uri(s3_port, "x" * (letters + 1)))


def test_a_file_that_another_process_renames_meanwhile_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_text("four")
    (tmp_path / ".shard.tmp").symlink_to("renamed")
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # as it was when its name was read
    assert sizes(tmp_path) == {tmp_path / "kept": 4}
