"""What --from asks to redo is redone once, however often its run is killed on the way; so is what was damaged. A
stage's seconds are those of all its tries."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from small_runs import RecordingReporter, make_values

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ArtifactError, DamagedArtifactError, Stopped
from emloc_ray.io.runs import directory
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.store import node_copies
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.digests import digest_of
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import steps as runs_steps
from emloc_ray.runs.steps import Steps
from emloc_ray.runs.turns import AtOnce
from emloc_ray.stages.calibrate.stage import CALIBRATE
from emloc_ray.stages.context import Context, Inputs
from emloc_ray.stages.ray.tasks import Progress
from emloc_ray.stages.stage import Stage

NAMES = ["calibrate", "factorize", "merge"]


@pytest.fixture
def prepared(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Prepared:
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    monkeypatch.setattr(runs_steps, "assemble_metrics", lambda *measured: {})
    return prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))


class Pipeline:
    """Three stages of two units each, which are kept from one try to the next; all share a cache."""

    def __init__(self, prepared: Prepared, cache: Path) -> None:
        self.prepared, self.resumes, self.notes = prepared, True, list[str]()
        self.cache: ArtifactCache | None = ArtifactCache(str(cache))
        self.takes_s, self.killed_in, self.now, self.noted_s = 0.0, "", 0.0, 0.0
        self.changed: dict[str, Any] = {}

    def stage(self, name: str, made: list[str], stops_in: str) -> Stage:
        def make(context: Context, inputs: Inputs, granted: Any, progress: Progress) -> dict[str, Any]:
            for unit in (1, 2):
                self.now += self.takes_s
                progress(unit, 2)
                if name == self.killed_in:
                    self.noted_s = self.prepared.run.manifest()["tries"][name]["seconds"]
                    raise SystemExit
                if not context.path(name, f"{unit}").exists():
                    if unit == 2 and name == stops_in:
                        raise Stopped(f"{name} was stopped at 1 of 2.")
                    made.append(f"{name} {unit}")
                    write_bytes(context.path(name, f"{unit}"), b"1")
            return {}

        return replace(
            CALIBRATE,
            name=name,
            outputs=(name,),
            resumes=self.resumes,
            scratch=(f"{name}_scratch",),
            inputs=lambda context: {"made": name, **self.changed},
            is_shared=lambda context: True,
            run=make,
            reads=lambda context: (),
            drops=lambda context: (),
            remarks=lambda context, result: (),
        )

    def __call__(self, *redo: str, stops_in: str = "") -> list[str]:
        """The units that a try makes."""
        made: list[str] = []
        run, reporter = self.prepared.run, RecordingReporter()
        run.create({}, steps=NAMES, redo=redo)
        steps, self.notes = Steps(self.prepared, reporter, AtOnce(), self.cache, run.to_redo()), reporter.notes
        context = Context(self.prepared, self.prepared.source.directory)
        try:
            for name in NAMES * 2:
                try:
                    steps.run(self.stage(name, made, stops_in), context)
                except DamagedArtifactError as error:
                    steps.forget_damaged(error)
        except Stopped:
            assert stops_in
        return made


@pytest.fixture
def tries(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    pipeline = Pipeline(prepared, tmp_path / "cache")
    monkeypatch.setattr(runs_steps, "time", SimpleNamespace(monotonic=lambda: pipeline.now))
    return pipeline


def test_what_is_left_of_a_redo_is_redone_by_the_next_try(prepared: Prepared, tries: Pipeline) -> None:
    all_units = [f"{name} {unit}" for name in NAMES for unit in (1, 2)]
    assert tries() == all_units
    assert tries() == []
    assert tries(*NAMES, stops_in="factorize") == all_units[:3]
    assert prepared.run.to_redo() == ["factorize", "merge"]
    assert tries(stops_in="merge") == all_units[3:5]  # past the cache, and from the unit that was in flight
    assert tries() == all_units[5:]
    assert prepared.run.to_redo() == []
    assert tries() == []


def test_asked_again_it_begins_anew(prepared: Prepared, tries: Pipeline) -> None:
    tries()
    tries("factorize", "merge", stops_in="factorize")
    write_bytes(prepared.run.path("factorize_scratch", "step"), b"1")
    assert tries("factorize", "merge", stops_in="factorize") == ["factorize 1"]
    assert not prepared.run.path("factorize_scratch").exists()
    assert tries() == ["factorize 2", "merge 1", "merge 2"]


def test_what_was_left_to_redo_goes_with_a_fresh_start(prepared: Prepared) -> None:
    prepared.run.create({}, steps=NAMES, redo=["merge"])
    assert prepared.run.to_redo() == ["merge"]
    prepared.run.create({}, steps=NAMES, fresh=True)
    assert prepared.run.to_redo() == []


def test_no_file_is_read_twice_to_find_one_that_is_damaged(
    prepared: Prepared, tries: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tries()
    prepared.run.forget("merge")
    prepared.run.path("calibrate", "2").write_bytes(b"0")

    def note(stream: IO[bytes]) -> str:
        read.append(stream.name)
        return digest_of(stream)

    monkeypatch.setattr(node_copies, "digest_of", note)
    assert tries() == ["calibrate 2"]
    assert str(prepared.run.path("calibrate", "2")) in read
    assert len(read) == len(set(read))


@pytest.mark.parametrize("content", [None, b"", b"10", b"0"], ids=["missing", "cut", "grown", "of its size"])
def test_a_file_that_is_missing_or_altered_costs_that_file_alone(
    prepared: Prepared, tries: Pipeline, content: bytes | None
) -> None:
    tries.cache = None
    tries()
    altered = prepared.run.path("factorize", "2")
    altered.unlink()
    if content is not None:
        altered.write_bytes(content)
    prepared.run.forget("merge")  # so that what it builds on is read
    assert tries() == ["factorize 2"]
    assert altered.read_bytes() == b"1"
    assert any("factorize/2" in note for note in tries.notes)
    assert not any("what follows from it" in note for note in tries.notes)


def test_a_stage_that_does_not_go_on_is_made_anew_for_one_file(prepared: Prepared, tries: Pipeline) -> None:
    tries.cache, tries.resumes = None, False
    tries()
    prepared.run.path("factorize", "2").unlink()
    assert tries() == ["factorize 1", "factorize 2"]


def test_what_has_other_inputs_keeps_no_file(prepared: Prepared, tries: Pipeline) -> None:
    tries.cache = None
    tries()
    prepared.run.path("factorize", "2").unlink()
    tries.changed = {"another": "config"}
    assert tries() == [f"{name} {unit}" for name in NAMES for unit in (1, 2)]


def test_a_damaged_file_goes_before_its_stage_is_forgotten(
    prepared: Prepared, tries: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries()
    steps = Steps(prepared, RecordingReporter(), AtOnce())
    with monkeypatch.context() as patch:
        patch.setattr(runs_steps, "discard", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps.forget_damaged(DamagedArtifactError("It has changed.", "calibrate/2"))
    assert prepared.run.stage("calibrate") is not None


def test_a_store_that_does_not_answer_while_a_stage_is_at_work_does_not_end_it(
    prepared: Prepared, tries: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def check_held(run: directory.RunDirectory) -> None:
        asked.append(inspect.stack()[1].function)
        if asked[-1] == "progress":
            raise ArtifactError("s3://b does not write lock.")

    monkeypatch.setattr(directory.RunDirectory, "check_held", check_held)
    assert len(tries()) == asked.count("progress") == 6


def test_a_stage_s_seconds_are_those_of_all_its_tries(prepared: Prepared, tries: Pipeline) -> None:
    tries.takes_s = 10.0
    tries(stops_in="factorize")
    tries(stops_in="factorize")
    tries.takes_s = 1.0
    tries()
    took = {name: entry["result"]["usage"]["wall_s"] for name, entry in prepared.run.stages().items()}
    assert took == {"calibrate": 20.0, "factorize": 42.0, "merge": 2.0}
    tries("factorize", stops_in="factorize")
    tries.changed = {"another": "config"}
    tries()
    assert prepared.run.stages()["factorize"]["result"]["usage"]["wall_s"] == 2.0


def test_a_try_that_is_killed_has_noted_its_seconds(prepared: Prepared, tries: Pipeline) -> None:
    tries.takes_s, tries.killed_in = 70.0, "calibrate"
    with pytest.raises(SystemExit):
        tries()
    assert tries.noted_s == 70.0
    tries.takes_s, tries.killed_in = 1.0, ""
    tries()
    assert prepared.run.stages()["calibrate"]["result"]["usage"]["wall_s"] == 72.0
