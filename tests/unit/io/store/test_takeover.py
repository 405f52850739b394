"""What a process writes after another has taken its run over is refused, and where it slips through is never read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri
from test_lease import cut_off, quick  # noqa: F401

from emloc_ray.errors import ArtifactError, TakenOver
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.node_cache import discard, ensure, hashes, open_newest, sizes
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.stages.finetune.session import LoneSession

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
    with open_newest(path) as (stream, *_):
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


def test_who_takes_a_batch_over_lists_nothing_of_its_tasks(
    begin: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(begin(kind="batch").path("tasks", "a", "emulator", "a"), b"a task's")
    listed: list[str] = []
    below = ObjectStore.below
    monkeypatch.setattr(ObjectStore, "below", lambda self, path="": (listed.append(path), below(self, path))[1])
    assert begin(kind="batch").manifest()["adopted"] == {}
    assert "" not in listed


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


def test_a_stage_that_is_forgotten_goes_on_from_what_an_earlier_holder_wrote(
    begin: Callable[..., RunDirectory],
) -> None:
    first = begin()
    for name in ("a", "b"):
        write_bytes(first.path("emulator", name), b"right")
    first.commit("factorize", "inputs", [first.path("emulator")], {})
    run = begin()
    discard(run.path("emulator", "a"))
    assert run.altered(run.stages()["factorize"]) == [run.path("emulator", "a")]
    run.forget("factorize")
    assert {*sizes(run.path("emulator"))} == {run.path("emulator", "b")}
    write_bytes(run.path("emulator", "a"), b"again")
    run.commit("factorize", "inputs", [run.path("emulator")], {})
    assert run.is_done("factorize", "inputs")
    assert run.manifest()["adopted"] == {}


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


def test_a_training_goes_on_from_what_the_holder_before_kept(
    begin: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    made = tmp_path / "made" / "deep"
    made.mkdir(parents=True)
    (made / "state").write_bytes(b"x" * 100)
    late = LoneSession(begin().path("training", "t"))
    late.save(made.parent, 2)
    following = LoneSession(begin().path("training", "t"))
    with pytest.raises(TakenOver):
        late.save(made.parent, 4)
    with following.checkpoint() as folder:
        assert folder is not None
        assert Path(folder, "deep", "state").read_bytes() == b"x" * 100
    following.save(made.parent, 3)
    assert {file.relative_to(following.directory).as_posix() for file in sizes(following.directory)} == {
        "checkpoint-3/deep/state",
        "newest.json",
    }
