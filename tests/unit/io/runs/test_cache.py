"""A cache that many runs share: keys, whole entries or none, one maker at a time, room made, in a file system and on S3."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri
from hypothesis import assume, given
from hypothesis import strategies as st

from emloc_ray.io.runs import cache as artifact_cache
from emloc_ray.io.runs.cache import ArtifactCache, EntryGone
from emloc_ray.io.runs.cache_place import MARKER
from emloc_ray.io.store import node_copies, objects, transfer
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.digests import digest, digest_of, noted_digest
from emloc_ray.io.store.node_cache import discard, hashes, mirror, open_newest, sizes
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.objects import ObjectFile

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
        write_bytes(root / path, content)
    return {
        path: {"size": sizes(root / path)[root / path], "sha256": hashes(root / path)[root / path]} for path in contents
    }


def added(cache: ArtifactCache, root: Path, key: str = KEY, contents: dict[str, bytes] = CONTENTS) -> None:
    assert cache.add(STAGE, key, root, made(root, contents), {"rank": 8}, {"ranks": 8}) is None


def held(root: Path, contents: dict[str, bytes] = CONTENTS) -> dict[str, bytes]:
    found = {}
    for path in contents:
        with open_newest(root / path) as (file, *_):
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
    write_bytes(other / "emulator" / "deep" / "b.json", b"of a run that was killed")
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
    with monkeypatch.context() as patch:
        patch.setattr(ObjectFile, "readinto", lambda *_: pytest.fail("read"))
        assert cache.add(STAGE, KEY, mirror(place("bucket", "first")), files, {}, {}) is None
        for of_process in (cache, ArtifactCache(cache.place)):
            entry = of_process.find(STAGE, KEY, verify=True)
            assert entry is not None
            of_process.link(entry, mirror(place("bucket", "second")))
    assert held(mirror(place("bucket", "second"))) == CONTENTS


@pytest.mark.server
def test_a_store_that_cannot_copy_is_read_and_written(
    place: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "LARGEST_COPY", 500)
    cache = ArtifactCache(place("bucket", "shared"))
    added(cache, mirror(place("bucket", "first")))
    entry = cache.find(STAGE, KEY, verify=True)
    assert entry is not None
    cache.link(entry, mirror(place("bucket", "second")))
    assert held(mirror(place("bucket", "second"))) == CONTENTS


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_altered_since_it_was_read_is_read_again(local: ArtifactCache, tmp_path: Path, linked: bool) -> None:
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY, verify=True)
    assert entry is not None
    if linked:
        local.link(entry, tmp_path / "second")
    file = folder(local) / "files" / "emulator" / "a.safetensors"
    before = file.stat()
    file.chmod(0o644)
    file.write_bytes(b"b" * 1000)
    file.chmod(before.st_mode)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert local.find(STAGE, KEY, verify=True) is None
    assert not folder(local).exists()


def test_what_this_process_has_added_or_linked_is_not_read_again(
    local: ArtifactCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added(local, tmp_path / "first")
    read: list[Any] = []

    def counted(stream: Any) -> str:
        read.append(stream)
        return digest_of(stream)

    monkeypatch.setattr(node_copies, "digest_of", counted)
    entry = local.find(STAGE, KEY, verify=True)
    assert entry is not None
    local.link(entry, tmp_path / "own")
    assert read == []  # what it has added itself
    shutil.copytree(local.place, tmp_path / "of another process")
    other = ArtifactCache(str(tmp_path / "of another process"))
    for run in ("second", "third"):
        entry = other.find(STAGE, KEY, verify=True)
        assert entry is not None
        other.link(entry, tmp_path / run)
    assert len(read) == len(CONTENTS)


def test_an_entry_with_files_of_other_stages_goes(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "first")
    assert local.find(STAGE, KEY, verify=True, outputs=["emulator"]) is not None
    entry = json.loads((folder(local) / "entry.json").read_text())
    for path in ("manifest.json", "emulator_healed/a.safetensors"):
        (folder(local) / "files" / path).parent.mkdir(exist_ok=True)
        (folder(local) / "files" / path).write_text("x")
        entry["files"][path] = {"size": 1, "sha256": digest(folder(local) / "files" / path)}
        (folder(local) / "entry.json").write_text(json.dumps(entry))
        assert local.find(STAGE, KEY, verify=True, outputs=["emulator"]) is None
        assert not folder(local).exists()
        del entry["files"][path]
        added(local, tmp_path / path.replace("/", "-"))


def test_an_entry_that_lost_a_file_goes_for_good(local: ArtifactCache, tmp_path: Path) -> None:
    added(local, tmp_path / "first")
    entry = local.find(STAGE, KEY, verify=True)
    assert entry is not None
    (folder(local) / "files" / "emulator" / "a.safetensors").unlink()
    with pytest.raises(EntryGone):
        local.link(entry, tmp_path / "second")
    assert not folder(local).exists()
    assert not any(path.is_file() for path in (tmp_path / "second").rglob("*"))


def test_on_one_file_system_nothing_is_copied(local: ArtifactCache, tmp_path: Path) -> None:
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
    def refuse(*_: Any, **options: Any) -> None:
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
    entry = cache.find(STAGE, KEY, verify=True)
    assert entry is not None
    assert cache.find(STAGE, KEY, verify=True, doubted=True) is None
    with pytest.raises(EntryGone):
        cache.link(entry, root_of(place("folder", "second")))


def test_a_doubted_entry_is_read_whatever_its_times_say(local: ArtifactCache, tmp_path: Path) -> None:
    """As a disk that rots: neither size nor time of the file has changed."""
    added(local, tmp_path / "first")
    file, run = (
        folder(local) / "files" / "emulator" / "a.safetensors",
        tmp_path / "first" / "emulator" / "a.safetensors",
    )
    status = file.stat()
    file.chmod(0o600)
    file.write_bytes(b"b" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    run.unlink()
    assert local.find(STAGE, KEY, verify=True, doubted=True) is None


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
