"""A run brought home: whole or in parts, gone on from, never mixed with another."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from faulting.s3 import uri

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fetch import fetch
from emloc_ray.io.store.atomic import write_bytes, write_text
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.places import below


@pytest.fixture
def run(s3_port: int, node_cache: Path, request: pytest.FixtureRequest) -> RunDirectory:
    found = RunDirectory(uri(s3_port, f"fetch/{request.node.name}"))
    found.create({"a": 1})
    for name in ("merged/model.safetensors", "adapter/adapter_config.json", "data/tokens/train/shard-0"):
        write_text(found.path(*name.split("/")), name)
    return found


def test_a_run_comes_whole(run: RunDirectory, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    fetch(run, tmp_path / "home", progress=lambda done, total: told.append((done, total)))
    files = sorted(f.relative_to(tmp_path / "home").as_posix() for f in (tmp_path / "home").rglob("*") if f.is_file())
    assert files == [
        "adapter/adapter_config.json",
        "config.yaml",
        "data/tokens/train/shard-0",
        "manifest.json",
        "merged/model.safetensors",
    ]
    assert (tmp_path / "home" / "merged" / "model.safetensors").read_bytes() == b"merged/model.safetensors"
    assert told[-1][0] == told[-1][1] > 0
    assert RunDirectory(tmp_path / "home").manifest() == run.manifest()


def test_a_part_comes_alone_and_what_is_there_stays(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(run, tmp_path, ["adapter"]) == [tmp_path / "adapter" / "adapter_config.json"]
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(b"spoilt")
    assert fetch(run, tmp_path, ["adapter"]) == [tmp_path / "adapter" / "adapter_config.json"]
    monkeypatch.setattr(ObjectStore, "download", lambda *_: pytest.fail("fetched again"))
    assert fetch(run, tmp_path, ["adapter"]) == []


def test_what_is_to_be_left_out_does_not_come(run: RunDirectory, tmp_path: Path) -> None:
    assert fetch(run, tmp_path, ["adapter"], leave_out=lambda name: name == "adapter/adapter_config.json") == []


def test_weights_that_the_run_no_longer_holds_are_removed(run: RunDirectory, tmp_path: Path) -> None:
    fetch(run, tmp_path)
    (tmp_path / "merged" / "notes.md").write_text("mine")
    assert run.store is not None
    run.store.remove("merged")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*shards, "model.safetensors.index.json"):
        write_text(run.path("merged", name), name)
    sentences: list[str] = []
    fetch(run, tmp_path, ["merged"], tell=sentences.append)
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {
        *shards,
        "model.safetensors.index.json",
        "notes.md",
    }
    assert sentences == [f"Removed from {tmp_path} what the run no longer holds: merged/model.safetensors."]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_fetch_that_is_broken_off_leaves_no_half_manifest(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(run, tmp_path)
    whole = (tmp_path / "manifest.json").read_bytes()
    write = Path.write_bytes

    def broken_off(path: Path, content: bytes) -> int:
        write(path, content[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", broken_off)
        with pytest.raises(KeyboardInterrupt):
            fetch(run, tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == whole
    (tmp_path / "manifest.json").write_bytes(whole[:9])  # as an older version leaves it
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read: remove it alone, where a fetch of this run"):
        fetch(run, tmp_path)


def test_a_part_may_be_called_other_than_its_folder(run: RunDirectory, tmp_path: Path) -> None:
    write_text(run.path("adapter_finished", "adapter_config.json"), "later")
    [file] = fetch(run, tmp_path, ["adapter"], folder=lambda _, part: f"{part}_finished")
    assert file == tmp_path / "adapter_finished" / "adapter_config.json"
    assert not (tmp_path / "adapter").exists()


def test_refusals(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no adaptor \(it has adapter, config\.yaml"):
        fetch(run, tmp_path / "new", ["adaptor"])
    RunDirectory(tmp_path / "other").create({})
    with pytest.raises(ConfigError, match="holds another run"):
        fetch(run, tmp_path / "other")
    with pytest.raises(ConfigError, match="is in a file system already"):
        fetch(RunDirectory(tmp_path / "other"), tmp_path / "new")


@pytest.mark.parametrize("name", ["outside", "a/../../outside"], ids=["up", "down_and_up"])
def test_a_name_that_leads_out_is_refused(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert run.store is not None
    [info] = run.store.versions("adapter").values()
    monkeypatch.setattr(ObjectStore, "versions", lambda *_: {f"../{name}": info})
    monkeypatch.setattr(ObjectStore, "names", lambda *_: ["adapter"])
    with pytest.raises(ArtifactError, match="leads out of"):
        fetch(run, tmp_path / "home")
    assert not (tmp_path / "outside").exists()


def test_a_batch_comes_with_all_its_tasks(s3_port: int, node_cache: Path, tmp_path: Path) -> None:
    batch = RunDirectory(uri(s3_port, "fetch/batch"))
    batch.create({}, kind="batch")
    for name in ("first", "second", "late"):
        task = RunDirectory(below(batch.place, "tasks", name))
        if name != "late":  # which has not begun
            task.create({"name": name})
        for place in ("adapter/adapter_config.json",) if name == "first" else ("data/shard-0",):
            write_text(task.path(*place.split("/")), name)
    write_bytes(batch.path("cache", "factorize", "emulator"), b"shared")
    fetch(batch, tmp_path / "home")
    files = sorted(f.relative_to(tmp_path / "home").as_posix() for f in (tmp_path / "home").rglob("*") if f.is_file())
    of_tasks = [
        *(f"tasks/first/{name}" for name in ("adapter/adapter_config.json", "config.yaml", "manifest.json")),
        *(f"tasks/second/{name}" for name in ("config.yaml", "data/shard-0", "manifest.json")),
    ]
    assert files == ["config.yaml", "manifest.json", *of_tasks]
    sentences: list[str] = []
    fetch(batch, tmp_path / "part", ["adapter"], tell=sentences.append)
    assert sentences == ["Left out 2 tasks without an up-to-date adapter: late, second."]
    assert (tmp_path / "part" / "tasks" / "first" / "adapter").is_dir()
    assert not (tmp_path / "part" / "tasks" / "second").exists()

    def unless_first(run: RunDirectory, part: str) -> str:
        if run.name == "first":
            raise ConfigError("It is out of date.")
        return part

    with pytest.raises(ConfigError, match=r"No task of .* holds adapter yet"):
        fetch(batch, tmp_path / "none", ["adapter"], folder=unless_first)
    with pytest.raises(ConfigError, match=r"No task of .* holds merged yet"):
        fetch(batch, tmp_path / "none", ["merged"])


def test_what_has_not_begun_is_left_where_a_fetch_is_interrupted(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        write_text(run.path("merged", f"{number:02d}"), str(number))
    begun, go_on = list[Path](), threading.Event()

    def download(store: ObjectStore, stored: object, target: Path) -> None:
        begun.append(target)
        if len(begun) > 1:
            go_on.wait(10)
        target.write_bytes(b"")

    def interrupt(done: int, total: int) -> None:
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(ObjectStore, "download", download)
    with pytest.raises(KeyboardInterrupt):
        fetch(run, tmp_path, ["merged"], progress=interrupt)
    assert len(begun) < 20
