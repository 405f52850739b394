"""A stage's result that a run takes from a cache: it is not read for that, and one that a store has altered is made again."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri
from small_runs import make_values

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import (
    ConfigError,
    DamagedArtifactError,
    DataError,
    EmlocError,
    NumericsError,
    StageError,
    Stopped,
)
from emloc_ray.io.runs.cache import ArtifactCache, Entry, EntryGone
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store import node_cache
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.io.store.digests import digest
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs import run as pipeline
from emloc_ray.runs import steps as runs_steps
from emloc_ray.runs.batch.admission import Admission, Amount
from emloc_ray.runs.batch.begun import Begun
from emloc_ray.runs.batch.work import TaskPlan, TaskTurns
from emloc_ray.runs.reporter import Awaited, Reporter, Reporters
from emloc_ray.runs.steps import Steps, cache_key
from emloc_ray.runs.turns import AtOnce, Turns
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.ray.tasks import Progress, Resources
from emloc_ray.stages.stage import Stage


def stage_of(made: list[str]) -> Stage:
    """A stage that writes a file, and notes its run's name."""

    def write(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
        made.append(context.prepared.run.name)
        write_bytes(context.path("calibration", "a.bin"), b"right")
        return {}

    return Stage(
        name="calibrate",
        title="a file",
        workers=lambda config: config.merge,
        inputs=lambda context: {"seed": 0},
        is_shared=lambda context: True,
        run=write,
        outputs=("calibration",),
    )


@pytest.fixture
def run_stage(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunDirectory]:
    """``run_stage(name, stage, cache, **options)``: runs one stage in a run of that name."""
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    base = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))

    def run(
        name: str,
        stage: Stage,
        cache: ArtifactCache,
        reporter: Reporter | None = None,
        turns: Turns | None = None,
        **options: Any,
    ) -> RunDirectory:
        prepared = replace(base, run=RunDirectory(tmp_path / name))
        prepared.run.create({}, steps=[stage.name])
        steps = Steps(prepared, reporter or Reporter(), turns or AtOnce(), cache, **options)
        steps.run(stage, Context(prepared, base.source.directory))
        return prepared.run

    return run


