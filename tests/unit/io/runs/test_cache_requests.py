"""What a cache on an object store asks of it."""

# ruff: noqa: F811

from __future__ import annotations

from collections.abc import Callable

import pytest
from test_cache import KEY, STAGE, held, made, place  # noqa: F401

from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store import object_store
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.io.store.object_store import named_files
from emloc_ray.io.store.objects import Objects

CONTENTS = {f"emulator/{number}": bytes([number]) * 10 for number in range(100)}


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is listed from here on."""
    paths: list[str] = []
    below = Objects.below
    monkeypatch.setattr(Objects, "below", lambda store, path="": (paths.append(path), below(store, path))[1])
    return paths


@pytest.mark.server
def test_an_entry_s_files_are_listed_together(place: Callable[..., str], listed: list[str]) -> None:
    cache = ArtifactCache(place("bucket", "shared"))
    first, second = (mirror(place("bucket", name)) for name in ("first", "second"))
    files = made(first, CONTENTS)
    listed.clear()
    assert cache.add(STAGE, KEY, first, files, {}, {}) is None
    assert len(listed) < 10
    entry = cache.find(STAGE, KEY, verify=True)
    assert entry is not None
    listed.clear()
    cache.link(entry, second)
    assert sorted(listed) == ["emulator", f"{STAGE}/{KEY}/files/emulator"]
    assert held(second, CONTENTS) == CONTENTS


@pytest.mark.server
def test_a_manifest_is_gone_through_once(place: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(place("bucket", "run"))
    run.create({})
    made(run.root, CONTENTS)
    run.commit(STAGE, "inputs", [run.path("emulator")], {})
    read: list[int] = []
    monkeypatch.setattr(object_store, "named_files", lambda manifest: (read.append(1), named_files(manifest))[1])
    reader = RunDirectory(run.place)
    assert held(reader.root, CONTENTS) == CONTENTS
    assert len(read) <= 2  # as it is parsed, and for the first file
