"""What a process writes after another has taken its run over is refused, and where it slips through is never read."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pf
import pytest
from faulting.s3 import uri
from obstore.exceptions import GenericError
from obstore.store import S3Store
from test_lease import cut_off, quick  # noqa: F401

from emloc_ray.errors import ArtifactError, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store import objects
from emloc_ray.io.store.arrow_files import arrow_files
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.node_cache import discard, ensure, hashes, open_artifact, sizes
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.stages.finetune.finetune import group_checkpoints
from emloc_ray.stages.finetune.job import FinetuneJob

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def begin(s3_port: int, node_cache: Path, request: pytest.FixtureRequest) -> Callable[..., RunDirectory]:
    """Begins the run as another process would, whoever holds it being cut off."""
    place = uri(s3_port, f"takeover/{request.node.name}")
    holders: list[RunDirectory] = []

    def follow(**options: Any) -> RunDirectory:
        for holder in holders:
            assert holder.lease is not None
            cut_off(holder.lease)
        run = RunDirectory(place)
        run.lock()
        holders.append(run)
        run.create({}, **options)
        return run

    return follow


def read(path: Path) -> bytes:
    with open_artifact(path) as (stream, _):
        return stream.read()


def keys(run: RunDirectory) -> set[str]:
    assert run.store is not None
    return {stored.path for stored in run.store.below("emulator")}


def paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker that was stopped right after it looked whose the run is."""
    monkeypatch.setattr(ObjectStore, "checked_manifest", lambda self: {})


def test_a_late_writer_is_told_and_writes_and_removes_nothing(begin: Callable[..., RunDirectory]) -> None:
    late = begin()
    write_bytes(late.path("emulator", "a"), b"early")
    following = begin()
    before = keys(following)
    for write_it in (
        lambda: write_bytes(late.path("emulator", "a"), b"late"),
        lambda: write_bytes(late.path("emulator", "b"), b"late"),
        lambda: discard(late.path("emulator")),
    ):
        with pytest.raises(TakenOver, match="was taken over by another process: leave it to that, or stop that first"):
            write_it()
    assert keys(following) == before
    with pytest.raises(TakenOver):
        ensure(late.path("emulator"))


