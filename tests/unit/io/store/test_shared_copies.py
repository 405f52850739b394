"""What several runs of one node read of the same content lies there once."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
from faulting.s3 import uri

from emloc_ray.io.store import node_copies
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.digests import digest_of
from emloc_ray.io.store.node_cache import ensure, mirror, origin
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import Stored

SHARD = Path("model", "model.safetensors")


@pytest.fixture
def runs(s3_port: int, node_cache: Path, tmp_path: Path, request: pytest.FixtureRequest) -> list[Path]:
    """Three runs with the same model, as a node sees them that wrote none."""
    roots = [mirror(uri(s3_port, f"copies/{request.node.name}/{number}")) for number in range(3)]
    for root in roots:
        write_bytes(root / SHARD, b"x" * 10)
    there = [tmp_path / "another node" / root.name for root in roots]
    there[0].parent.mkdir(mode=0o700)
    return there


def test_what_another_run_has_fetched_is_linked(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = runs
    ensure(first / SHARD)
    read: list[object] = []
    monkeypatch.setattr(node_copies, "digest_of", lambda stream: (read.append(stream), digest_of(stream))[1])
    ensure(first / SHARD)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "download", lambda *_: pytest.fail("fetched again"))
        ensure(second / SHARD)
        for root in (first, second):
            ensure(root / SHARD)
    assert (first / SHARD).stat().st_ino == (second / SHARD).stat().st_ino
    assert not read  # it was hashed on its way, and a link alters nothing
    write_bytes(first / SHARD, b"y" * 10)
    assert (second / SHARD).read_bytes() == b"x" * 10
    (second / SHARD).write_bytes(b"z" * 10)
    ensure(third / SHARD)
    assert (third / SHARD).read_bytes() == b"x" * 10


def test_runs_that_read_it_at_once_fetch_it_once(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []
    download = ObjectStore.download

    def counted(self: ObjectStore, info: Stored, target: Path) -> None:
        fetched.append(target)
        time.sleep(0.2)
        download(self, info, target)

    monkeypatch.setattr(ObjectStore, "download", counted)
    threads = [threading.Thread(target=ensure, args=(root / SHARD,)) for root in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert [(root / SHARD).read_bytes() for root in runs] == [b"x" * 10] * 3


def test_a_copy_of_several_runs_takes_its_room_once(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_copies, "IN_USE_S", 0.0)
    disk = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=disk.total))  # however full this one is
    monkeypatch.setenv("EMLOC_RAY_CACHE_SIZE", "25B")
    for root in runs:
        ensure(root / SHARD)
    write_bytes(runs[0] / "other" / "new", b"y" * 10)
    assert all((root / SHARD).is_file() for root in runs)
    write_bytes(runs[0] / "other" / "newer", b"y" * 10)
    assert not any((root / SHARD).exists() for root in runs)


def test_what_is_added_to_is_no_other_run_s(runs: list[Path]) -> None:
    logs = [root / "training" / "finetune.log.jsonl" for root in runs]
    for log in logs:
        here = origin(log)
        assert here is not None
        write_bytes(mirror(here.store.uri) / here.path, b"{}\n")
        ensure(log)
    with logs[0].open("a") as file:
        file.write("{}\n")
    assert [log.read_bytes() for log in logs[1:]] == [b"{}\n"] * 2
