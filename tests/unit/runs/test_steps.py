"""How a run's steps take what is finished: the keys of a shared cache, and work of other versions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import RecordingReporter, make_values, task_rows, write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.memory import BASE_BYTES
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs import steps as runs_steps
from emloc_ray.runs import versions
from emloc_ray.runs.results import assemble_metrics
from emloc_ray.runs.status import status_lines
from emloc_ray.runs.steps import Steps, cache_key
from emloc_ray.runs.turns import AtOnce
from emloc_ray.runs.versions import check_versions, installed
from emloc_ray.stages.calibrate.stage import CALIBRATE
from emloc_ray.stages.context import Context, Inputs
from emloc_ray.stages.factorize.stage import FACTORIZE
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.stages.stage import Stage
from emloc_ray.stages.tokens.stage import DATA

Versions = dict[str, str]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Versions:
    """What is installed, which a test may change; as it is where left out."""
    changed: Versions = {}
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: changed.get(name) or real(name))
    monkeypatch.setattr(versions, "installed", installed.__wrapped__)
    return changed


@pytest.fixture
def prepared(tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path) -> Prepared:
    prepared = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), task_file)))
    prepared.run.create({})
    return prepared


def finish(prepared: Prepared, *names: str) -> None:
    usage = {"usage": {"wall_s": 1.0, "peak_pss_bytes": 1}, "num_tokens": 1, "num_shards": 1, "splits": {}}
    for stage in STEPS:
        if stage.name in names:
            prepared.run.commit(stage.name, "key", [], usage, versions.made_with(stage))


def made_at_once() -> Stage:
    """A stage of no inputs and no files, which may come from a cache."""
    return replace(
        DATA,
        outputs=(),
        inputs=lambda context: {},
        is_shared=lambda context: True,
        run=lambda *_: {"splits": {}},
        remarks=lambda *_: (),
    )


def refusal(prepared: Prepared, **options: Any) -> str:
    before = prepared.run.manifest()
    with pytest.raises(ConfigError) as refused:
        check_versions(prepared, **options)
    assert prepared.run.manifest() == before
    return str(refused.value)


@pytest.mark.parametrize("package", ["emloc-ray", "torch", "transformers", "peft", "tokenizers"])
def test_another_version_of_a_library_is_another_key_of_the_cache(libraries: Versions, package: str) -> None:
    libraries["torch"] = "2.6.0+cpu"
    libraries[package] = "1.2.3" if package != "torch" else libraries["torch"]
    before = cache_key(FACTORIZE, {"seed": 0})
    libraries[package] = "1.2.9" if package != "torch" else "2.6.1+cu130"
    assert cache_key(FACTORIZE, {"seed": 0}) == before
    libraries[package] = "9.9.0"
    assert cache_key(FACTORIZE, {"seed": 0}) != before


def test_another_format_is_another_key_of_the_cache() -> None:
    assert cache_key(replace(FACTORIZE, format=2), {"seed": 0}) != cache_key(FACTORIZE, {"seed": 0})


def test_what_other_versions_finished_is_refused_with_what_would_be_redone(
    prepared: Prepared, libraries: Versions
) -> None:
    libraries.update(torch="2.6.0", peft="0.17.1")
    finish(prepared, "data", "calibrate", "merge")
    check_versions(prepared)
    libraries.update(torch="2.7.1")
    finish(prepared, "factorize")
    changes = "torch 2.6 (now 2.7)"
    said = (
        f"run_dir {prepared.run.place}: data, calibrate, merge were made with {changes}: give --accept-versions to take"
    )
    redo = "them as they are, or --fresh to redo data, calibrate, factorize, merge."
    assert refusal(prepared) == f"{said} {redo}"
    assert f"data, calibrate were made with {changes}" in refusal(prepared, until="factorize")
    assert "run_dir" not in refusal(prepared, in_batch=True).split(":")[0]  # one line for all tasks that have it
    check_versions(prepared, accept=True)
    finish(prepared, "data")
    assert refusal(prepared).endswith("or emloc-ray run with --from calibrate to redo calibrate, factorize, merge.")
    assert refusal(prepared, forced=["calibrate"]).endswith(
        "it as it is, or emloc-ray run with --from merge to redo merge."
    )
    check_versions(prepared, forced=["calibrate", "factorize", "merge"])


def test_what_other_versions_began_is_refused(prepared: Prepared, libraries: Versions) -> None:
    prepared.run.begin("evaluate", {"torch": "0.1"})  # which a later try begins anew anyhow
    check_versions(prepared)
    prepared.run.begin("finetune", {**versions.made_with(DATA), "peft": "0.1"})
    assert "finetune was made with peft 0.1 (now " in refusal(prepared)
    check_versions(prepared, until="factorize")
    finish(prepared, "finetune")
    assert "finetune" not in prepared.run.begun()
    check_versions(prepared)


def test_what_recorded_no_versions_is_refused(prepared: Prepared) -> None:
    prepared.run.commit("calibrate", "key", [], {})
    assert "calibrate was made with versions that are not recorded: give --accept-versions" in refusal(prepared)


def test_another_format_is_never_accepted(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(prepared, "calibrate")
    monkeypatch.setattr(versions, "STEPS", [replace(CALIBRATE, format=2)])
    monkeypatch.setattr(versions, "up_to", lambda verb: [replace(CALIBRATE, format=2)])
    monkeypatch.setattr(versions, "redone_from", lambda verb: ("calibrate",))
    for accept in (False, True):
        said = refusal(prepared, accept=accept, until="calibrate")
        assert (
            "calibrate was made with format 1 (now 2): emloc-ray run with --from calibrate to redo calibrate." in said
        )
        assert "--accept-versions" not in said


def test_accepted_work_stands_is_told_and_is_not_shared(
    prepared: Prepared, libraries: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    made: list[str] = []

    def make(context: Context, inputs: Inputs, *granted: Any) -> dict[str, Any]:
        made.append(libraries.get("torch", ""))
        context.path("data", "tokens").mkdir(parents=True, exist_ok=True)
        return {"splits": {}}

    stage = replace(DATA, inputs=lambda context: {"seed": 0}, is_shared=lambda context: True, run=make)
    cache = ArtifactCache(str(tmp_path / "cache"))

    def go(stage: Any = stage, accept: bool = False) -> list[str]:
        reporter = RecordingReporter()
        steps = Steps(prepared, reporter, AtOnce(), cache, accept_versions=accept)
        context = Context(prepared, prepared.source.directory)
        for each in (stage, replace(stage, name="calibrate", outputs=(), remarks=lambda context, result: ())):
            steps.run(each, context)
        return reporter.notes

    libraries.update(torch="2.6.0")
    assert go() == []
    prepared.run.forget("calibrate")
    libraries.update(torch="2.7.0")
    with pytest.raises(ConfigError, match=r"data was made with torch 2\.6 \(now 2\.7\): give --accept-versions"):
        go()
    shared = len(cache.entries())
    assert go(accept=True) == [
        "data was made with torch 2.6 (now 2.7): it and what stands after it are taken as they are."
    ]
    assert made == ["2.6.0", "2.6.0", "2.7.0"]
    assert len(cache.entries()) == shared  # what follows from older work is no other run's
    status = "Taken as it is by --accept-versions: data, made with torch 2.6 (now 2.7)."
    assert status in status_lines(prepared.run)
    assert assemble_metrics(prepared.run, prepared)["stages"]["data"]["versions"]["torch"] == "2.6"
    assert go() == []  # once accepted under these versions
    assert made == ["2.6.0", "2.6.0", "2.7.0"]
    libraries.update(torch="2.8.0")
    with pytest.raises(ConfigError, match=r"calibrate were made with torch 2\.6 \(now 2\.8\); torch 2\.7 \(now 2\.8\)"):
        go()


def test_workers_ask_for_the_memory_that_is_planned_where_there_are_several_nodes(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, asked, plan = [{"CPU": 8.0, "memory": 2.0**35}], list[int](), make_plan(STEPS, prepared)
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    monkeypatch.setattr(runs_steps, "autoscaler_nodes", lambda: [])
    monkeypatch.setattr(runs_steps, "live_nodes", lambda: nodes)
    monkeypatch.setattr(runs_steps, "has_unknown_autoscaler", lambda: False)

    def make(context: Context, inputs: Inputs, granted: Resources, *others: Any) -> dict[str, Any]:
        asked.append(granted.memory_per_worker)
        return {"splits": {}}

    stage = replace(DATA, inputs=lambda context: {}, run=make, outputs=(), remarks=lambda *_: ())
    for _ in range(2):
        steps = Steps(prepared, RecordingReporter(), AtOnce(), forced=["data"], plan=plan)
        steps.run(stage, Context(prepared, prepared.source.directory))
        nodes.append(nodes[0])
    planned = plan.host_bytes["data"]
    assert asked[0] == 0
    assert BASE_BYTES < planned <= asked[1] < planned + 2**28


def test_results_tell_what_was_planned_of_a_gpu(prepared: Prepared) -> None:
    plan = make_plan(STEPS, prepared)
    on_gpus = replace(plan, stages=tuple(replace(stage, gpus_per_worker=1.0) for stage in plan.stages))
    Steps(prepared, RecordingReporter(), AtOnce(), plan=on_gpus).write_results()
    metrics = prepared.run.metrics()
    assert metrics["planned_gpu_bytes"] == {stage.name: stage.gpu_bytes for stage in on_gpus.stages}
    assert metrics["planned_gpu_bytes"]["evaluate"] < metrics["planned_memory"]["evaluate"] - BASE_BYTES / 2


def rewritten(path: Path) -> None:
    """Changes a byte, and leaves the size and the time as they were."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def own_rows(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> tuple[Context, Path]:
    """A run that has not begun, and its rows."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))
    prepared = prepare(parse_config(make_values(tmp_path / "run", tiny_model_dir(), rows)))
    return Context(prepared, prepared.source.directory), rows


def test_data_that_changed_since_its_rows_were_counted_is_refused(own_rows: tuple[Context, Path]) -> None:
    context, rows = own_rows
    inputs = DATA.inputs(context)
    rewritten(rows)
    for look in (lambda: DATA.inputs(context), lambda: DATA.run(context, inputs, None, None)):  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"was changed after its rows were counted: run the same command again"):
            look()
    assert not context.path("data").exists()


def test_data_that_changes_while_it_is_read_is_refused(
    own_rows: tuple[Context, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, rows = own_rows
    monkeypatch.setattr("emloc_ray.stages.tokens.tokens.tokenize_data", lambda *_: rewritten(rows))
    with pytest.raises(DataError, match=r"was changed after its rows were counted: run the same command again"):
        DATA.run(context, DATA.inputs(context), Resources(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("trusts", [False, True])
def test_a_model_s_own_code_is_of_this_user(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusts: bool
) -> None:
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    asked: list[tuple[str, bool]] = []

    class Cache(ArtifactCache):
        def find(self, stage: str, key: str, *given: Any, own_only: bool = False, **how: Any) -> Any:
            asked.append((key, own_only))
            return super().find(stage, key, *given, own_only=own_only, **how)

    model = prepared.config.model.model_copy(update={"trust_remote_code": trusts})
    config = prepared.config.model_copy(update={"model": model})
    stage = made_at_once()
    for user in (1, 2):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        run = RunDirectory(tmp_path / f"of {user}")
        run.create({})
        changed = replace(prepared, config=config, run=run)
        Steps(changed, RecordingReporter(), AtOnce(), Cache(str(tmp_path / "cache"))).run(
            stage, Context(changed, prepared.source.directory)
        )
    assert {own_only for _, own_only in asked[::2]} == {trusts}
    assert len({key for key, _ in asked}) == (2 if trusts else 1)
    asked.clear()
    monkeypatch.setattr(Cache, "knows_owners", False)  # as on an object store: nothing would ever be given
    steps = Steps(changed, RecordingReporter(), AtOnce(), Cache(str(tmp_path / "cache")), forced=["data"])
    steps.run(stage, Context(changed, prepared.source.directory))
    assert bool(asked) != trusts


def test_a_model_that_changes_between_two_steps_ends_the_run(
    tiny_model_dir: Callable[..., Path], task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_steps, "shortage", lambda *asked: None)
    model = Path(shutil.copytree(tiny_model_dir(), tmp_path / "model"))
    prepared = prepare(parse_config(make_values(tmp_path / "run", model, task_file)))
    prepared.run.create({})

    def make(context: Context, *granted: Any) -> dict[str, Any]:
        context.path("data", "tokens").mkdir(parents=True, exist_ok=True)
        return {"splits": {}}

    first = replace(DATA, inputs=lambda context: {}, run=make, remarks=lambda context, result: ())
    steps, context = Steps(prepared, RecordingReporter(), AtOnce()), Context(prepared, model)
    steps.run(first, context)
    shard = min(model.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in prepared.run.root.rglob("*")}
    with pytest.raises(ArtifactError, match=r"model was changed while the run read it: run the same command again"):
        steps.run(replace(first, name="calibrate", run=lambda *_: pytest.fail("it ran"), outputs=("made",)), context)
    assert {path: path.stat().st_mtime_ns for path in prepared.run.root.rglob("*")} == before
