"""Against a real S3 server: versions, retries, what is cut short, what cannot be reached."""

from __future__ import annotations

import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import BUCKET, faulty_store, uri
from obstore.store import LocalStore, S3Store

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.store import objects
from emloc_ray.io.store.digests import digest
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.places import is_store_uri


@pytest.fixture
def store(s3_port: int, request: pytest.FixtureRequest) -> ObjectStore:
    return ObjectStore(uri(s3_port, f"store/{request.node.name}"))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_uri_with_a_scheme_is_a_store() -> None:
    assert [is_store_uri(p) for p in ("s3://b/r", "gs://b/r", "file:///r", "/r", "r")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """Where tests run in the background, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_does_not_wait_for_a_store_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, heard_ctrl_c: None
) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    over, in_time = threading.Event(), list[bool]()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def interrupt() -> None:
            with server.accept()[0]:
                os.kill(os.getpid(), signal.SIGINT)
                in_time.append(over.wait(10))

        asked = threading.Thread(target=interrupt)
        asked.start()
        store = objects.Objects(uri(server.getsockname()[1], "run"), timeout_s=12)
        with pytest.raises(KeyboardInterrupt):
            store.read("manifest.json")
        over.set()
        asked.join()
    assert in_time == [True]


@pytest.mark.parametrize("gone", [[0], [29], [3, 4, 17], list(range(30))])
def test_what_is_gone_already_keeps_no_other_object(gone: list[int], tmp_path: Path) -> None:
    """Google Cloud and Azure are asked for one after another, and the client stops at the first that is missing, as here."""
    store: Any = objects.Objects("s3://bucket/run")
    store.client = LocalStore(tmp_path)
    for number in range(30):
        store.write(f"a/{number:02d}", b"x")
    stored = store.below("a")
    for number in gone:
        (tmp_path / "run" / "a" / f"{number:02d}").unlink()
    client, asked = store.client, list[Any]()

    class Counted:
        list = client.list

        def delete(self, keys: Any) -> None:
            asked.append(keys)
            client.delete(keys)

    store.client = Counted()
    store.delete(sorted(stored, key=lambda one: one.path))
    assert store.below("a") == []
    assert len(asked) <= 10  # one each time that the list was behind what the client still removed


def test_a_new_version_takes_the_place_of_the_old(store: ObjectStore, tmp_path: Path) -> None:
    first = store.add_version("a/b.bin", written(tmp_path / "f", b"first"))
    assert {name: info.sha256 for name, info in store.versions("a").items()} == {"b.bin": first}
    second = store.add_version("a/b.bin", written(tmp_path / "f", b"second"))
    assert {name: info.sha256 for name, info in store.versions("a/b.bin").items()} == {"": second}
    assert second == digest(tmp_path / "f")
    assert store.names() == ["a"]
    store.download(store.versions("a")["b.bin"], tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"second"
    with store.open(store.versions("a")["b.bin"]) as file:
        file.seek(3)
        assert file.read(2) == b"on"
    store.remove("a")
    assert store.versions("a") == {}


def test_the_same_content_is_not_written_twice(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_version("a", written(tmp_path / "f", b"same"))
    monkeypatch.setattr(S3Store, "put", lambda *_, **options: pytest.fail("written again"))
    store.add_version("a", tmp_path / "f")


def test_what_marks_a_folder_is_no_file(s3_port: int, request: pytest.FixtureRequest) -> None:
    """Consoles and Spark write an empty object whose key ends in a slash, which clients take off."""
    place = f"store/{request.node.name}"
    store = objects.Objects(uri(s3_port, place))
    for key in ("", "data/", "data/deep/"):
        mark = urllib.request.Request(f"http://127.0.0.1:{s3_port}/{BUCKET}/{place}/{key}", b"", method="PUT")
        with urllib.request.urlopen(mark) as answer:
            assert answer.status == 200
    assert store.names() == ["data"]
    store.write("data/deep/empty", b"")
    store.write("data/rows.jsonl", b"{}")
    assert sorted(store.files("")) == ["data/deep/empty", "data/rows.jsonl"]
    assert sorted(store.names("data")) == ["deep", "rows.jsonl"]


def test_a_bucket_of_another_region_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def redirect() -> None:
            with server.accept()[0] as asked:
                asked.recv(65536)
                asked.sendall(b"HTTP/1.1 301 Moved Permanently\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=redirect, daemon=True).start()
        store = objects.Objects(uri(server.getsockname()[1], "run"))
        with pytest.raises(ConfigError, match=r"the bucket is in another region: .*AWS_REGION"):
            store.read("manifest.json")


@pytest.mark.parametrize("place", ["s3://b/a#b", "s3://b/a//b", "s3://b/./a", "s3://b/a/../b"])
def test_a_place_whose_names_are_none_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="is no place that obstore can open"):
        objects.Objects(place)
    with pytest.raises(ConfigError, match=r"run_dir s3://b/.* (is no place|holds a #)"):
        mirror(place)


def test_a_name_is_no_prefix_of_another(store: ObjectStore, tmp_path: Path) -> None:
    for name in ("shard-1", "shard-10"):
        store.add_version(f"a/{name}", written(tmp_path / "f", name.encode()))
    assert list(store.versions("a/shard-1")) == [""]
    store.remove("a/shard-1")
    assert list(store.versions("a")) == ["shard-10"]


def test_altered_content_is_found_when_it_is_read(store: ObjectStore, tmp_path: Path) -> None:
    store.add_version("a/f", written(tmp_path / "f", b"content"))
    info = store.versions("a")["f"]
    store.write(info.path, b"altered")
    with pytest.raises(ArtifactError, match="cut short or altered"):
        store.download(info, tmp_path / "back")


def test_a_full_disk_is_told_at_once_and_is_not_the_store_s(store: ObjectStore, tmp_path: Path) -> None:
    store.add_version("a/f", written(tmp_path / "f", b"content"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        store.download(store.versions("a")["f"], Path("/dev/full"))


def test_faults_are_tried_away(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.01)
    content = bytes(range(256)) * 4096
    with faulty_store(s3_port, share=0.3, pause_s=0.01) as faulty:
        store = ObjectStore(uri(faulty.port, "faults/run"))
        for number in range(6):
            store.add_version(f"a/{number}", written(tmp_path / "f", content + bytes([number])))
        assert sorted(store.versions("a")) == [str(number) for number in range(6)]
        for name, info in store.versions("a").items():
            store.download(info, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == content + bytes([int(name)])
        assert min(faulty.counts().values()) > 0


def test_a_store_out_of_reach_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    store = ObjectStore(uri(1, "nowhere"))
    with pytest.raises(ArtifactError, match=r"does not read manifest\.json .* run the same command again"):
        store.read("manifest.json")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://key:secret@bucket/run", "holds credentials"),
        ("s3://bucket/run?regoin=x", "unknown option regoin"),
        ("az://bucket/run?sas=secret", "unknown option sas"),
        ("what://bucket/run", "no place that obstore can open"),
    ],
)
def test_bad_places(place: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        ObjectStore(place)
    assert "secret" not in str(error.value)


def test_two_threads_that_ask_for_a_manifest_as_it_changes_both_see_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked, answer = ObjectStore(uri(9, "run")), threading.Event(), threading.Event()
    now: list[tuple[Any, bytes]] = [({"e_tag": "1"}, b'{"stages": {"calibrate": {}}}')]

    def read_version(path: str, known: Any = None) -> tuple[Any, bytes]:
        version, content = now[-1]
        if threading.current_thread().name == "late":  # its answer is on its way
            asked.set()
            answer.wait(10)
        return version, b"" if known == version else content

    monkeypatch.setattr(store, "read_version", read_version)
    store.checked_manifest()
    seen: list[Any] = []
    late = threading.Thread(name="late", target=lambda: seen.append(store.checked_manifest()))
    late.start()
    assert asked.wait(10)
    now.append(({"e_tag": "2"}, b'{"stages": {"calibrate": {}, "merge": {}}}'))
    assert list(store.checked_manifest()["stages"]) == ["calibrate", "merge"]
    answer.set()
    late.join()
    assert list(seen[0]["stages"]) == ["calibrate"]
    assert list(store.checked_manifest()["stages"]) == ["calibrate", "merge"]