def test_tasks_link_what_one_has_made_at_the_same_time(
    run_stage: Callable[..., RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, made = ArtifactCache(str(tmp_path / "cache")), list[str]()
    run_stage("first", stage_of(made), cache)
    all_at_once, link = threading.Barrier(3), cache.link

    def link_together(*args: Any) -> list[Path]:
        all_at_once.wait(20)
        return link(*args)

    monkeypatch.setattr(cache, "link", link_together)
    with ThreadPoolExecutor(3) as pool:
        runs = [*pool.map(lambda name: run_stage(name, stage_of(made), cache), "abc")]
    assert made == ["first"]
    assert [run.path("calibration", "a.bin").read_bytes() for run in runs] == [b"right"] * 3


@pytest.mark.parametrize(("failures", "makers"), [(1, ["first"]), (9, ["first", "second"])])
def test_an_entry_that_is_not_given_is_looked_for_once_more_then_made(
    failures: int,
    makers: list[str],
    run_stage: Callable[..., RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, made, tries = ArtifactCache(str(tmp_path / "cache")), list[str](), list[str]()
    run_stage("first", stage_of(made), cache)
    link = cache.link

    def fail(entry: Entry, *args: Any) -> list[Path]:
        tries.append(entry.origin)
        if len(tries) <= failures:
            raise EntryGone("It is gone.")
        return link(entry, *args)

    monkeypatch.setattr(cache, "link", fail)
    run_stage("second", stage_of(made), cache)
    assert (made, tries) == (makers, ["first", "first"])


@pytest.mark.parametrize(
    ("kind", "makers"), [(NumericsError, ["first"]), (DataError, ["first"]), (StageError, ["first", "second"])]
)
def test_what_fails_by_its_inputs_fails_for_all_that_share_it_until_the_next_command(
    kind: type[EmlocError], makers: list[str], run_stage: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    cache, made = ArtifactCache(str(tmp_path / "cache")), list[str]()

    def fail(context: Context, *_: object) -> Result:
        made.append(context.prepared.run.name)
        raise kind("The loss is NaN.")

    failing = replace(stage_of(made), run=fail)
    with pytest.raises(kind, match=r"^The loss"):
        run_stage("first", failing, cache)
    with pytest.raises(kind, match=r"^The loss" if kind is StageError else r"^As in run first: The loss is NaN\.$"):
        run_stage("second", failing, cache)
    assert made == makers
    run_stage("second", replace(stage_of(made), inputs=lambda context: {"seed": 1}), cache)
    run_stage("third", stage_of(made), ArtifactCache(cache.place))
    assert made == [*makers, "second", "third"]


def test_who_waits_for_another_s_work_is_at_that_stage_and_says_so(
    run_stage: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    cache, begun, let_go = ArtifactCache(str(tmp_path / "cache")), threading.Event(), threading.Event()
    heard, waits = list[str | None](), threading.Event()

    class Heard(Reporter):
        def wait(self, stage: str, awaited: Awaited | None = None) -> None:
            heard.append(awaited or stage)
            if awaited == "another":
                waits.set()

        def start(self, stage: str) -> Callable[[int, int], None]:
            heard.append("starts")
            return super().start(stage)

    def work(*args: Any) -> Result:
        begun.set()
        assert let_go.wait(20)
        return stage_of([]).run(*args)

    stage = replace(stage_of([]), run=work)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run_stage, "first", stage, cache)
        try:
            assert begun.wait(20)
            second = pool.submit(run_stage, "second", stage, cache, Reporters(Heard()))
            assert waits.wait(20)
            assert heard == ["calibrate", "another"]
        finally:
            let_go.set()
        first.result(20)
        second.result(20)
    assert heard == ["calibrate", "another", "calibrate", "starts"]


def test_the_task_that_has_begun_a_stage_goes_on_with_it_though_another_comes_first(
    run_stage: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    cache, made, waits = ArtifactCache(str(tmp_path / "cache")), list[str](), threading.Event()
    begun = Begun({"late": {"calibrate": (fingerprint({"seed": 0}), 5.0)}}, lambda task: True)
    admission = Admission()
    admission.update(Amount(cpus=8.0, memory=2.0**40))

    class Heard(Reporter):
        def wait(self, stage: str, awaited: Awaited | None = None) -> None:
            if awaited == "another":
                waits.set()

    def run(name: str) -> RunDirectory:
        turns = TaskTurns(name, 0, admission, TaskPlan(), lambda: False, begun=begun)
        return run_stage(name, stage_of(made), cache, Heard(), turns)

    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(run, "early")
        assert waits.wait(20)
        time.sleep(0.3)  # in which it would take the turn
        pool.submit(run, "late").result(20)
        early.result(20)
    assert made == ["late"]


@pytest.mark.server
def test_what_a_shared_cache_altered_is_made_again_for_all(
    tiny_model_dir: Callable[..., Path],
    task_file: Path,
    tmp_path: Path,
    s3_port: int,
    node_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)  # there is no cluster to look at
    made: list[str] = []
    stage = stage_of(made)
    base = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))
    place = uri(s3_port, "shared-stages/cache")

    def run(name: str) -> tuple[Steps, Context]:
        prepared = replace(base, run=RunDirectory(uri(s3_port, f"shared-stages/{name}")))
        prepared.run.create({}, steps=[stage.name])
        steps = Steps(prepared, Reporter(), AtOnce(), ArtifactCache(place))
        context = Context(prepared, base.source.directory)
        steps.run(stage, context)
        return steps, context

    run("first")
    store, key = ObjectStore(place), cache_key(stage, {"seed": 0})
    [entry] = store.versions(f"calibrate/{key}/files").values()
    store.write(entry.path, b"wrong")
    steps, context = run("second")
    with pytest.raises(DamagedArtifactError) as damaged:
        ensure(context.path("calibration"))
    steps.forget_damaged(damaged.value)
    steps.run(stage, context)
    ensure(context.path("calibration"))
    assert made == ["first", "second"]
    _, context = run("third")
    ensure(context.path("calibration"))
    assert context.path("calibration", "a.bin").read_bytes() == b"right"
    assert made == ["first", "second"]


def test_what_a_run_links_is_not_read_where_files_keep_no_digest(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS 4.1, which has no attributes of users."""

    def refuse(*attribute: object) -> None:
        raise OSError(errno.ENOTSUP, "no attributes")

    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    monkeypatch.setattr(os, "setxattr", refuse)
    base = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))
    read: list[Path] = []
    monkeypatch.setattr(node_cache, "digest", lambda file: (read.append(file), digest(file))[1])
    cache = ArtifactCache(str(tmp_path / "cache"))
    for name, count in (("first", 1), ("second", 1)):
        prepared = replace(base, run=RunDirectory(tmp_path / name))
        prepared.run.create({}, steps=["calibrate"])
        Steps(prepared, Reporter(), AtOnce(), cache).run(stage_of([]), Context(prepared, base.source.directory))
        assert len(read) == count
        assert prepared.run.damaged("calibrate") == []


def test_reading_and_linking_end_once_a_task_is_stopped(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    base = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))
    cache = ArtifactCache(str(tmp_path / "cache"))
    stage, made = stage_of([]), list[str]()
    next_stage = replace(stage_of(made), name="factorize", outputs=("emulator",), is_shared=None)

    def run(name: str, asked: int) -> None:
        """Runs the stage until it was asked so often whether it shall stop."""
        prepared, turns, left = replace(base, run=RunDirectory(tmp_path / name)), AtOnce(), itertools.count(asked, -1)
        prepared.run.create({}, steps=["calibrate"])
        monkeypatch.setattr(turns, "stopped", lambda: next(left) <= 0)
        Steps(prepared, Reporter(), turns, cache).run(stage, Context(prepared, base.source.directory))

    run("first", 9)
    for number, asked in enumerate((0, 1)):  # while the entry is read, and as it is linked
        with pytest.raises(Stopped):
            run(f"second{number}", asked)
        assert not (tmp_path / f"second{number}" / "calibration" / "a.bin").exists()
    steps = Steps(replace(base, run=RunDirectory(tmp_path / "first")), Reporter(), AtOnce(), cache)
    context = Context(steps.prepared, base.source.directory)
    steps.run(stage, context)
    monkeypatch.setattr(steps.turns, "stopped", lambda: True)
    with pytest.raises(Stopped):
        steps.run(next_stage, context)
    assert made == []


def test_a_task_needs_no_disk_for_what_it_links(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))
    shared = {stage.name for stage in STEPS if stage.is_shared is not None}
    bytes_of = {stage.name: stage.disk_bytes for stage in make_plan(STEPS, prepared).stages}
    own = sum(number for name, number in bytes_of.items() if name not in shared)
    free = (own + sum(bytes_of.values())) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - free, free))

    def begin(*_: object) -> None:
        raise Stopped("It begins.")

    monkeypatch.setattr(pipeline, "check_visible", begin)
    cache = ArtifactCache(str(tmp_path / "cache"), is_own=True)
    task: dict[str, Any] = {"prepared": prepared, "cache": cache, "in_batch": pipeline.InBatch(AtOnce(), None, None)}
    with pytest.raises(ConfigError, match="needs about"):
        pipeline.run(prepared.config, **task)
    write_bytes(tmp_path / "made" / "a", b"a")
    files = {"a": {"size": 1, "sha256": digest(tmp_path / "made" / "a")}}
    for name in shared:
        assert cache.add(name, cache.key(name, {}), tmp_path / "made", files, {}, {}) is None
    with pytest.raises(Stopped):
        pipeline.run(prepared.config, **task)