def test_a_late_write_that_slips_through_is_never_read(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = begin()
    write_bytes(late.path("emulator", "adopted"), b"early")
    following = begin()
    with monkeypatch.context() as patch:
        paused(patch)
        for name in ("adopted", "own", "new"):
            write_bytes(late.path("emulator", name), b"late")
    write_bytes(following.path("emulator", "own"), b"right")
    seen = {path.name: read(path) for path in sizes(following.path("emulator"))}
    assert seen == {"adopted": b"early", "own": b"right"}
    following.commit("factorize", "inputs", [following.path("emulator")], {})
    assert len(keys(following)) == 2  # what is not named has gone
    with monkeypatch.context() as patch:
        paused(patch)
        write_bytes(late.path("emulator", "own"), b"later")
    assert read(following.path("emulator", "own")) == b"right"
    third = begin()
    assert {path.name: read(path) for path in sizes(third.path("emulator"))} == seen
    assert third.is_done("factorize", "inputs")


def test_what_is_written_after_the_commit_is_not_read(begin: Callable[..., RunDirectory]) -> None:
    """As by a worker that was taken for dead and has a successor."""
    run = begin()
    write_bytes(run.path("emulator", "a"), b"right")
    run.commit("factorize", "inputs", [run.path("emulator")], {})
    named = hashes(run.path("emulator"))
    assert run.store is not None
    run.store.write(f"emulator/a/{run.store.lease}.9.{'0' * 64}", b"wrong")
    assert hashes(run.path("emulator")) == named
    assert read(run.path("emulator", "a")) == b"right"
    reader = RunDirectory(run.place)
    assert read(reader.path("emulator", "a")) == b"right"


def test_a_reader_sees_what_is_committed_alone(begin: Callable[..., RunDirectory]) -> None:
    run = begin()
    write_bytes(run.path("emulator", "a"), b"half")
    reader = RunDirectory(run.place)
    assert sizes(reader.path("emulator")) == {}
    run.commit("factorize", "inputs", [run.path("emulator")], {})
    assert sizes(reader.path("emulator")) == {reader.path("emulator", "a"): 4}


def test_two_holders_cannot_both_write_the_manifest(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = begin()
    read_before = late.manifest()
    following = begin()
    monkeypatch.setattr(RunDirectory, "check_held", lambda self: None)  # as one paused right after it
    with pytest.raises(TakenOver, match="was taken over by another process"):
        late._write_manifest(read_before)
    with pytest.raises(TakenOver):
        late.manifest()
    assert following.manifest()["lease"] > read_before["lease"]


def test_a_small_file_of_a_paused_holder_does_not_take_the_place_of_its_successor_s(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    late, check = begin(), ObjectStore.checked_manifest
    late.write_metrics({"seed": 1})
    begun: list[RunDirectory] = []

    def check_and_pause(store: ObjectStore) -> dict[str, Any]:
        manifest = check(store)
        monkeypatch.setattr(ObjectStore, "checked_manifest", check)
        begun.append(begin())
        begun[0].write_metrics({"seed": 2})
        return manifest

    monkeypatch.setattr(ObjectStore, "checked_manifest", check_and_pause)
    with pytest.raises(TakenOver):
        late.write_metrics({"seed": 3})
    assert begun[0].metrics() == {"seed": 2}
    begun[0].write_metrics({"seed": 4})
    assert RunDirectory(late.place).metrics() == {"seed": 4}


def test_what_a_holder_put_last_it_does_not_ask_for(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked, version = begin(), list[str](), ObjectStore.version
    monkeypatch.setattr(ObjectStore, "version", lambda store, path: (asked.append(path), version(store, path))[1])
    for seed in range(3):
        run.write_metrics({"seed": seed})
    assert asked == ["metrics.json"]
    assert run.store is not None
    run.store.write("metrics.json", b"{}")  # as a worker of the same lease would
    run.write_metrics({"seed": 3})
    assert asked == ["metrics.json"] * 2
    assert run.metrics() == {"seed": 3}


@pytest.mark.parametrize("error", [ArtifactError, KeyboardInterrupt])
def test_what_was_being_taken_over_is_taken_over_by_the_next_try(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write_bytes(begin().path("emulator", "a"), b"first")
    write_bytes(begin().path("emulator", "b"), b"second")

    def broken_off(*arguments: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "versions", broken_off)
        for _ in range(2):
            with pytest.raises(error):
                begin()
    run = begin()
    assert {path.name: read(path) for path in sizes(run.path("emulator"))} == {"a": b"first", "b": b"second"}
    assert "adopting" not in run.manifest()


def test_a_fresh_run_adopts_nothing(begin: Callable[..., RunDirectory]) -> None:
    late = begin()
    write_bytes(late.path("emulator", "a"), b"old")
    following = begin(fresh=True)
    assert sizes(following.path("emulator")) == {}
    assert keys(following) == set()


def test_a_node_keeps_its_copies_under_the_next_lease(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin()
    write_bytes(first.path("emulator", "a"), b"content")
    following = begin()
    monkeypatch.setattr(ObjectStore, "download", lambda *_: pytest.fail("fetched again"))
    ensure(following.path("emulator"))
    assert following.path("emulator", "a").read_bytes() == b"content"


def test_a_training_group_writes_below_its_lease_and_goes_on_from_the_last(
    begin: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    (tmp_path / "t" / "checkpoint" / "deep").mkdir(parents=True)
    (tmp_path / "t" / "checkpoint" / "deep" / "state").write_bytes(b"x" * 100)

    def opened(run: RunDirectory) -> tuple[Any, str]:
        found = arrow_files(run.path("training"))
        assert found is not None
        return pickle.loads(pickle.dumps(found[0])), found[1]

    late, at = opened(begin())
    pf.copy_files(str(tmp_path / "t"), f"{at}/t", source_filesystem=pf.LocalFileSystem(), destination_filesystem=late)
    with late.open_output_stream(f"{at}/t/newest.json") as stream:
        stream.write(b"{}")
    following, there = opened(begin())
    assert there != at
    found = following.get_file_info(pf.FileSelector(there, recursive=True))
    assert {info.path.removeprefix(f"{there}/"): info.type for info in found} == {
        "t": pf.FileType.Directory,
        "t/checkpoint": pf.FileType.Directory,
        "t/checkpoint/deep": pf.FileType.Directory,
        "t/checkpoint/deep/state": pf.FileType.File,
        "t/newest.json": pf.FileType.File,
    }
    with following.open_input_stream(f"{there}/t/checkpoint/deep/state") as stream:
        assert stream.read() == b"x" * 100
    with pytest.raises((TakenOver, ArtifactError, OSError)), late.open_output_stream(f"{at}/t/newest.json") as stream:
        stream.write(b"late")
    following.delete_dir(f"{there}/t/checkpoint")
    assert [info.base_name for info in following.get_file_info(pf.FileSelector(f"{there}/t"))] == ["newest.json"]


def test_a_training_group_goes_on_from_whole_copies_alone(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver may be killed while it copies what the one before had."""

    def put(run: RunDirectory, *names: str) -> None:
        found = arrow_files(run.path("training"))
        assert found is not None
        for name in names:
            with found[0].open_output_stream(f"{found[1]}/t/{name}/state") as stream:
                stream.write(b"x")

    job = FinetuneJob(Path("e"), Path("t"), Path("o"), Path("s"), "t", {}, None, "base", 4, 1)
    put(begin(), "checkpoint-1", "checkpoint-2")
    killed = begin()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "write", lambda *_: pytest.fail("after a copy that was cut short"))
        with pytest.raises(pytest.fail.Exception):
            arrow_files(killed.path("training"))
    assert killed.store is not None
    killed.store.delete(killed.store.below(f"training/{killed.store.lease}/t/checkpoint-2"))
    following = begin()
    training = dataclasses.replace(job, storage_dir=following.path("training"))
    assert group_checkpoints(training) == {"checkpoint-1", "checkpoint-2"}
    put(following, "checkpoint-3")
    assert group_checkpoints(training) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_training_group_goes_on_from_files_that_the_store_does_not_copy(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "LARGEST_COPY", 500)
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.0)
    contents = {"t/checkpoint/small": b"s" * 500, "t/checkpoint/large": bytes(range(256)) * 2**12, "t/newest": b"{}"}
    copy, tries = S3Store.copy, itertools.count()

    def limited(store: S3Store, source: str, target: str, **options: Any) -> None:
        if store.head(source)["size"] > 500:
            raise GenericError("copies of so much are refused")
        if next(tries) == 0:
            raise GenericError("503 Slow Down")
        copy(store, source, target, **options)

    monkeypatch.setattr(S3Store, "copy", limited)
    late = arrow_files(begin().path("training"))
    assert late is not None
    for path, content in contents.items():
        with late[0].open_output_stream(f"{late[1]}/{path}") as stream:
            stream.write(content)
    run = begin()
    following = arrow_files(run.path("training"))
    assert following is not None
    files, at = following
    for path, content in contents.items():
        with files.open_input_stream(f"{at}/{path}") as stream:
            assert stream.read() == content
    assert run.store is not None
    assert f"whole-{run.store.lease}" in run.store.names("training")
    files.copy_file(f"{at}/t/checkpoint/large", f"{at}/t/copied")
    with files.open_input_stream(f"{at}/t/copied") as stream:
        assert stream.read() == contents["t/checkpoint/large"]
