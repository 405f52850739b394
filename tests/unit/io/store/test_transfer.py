"""Between two places of a store, where it cannot copy: through memory, checked, two at once, tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import faulty_store, uri

from emloc_ray.errors import DamagedArtifactError
from emloc_ray.io.store import objects
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.threads import by_threads
from emloc_ray.io.store.transfer import transfer

MIB = 2**20
CONTENT = bytes(range(256)) * (11 * MIB // 256)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, node_cache: Path) -> None:
    monkeypatch.setattr(objects, "LARGEST_COPY", 0)
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(objects, "READ_BYTES", 3 * MIB)
    monkeypatch.setattr(objects, "PART_BYTES", 5 * MIB)  # S3 takes none smaller but the last


@pytest.fixture
def place(s3_port: int, request: pytest.FixtureRequest) -> Callable[..., str]:
    folder = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return lambda name, port=s3_port: uri(port, f"transfer/{folder}/{name}")


def put(store: ObjectStore, path: str, content: bytes, folder: Path) -> str:
    (folder / "file").write_bytes(content)
    return store.add_version(path, folder / "file")


@pytest.mark.parametrize(("content", "parts"), [(CONTENT, "-3"), (b"small", ""), (b"", "")])
def test_what_a_store_does_not_copy_goes_through_memory_alone(
    place: Callable[..., str], content: bytes, parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ObjectStore(place("first")), ObjectStore(place("second"))
    sha256 = put(first, "a/b", content, tmp_path)
    monkeypatch.setattr(ObjectStore, "download", lambda *_: pytest.fail("put on a disk"))
    transfer(mirror(first.uri) / "a/b", mirror(second.uri) / "a/b", len(content), sha256)
    stored = second.versions("a")["b"]
    assert stored.sha256 == sha256
    assert second.read(stored.path) == content
    assert stored.e_tag is not None
    assert stored.e_tag.strip('"')[32:] == parts
    assert not mirror(second.uri).exists()


@pytest.mark.parametrize("content", [CONTENT, b"small"])
@pytest.mark.parametrize("how", ["altered", "gone"])
def test_what_is_altered_or_gone_is_not_put(
    place: Callable[..., str], content: bytes, how: str, tmp_path: Path
) -> None:
    first, second = ObjectStore(place("first")), ObjectStore(place("second"))
    sha256, before = put(first, "a/b", content, tmp_path), first.listing("a")
    if how == "gone":
        first.remove("a/b")
    else:
        first.write(first.versions("a")["b"].path, content[:-1] + b"?")
    with pytest.raises(DamagedArtifactError if how == "altered" else FileNotFoundError):
        transfer(mirror(first.uri) / "a/b", mirror(second.uri) / "a/b", len(content), sha256, before)
    assert second.below() == []


def test_two_are_under_way_at_once(place: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ObjectStore(place("first")), ObjectStore(place("second"))
    hashes = [put(first, f"a/{number}", bytes([number]), tmp_path) for number in range(8)]
    upload, lock, running, most = ObjectStore.upload, threading.Lock(), list[int](), list[int]()

    def slow(*arguments: Any) -> None:
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.1)
        upload(*arguments)
        running.pop()

    monkeypatch.setattr(ObjectStore, "upload", slow)
    roots = mirror(first.uri), mirror(second.uri)
    list(by_threads(8, lambda at: transfer(roots[0] / f"a/{at}", roots[1] / f"a/{at}", 1, hashes[at]), range(8)))
    assert max(most) == 2
    assert len(second.versions("a")) == 8


def test_faults_on_either_side_are_tried_away(s3_port: int, place: Callable[..., str], tmp_path: Path) -> None:
    sha256 = put(ObjectStore(place("first")), "a/b", CONTENT, tmp_path)
    with faulty_store(s3_port, share=0.3, pause_s=0.01) as faulty:
        first, second = mirror(place("first", faulty.port)), mirror(place("second", faulty.port))
        transfer(first / "a/b", second / "a/b", len(CONTENT), sha256)
        assert sum(faulty.counts().values()) > 0
    store = ObjectStore(place("second"))
    assert store.read(store.versions("a")["b"].path) == CONTENT
