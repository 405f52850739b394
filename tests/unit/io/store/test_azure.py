"""Against Azurite, where it is installed: a run on Azure is held by one, and its manifest is replaced by compare-and-swap."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import azure_server
import pytest

from emloc_ray.errors import ConfigError, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store import lease
from emloc_ray.io.store.node_cache import publish
from emloc_ray.io.store.object_store import ObjectStore


@pytest.fixture(scope="module")
def azure_port() -> Iterator[int]:
    with azure_server.azure_server() as port:
        yield port


@pytest.fixture
def place(azure_port: int, node_cache: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azure_server.KEY)
    return azure_server.uri(azure_port, request.node.name)


def test_files_have_versions_and_are_read_by_ranges(place: str, tmp_path: Path) -> None:
    store = ObjectStore(place)
    for content in (b"first", b"second"):
        (tmp_path / "f").write_bytes(content)
        store.add_version("a/b.bin", tmp_path / "f")
    stored = store.versions("a")["b.bin"]
    with store.open(stored) as file:
        file.seek(3)
        assert file.read(2) == b"on"
    assert store.names() == ["a"]
    store.remove("a")
    assert store.versions("a") == {}


def test_what_is_gone_already_keeps_no_other_object(place: str) -> None:
    """The client stops at the first that is missing."""
    store = ObjectStore(place)
    for number in range(10):
        store.write(f"a/{number}", b"x")
    stored = store.below("a")
    store.delete(stored[2:4])
    store.delete(stored)
    assert store.below("a") == []


def test_an_object_is_replaced_by_who_read_it_last(place: str) -> None:
    store = ObjectStore(place)
    first = store.replace("m", b"1", None)
    assert store.replace("m", b"2", None) is None
    second = store.replace("m", b"2", first)
    assert second is not None
    assert store.replace("m", b"3", first) is None
    assert store.read("m") == b"2"


def test_a_run_is_taken_over_from_the_dead_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 2.0)
    first, second = RunDirectory(place), RunDirectory(place)
    first.lock()
    first.create({"seed": 1})
    with pytest.raises(ConfigError, match="is in use by process"):
        second.lock()
    monkeypatch.setattr(lease, "RENEW_S", 60.0)  # it is cut off
    threading.Event().wait(2.5)
    second.lock()
    second.create({"seed": 2})
    (second.path("adapter")).mkdir(parents=True)
    second.path("adapter", "a.bin").write_bytes(b"content")
    publish(second.path("adapter", "a.bin"))
    second.commit("correct", "inputs", [second.path("adapter")], {})
    with pytest.raises(TakenOver):
        first.commit("merge", "inputs", [], {})
    assert list(RunDirectory(place).stages()) == ["correct"]
    second.unlock()
    assert RunDirectory(place).holder() is None
