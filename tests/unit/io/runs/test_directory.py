"""A run directory: what is refused, what counts as done, and whose it is."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.runs import directory as run_directory
from emloc_ray.io.runs.directory import CONFIG, Kind, RunDirectory
from emloc_ray.io.runs.resume import begun_with, discard_unless
from emloc_ray.io.store import node_copies
from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.digests import digest_of
from emloc_ray.io.store.node_cache import discard
from emloc_ray.io.store.object_store import MANIFEST
from emloc_ray.io.store.places import below


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "mine")
    directory.create({"seed": 0})
    return directory


def artifact(run: RunDirectory, name: str) -> Path:
    path = run.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("contents")
    return path


# Whose directory it is.


@pytest.mark.parametrize("prepare", ["absent", "empty", "only a lock", "killed at its first write"])
def test_a_new_or_empty_directory_is_taken(tmp_path: Path, prepare: str) -> None:
    root = tmp_path / "deep" / "mine"
    if prepare != "absent":
        root.mkdir(parents=True)
    if prepare == "only a lock":
        (root / ".lock").touch()
    if prepare == "killed at its first write":
        (root / f".{MANIFEST}.abc.tmp").write_text("{")
    directory = RunDirectory(f"file://{root}")
    directory.check()
    directory.create({"seed": 3})
    manifest = json.loads((root / MANIFEST).read_text())
    assert manifest["name"] == "mine"
    assert manifest["config"] == {"seed": 3}
    assert manifest["stages"] == {}
    assert (root / CONFIG).read_text() == "seed: 3\n"
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("name", ["thesis.tex", "locksmiths.csv"])
@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_something_else_are_refused_and_kept(tmp_path: Path, fresh: bool, name: str) -> None:
    (tmp_path / name).write_text("years of work")
    directory = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(name)) as caught:
        directory.create({}, fresh=fresh)
    assert str(tmp_path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunDirectory(tmp_path / "mine").check()


@pytest.mark.parametrize("fresh", [False, True])
def test_another_run_s_name_is_refused(run: RunDirectory, fresh: bool) -> None:
    artifact(run, "adapter/a.bin")
    moved = run.root.with_name("theirs")
    shutil.move(run.root, moved)
    with pytest.raises(ConfigError, match="'mine'"):
        RunDirectory(moved).create({}, fresh=fresh)
    assert (moved / "adapter" / "a.bin").is_file()


@pytest.mark.parametrize(("kind", "other"), [("run", "batch"), ("batch", "run")])
def test_a_run_and_a_batch_share_no_directory(tmp_path: Path, kind: Kind, other: Kind) -> None:
    directory = RunDirectory(tmp_path / "mine")
    directory.create({}, kind=kind)
    directory.path("theirs").touch()
    for attempt in (lambda: directory.check(other), lambda: directory.create({}, kind=other, fresh=True)):
        with pytest.raises(ConfigError, match=f"holds a {kind}, no {other}"):
            attempt()
    assert directory.path("theirs").exists()
    directory.create({}, kind=kind)


def test_a_manifest_without_a_kind_is_a_run_s(run: RunDirectory) -> None:
    manifest = run.manifest()
    del manifest["kind"]
    run.path(MANIFEST).write_text(json.dumps(manifest))
    run.check()
    with pytest.raises(ConfigError, match="holds a run, no batch"):
        run.check("batch")


def test_no_or_a_broken_manifest(run: RunDirectory) -> None:
    run.path(MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match=MANIFEST):
        run.manifest()
    run.path(MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=f"holds no {MANIFEST}"):
        run.manifest()


def test_opening_again_keeps_stages_and_takes_the_new_config(run: RunDirectory) -> None:
    run.commit("merge", "abc", [artifact(run, "merged/a")], {})
    run.create({"seed": 9})
    assert run.manifest()["config"] == {"seed": 9}
    assert run.is_done("merge", "abc")


def test_fresh_removes_all_but_the_lock(run: RunDirectory) -> None:
    run.lock()
    run.commit("merge", "abc", [artifact(run, "merged/a")], {})
    run.write_metrics({"seed": 0})
    run.create({"seed": 1}, fresh=True)
    assert {entry.name for entry in run.root.iterdir()} == {CONFIG, MANIFEST, ".lock"}
    assert not run.is_done("merge", "abc")


@pytest.mark.parametrize("inside", ["second", "tries/second"])
def test_fresh_removes_no_other_run(run: RunDirectory, inside: str) -> None:
    second = RunDirectory(run.path(inside))
    second.create({})
    weeks = artifact(second, "adapter/a")
    before = run.manifest()
    with pytest.raises(
        ConfigError, match=rf"holds another run \({inside}/manifest\.json\), which --fresh would remove"
    ):
        run.create({"seed": 1}, fresh=True)
    assert weeks.is_file()
    assert run.manifest() == before
    run.create({"seed": 1})


def test_fresh_removes_no_other_run_in_a_bucket(s3_port: int, node_cache: Path) -> None:
    run = RunDirectory(uri(s3_port, "outer"))
    run.create({})
    second = RunDirectory(below(run.place, "second"))
    second.create({})
    write_text(run.path("model", "manifest.json"), "of a model")
    with pytest.raises(ConfigError, match=r"holds another run \(second/manifest\.json\), which --fresh would remove"):
        run.create({}, fresh=True)
    assert second.manifest()["name"] == "second"


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("removed", range(4))
def test_fresh_that_is_killed_leaves_a_run_with_no_stage_done_which_the_next_try_empties(
    run: RunDirectory, removed: int, fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.commit("correct", "abc", [artifact(run, "adapter/a")], {})
    run.commit("merge", "abc", [artifact(run, "merged/a")], {})
    run.write_metrics({"seed": 0})
    artifact(run, "log.jsonl")
    count = 0

    def killed(path: Path) -> None:
        nonlocal count
        if count == removed:
            raise KeyboardInterrupt
        count += 1
        discard(path)

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            run.create({}, fresh=True)
    run.check()
    assert run.stage("merge") is None
    run.create({"seed": 1}, fresh=fresh)
    assert {entry.name for entry in run.root.iterdir()} == {CONFIG, MANIFEST}
    artifact(run, "merged/a")
    run.create({"seed": 1})
    assert run.path("merged/a").is_file()


def test_leftovers_of_a_killed_write_are_removed(run: RunDirectory) -> None:
    artifact(run, ".adapter.xyz.tmp/half")
    artifact(run, ".manifest.json.abc.tmp")
    run.create({})
    assert {entry.name for entry in run.root.iterdir()} == {CONFIG, MANIFEST}


# What counts as done.


def test_done_by_inputs(run: RunDirectory) -> None:
    assert not run.is_done("factorize", "abc")
    run.commit("factorize", "abc", [artifact(run, "emulator/a"), artifact(run, "emulator/b")], {"wall_s": 3})
    assert run.is_done("factorize", "abc")
    assert not run.is_done("factorize", "abd")
    assert not run.is_done("calibrate", "abc")
    entry = run.stage("factorize")
    assert entry is not None
    assert entry["result"] == {"wall_s": 3}


def test_directories_count_with_every_file_in_them(run: RunDirectory) -> None:
    artifact(run, "emulator/deep/a")
    artifact(run, "emulator/b")
    run.commit("factorize", "abc", [run.path("emulator")], {})
    assert run.is_done("factorize", "abc")
    run.path("emulator", "deep", "a").unlink()
    assert not run.is_done("factorize", "abc")


@pytest.mark.parametrize("name", ["deep/.b.safetensors.1f.tmp", "deep/.nfs01"])
def test_what_is_not_finished_is_no_output(run: RunDirectory, name: str) -> None:
    artifact(run, "emulator/deep/a")
    unfinished = artifact(run, f"emulator/{name}")
    run.commit("factorize", "abc", [run.path("emulator")], {})
    unfinished.unlink()
    assert run.is_done("factorize", "abc")


@pytest.mark.parametrize("damage", ["removed", "cut short", "grown"])
def test_a_damaged_artifact_is_not_done(run: RunDirectory, damage: str) -> None:
    path = artifact(run, "merged/model.safetensors")
    run.commit("merge", "abc", [path], {})
    if damage == "removed":
        path.unlink()
    else:
        path.write_text("content" if damage == "cut short" else "contents and more")
    assert not run.is_done("merge", "abc")


def test_what_runs_have_linked_is_read_once_a_process(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunDirectory(tmp_path / "other")
    other.create({})
    file, link = artifact(run, "emulator/a"), other.path("emulator", "a")
    link.parent.mkdir()
    run.commit("factorize", "abc", [file], {})
    read: list[str] = []
    monkeypatch.setattr(node_copies, "digest_of", lambda stream: (read.append(stream.name), digest_of(stream))[1])
    assert run.damaged("factorize") == []
    link.hardlink_to(file)
    other.commit("factorize", "abc", [link], {})
    assert other.damaged("factorize") == run.damaged("factorize") == []
    assert len(read) == 1
    status = file.stat()
    file.write_text("CONTENTS")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (run.damaged("factorize"), other.damaged("factorize")) == ([file], [link])


@pytest.mark.parametrize(("content", "done"), [("contents", True), ("CONTENTS", False)])
def test_what_another_wrote_into_a_store_since_is_not_done(
    s3_port: int, node_cache: Path, tmp_path: Path, content: str, done: bool
) -> None:
    run = RunDirectory(uri(s3_port, f"since/{content}"))
    run.create({})
    for root, text in ((run.root, "contents"), (tmp_path / "other" / run.root.name, content)):
        write_text(root / "merged" / "model.safetensors", text)
        if root == run.root:
            run.commit("merge", "abc", [run.path("merged")], {})
    assert run.is_done("merge", "abc") == done


def test_forgotten_is_not_done_and_others_stay(run: RunDirectory) -> None:
    run.commit("correct", "c", [artifact(run, "adapter/a")], {})
    run.commit("merge", "m", [artifact(run, "merged/a")], {})
    run.forget("correct")
    run.forget("never ran")
    assert not run.is_done("correct", "c")
    assert run.is_done("merge", "m")
    assert run.stage("correct") is None


def test_a_stage_whose_file_is_missing_is_not_committed(run: RunDirectory) -> None:
    with pytest.raises(FileNotFoundError):
        run.commit("merge", "abc", [run.path("merged", "absent")], {})
    assert not run.is_done("merge", "abc")


def test_what_a_folder_was_begun_with_is_no_part_of_what_is_committed(run: RunDirectory) -> None:
    discard_unless(run.path("emulator"), "inputs")
    artifact(run, "emulator/a")
    run.commit("factorize", "abc", [run.path("emulator")], {})
    assert [*run.stages()["factorize"]["outputs"]] == ["emulator/a"]
    assert begun_with(run.path("emulator"), "inputs")


def test_a_card_is_no_part_of_what_is_committed(run: RunDirectory) -> None:
    """It is written after the stage, and still there where the stage makes again what was lost."""
    artifact(run, "merged/model.safetensors")
    run.path("merged", "README.md").write_text("ours")
    run.commit("merge", "abc", [run.path("merged")], {})
    run.path("merged", "README.md").write_text("edited by its owner")
    assert run.is_done("merge", "abc")
    assert not run.damaged("merge")


def test_a_dropped_stage_stays_done_without_its_files(run: RunDirectory) -> None:
    run.drop("calibrate")  # nothing yet
    file = artifact(run, "calibration/grams")
    run.commit("calibrate", "abc", [file], {"num_tokens": 7})
    assert not run.is_dropped("calibrate")
    for _ in range(2):  # a kill between the manifest and the files leaves some of them
        run.drop("calibrate")
        assert not run.path("calibration").exists()
        assert run.is_dropped("calibrate")
        assert run.is_done("calibrate", "abc")
        assert not run.is_done("calibrate", "other")
        assert run.damaged("calibrate") == []
        artifact(run, "calibration/grams")
    run.commit("calibrate", "abc", [file], {})
    assert not run.is_dropped("calibrate")


@pytest.mark.parametrize("path", ["../theirs/a", "/theirs", "./a", "emulator/../../a"])
def test_a_manifest_that_names_files_outside_of_its_run_is_none(run: RunDirectory, path: str) -> None:
    """Whoever wrote it: a stage that is redone, or dropped, takes what it names with it."""
    kept = artifact(run, "mine")
    run.commit("factorize", "a", [kept], {})
    manifest = run.manifest()
    manifest["stages"]["factorize"]["outputs"] = {path: {"size": 8, "sha256": "0" * 64}}
    run.path("manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest\.json names '.*', which is outside of its run"):
        run.drop("factorize")
    assert kept.is_file()


@pytest.mark.parametrize(
    "wrong",
    [
        {"config": None},
        {"config": {"model": "x"}},
        {"config": {"data": None}},
        {"steps": 5},
        {"lease": "x"},
        {"adopting": "x"},
        {"fresh": "x"},
        {"stages": {"merge": "x"}},
        {"stages": {"merge": {"outputs": None}}},
        {"stages": {"merge": {"outputs": {"a": 1}}}},
        {"stages": {"merge": {"finished_at": "x"}}},
        {"stages": {"merge": {"result": None}}},
    ],
    ids=str,
)
def test_a_manifest_s_parts_are_of_their_kinds(run: RunDirectory, wrong: dict[str, Any]) -> None:
    run.path("manifest.json").write_text(json.dumps({**run.manifest(), **wrong}))
    with pytest.raises(ArtifactError, match=r"manifest\.json is no manifest of a run: name a new or empty directory"):
        run.manifest()
    run.path("manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="is not JSON"):
        run.manifest()


def test_a_moved_parent_keeps_what_is_done(run: RunDirectory, tmp_path: Path) -> None:
    run.commit("merge", "abc", [artifact(run, "merged/a")], {})
    (tmp_path / "elsewhere").mkdir()
    shutil.move(run.root, tmp_path / "elsewhere" / "mine")
    moved = RunDirectory(tmp_path / "elsewhere" / "mine")
    moved.check()
    assert moved.is_done("merge", "abc")


def test_metrics_are_replaced_whole(run: RunDirectory) -> None:
    assert run.metrics() == {}
    run.write_metrics({"evaluation": {"original": 1}, "seed": 0})
    run.write_metrics({"seed": 1})
    assert run.metrics() == {"seed": 1}


@pytest.mark.parametrize(
    "content", ['{"name": "PLACE", "icons": []}', "[]", '"x"', '{"name": "PLACE", "stages": {}, "format": 99}']
)
def test_another_program_s_manifest_is_not_ours_and_fresh_removes_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content.replace("PLACE", tmp_path.name))
    (tmp_path / "code.js").write_text("precious")
    for attempt in (RunDirectory(tmp_path).check, lambda: RunDirectory(tmp_path).create({}, fresh=True)):
        with pytest.raises(ConfigError, match=r"is no manifest of a run: name|has format 99, and"):
            attempt()
    with pytest.raises(ConfigError):
        RunDirectory(tmp_path).existing()
    assert (tmp_path / "code.js").read_text() == "precious"
