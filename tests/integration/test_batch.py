"""Six tasks on one Ray: what they share is made once, what breaks breaks alone, and again redoes no more than that."""

from __future__ import annotations

import filecmp
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import act_in_training, make_values, run_values, task_rows, write_jsonl
from test_failing_runs import poison

from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.batch.driver import check_fit, prepare_batch, run_batch
from emloc_ray.runs.batch.state import BatchState, TaskState, cancel
from emloc_ray.runs.batch.summary import write_summary
from emloc_ray.runs.batch.tasks import read_batch
from emloc_ray.runs.log import read_events
from emloc_ray.ui.page import PageReporter

ONE = {"num_workers": 1}
NUM_GOOD = 4
SMALL = 0.25


def base_values(root: Path, model_dir: Path, data: Path) -> dict[str, Any]:
    """One worker a stage, and little of everything."""
    values = make_values(
        root / "unused",
        model_dir,
        data,
        calibration=ONE,
        emulator=ONE,
        finetune={**ONE, "max_steps": 3, "save_steps": 1},
        merge=ONE,
        evaluation={**ONE, "num_samples": 8, "num_exact_match": 0, "num_generations": 0},
    )
    del values["run_dir"]
    return values


def write_batch(root: Path, base: dict[str, Any], tasks: list[dict[str, Any]]) -> Path:
    (root / "base.yaml").write_text(write_yaml(base))
    batch = {"base": "base.yaml", "run_dir": str(root / "many"), "tasks": tasks}
    (root / "batch.yaml").write_text(write_yaml(batch))
    return root / "batch.yaml"


def run(path: Path, **options: Any) -> BatchState:
    prepared = prepare_batch(read_batch(path), reporter=PageReporter())
    state = run_batch(prepared, accept_changes=True, **options)
    write_summary(prepared.run, state)
    return state


def named(state: BatchState) -> dict[str, TaskState]:
    return {task.name: task for task in state.tasks}


@pytest.fixture(scope="module")
def batch_file(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path], task_file: Path
) -> Path:
    """Four good tasks, a row without a completion, a weight that is no number."""
    root = tmp_path_factory.mktemp("batch")
    poisoned = root / "poisoned"
    shutil.copytree(tiny_model_dir("llama"), poisoned)
    poison(poisoned, "model.layers.0.mlp.gate_proj.weight")
    bad = write_jsonl(root / "bad.jsonl", [*task_rows(1100), {"prompt": "a prompt and no more"}])
    tasks: list[dict[str, Any]] = [
        {"name": f"t{number}", "finetune.learning_rate": 1e-3 * (number + 1)} for number in range(NUM_GOOD)
    ]
    for task in tasks[:1]:
        task["emulator.compression_ratio"] = SMALL
    tasks += [{"name": "bad-row", "data.train.path": str(bad)}, {"name": "poisoned", "model.source": str(poisoned)}]
    return write_batch(root, base_values(root, tiny_model_dir("llama"), task_file), tasks)


@pytest.fixture(scope="module")
def ended(batch_file: Path) -> BatchState:
    """The batch run once, with a training's worker killed on the way."""
    with pytest.MonkeyPatch.context() as patched:
        act_in_training(patched, "finetune", 2, batch_file.parent / "killed")
        return run(batch_file)


def test_broken_tasks_end_alone_with_their_reasons(ended: BatchState, batch_file: Path) -> None:
    tasks = named(ended)
    assert {name for name, task in tasks.items() if task.status == "failed"} == {"bad-row", "poisoned"}
    assert all(tasks[f"t{number}"].status == "done" for number in range(NUM_GOOD))
    assert f"{batch_file.parent / 'bad.jsonl'}, row 1101: no field 'completion'" in (tasks["bad-row"].reason or "")
    assert "model.layers.0.mlp.down_proj reads hold NaN or Inf" in (tasks["poisoned"].reason or "")
    # The killed worker cost its task a few steps and nobody else anything.
    told = [
        event["message"]
        for number in range(NUM_GOOD)
        for event in read_events(RunDirectory(batch_file.parent / "many" / "tasks" / f"t{number}"))
        if "lost its worker" in event["message"]
    ]
    assert len(told) == 1
    assert "the training lost its worker because its process crashed or was killed; restarted (1 of 3)" in told[0]


def test_what_tasks_share_is_made_once(ended: BatchState) -> None:
    good = [task for task in ended.tasks if task.status == "done"]
    made = {stage: sum(stage not in task.taken for task in good) for stage in ("data", "calibrate", "factorize")}
    assert made == {"data": 1, "calibrate": 1, "factorize": 2}  # an emulator of each ratio


def test_losses_and_the_summary_are_those_of_the_runs(ended: BatchState, batch_file: Path) -> None:
    import pyarrow.parquet as pq

    table = {row["name"]: row for row in pq.read_table(batch_file.parent / "many" / "summary.parquet").to_pylist()}
    assert set(table) == {task.name for task in ended.tasks}
    for name, task in named(ended).items():
        assert (table[name]["status"], table[name]["reason"]) == (task.status, task.reason)
        if task.status == "done":
            metrics = json.loads((batch_file.parent / "many" / "tasks" / name / "metrics.json").read_text())
            assert table[name]["served_loss"] == metrics["evaluation"]["merged"]["loss"]
            assert table[name]["train_loss"] == metrics["finetune"]["train_loss"]


def test_again_no_more_is_tried_than_what_failed(ended: BatchState, batch_file: Path) -> None:
    again = run(batch_file)
    assert {task.name: task.status for task in again.tasks} == {task.name: task.status for task in ended.tasks}
    for task in again.tasks:
        events = read_events(RunDirectory(batch_file.parent / "many" / "tasks" / task.name))
        begin = max(number for number, event in enumerate(events) if event["event"] == "run_started")
        started = [event["stage"] for event in events[begin:] if event["event"] == "started"]
        assert started == {"bad-row": ["data"], "poisoned": ["calibrate"]}.get(task.name, []), task.name


def test_a_task_ends_with_the_files_of_a_run_of_its_own(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    base = base_values(tmp_path, tiny_model_dir("llama"), task_file)
    state = run(write_batch(tmp_path, base, [{"name": "first"}, {"name": "second"}]))
    assert {task.status for task in state.tasks} == {"done"}
    assert sorted(stage for task in state.tasks for stage in task.taken) == ["calibrate", "data", "factorize"]
    run_values({**base, "run_dir": str(tmp_path / "alone")})
    for task in ("first", "second"):
        for folder in ("emulator", "adapter_emulator", "adapter", "merged"):
            ours, own = tmp_path / "many" / "tasks" / task / folder, tmp_path / "alone" / folder
            names = sorted(path.name for path in own.rglob("*.safetensors"))
            assert names == sorted(path.name for path in ours.rglob("*.safetensors"))
            for file in own.rglob("*.safetensors"):
                assert filecmp.cmp(file, ours / file.relative_to(own), shallow=False), file


def test_a_training_that_is_cancelled_leaves_off_with_a_checkpoint(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    base = base_values(tmp_path, tiny_model_dir("llama"), task_file)
    # Neither its logged steps nor its checkpoints would come in time: it is asked, and says where it was.
    long = {f"finetune.{key}": 100_000 for key in ("max_steps", "save_steps", "logging_steps")}
    tasks: list[dict[str, Any]] = [{"name": "long", **long}, {"name": "short", "priority": -1}]
    path = write_batch(tmp_path, base, tasks)
    asked = threading.Event()

    def cancel_once(state: BatchState) -> None:
        begun = list((tmp_path / "many" / "tasks" / "long" / "training").glob("*.begun"))
        if begun and not asked.is_set():
            asked.set()
            assert cancel(RunDirectory(tmp_path / "many"), ["long"])

    state = run(path, show=cancel_once)
    assert {task.name: task.status for task in state.tasks} == {"long": "cancelled", "short": "done"}
    training = tmp_path / "many" / "tasks" / "long" / "training"
    assert len(list(training.rglob("newest.json"))) == 1
    # Cancelled it stays, until somebody says otherwise.
    assert named(run(path))["long"].status == "cancelled"


def test_what_the_cluster_could_never_run_is_told_before_anything_starts(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    base = {**base_values(tmp_path, tiny_model_dir("llama"), task_file), "ray": {"address": "auto"}}
    tasks: list[dict[str, Any]] = [
        {"name": "wide", "finetune.num_workers": 5},
        {"name": "large", "emulator.cpus_per_worker": 3},
        {"name": "good"},
    ]
    path = write_batch(tmp_path, base, tasks)
    with pytest.raises(ConfigError) as caught:
        run(path)
    wide, large = sorted(str(caught.value).split("\n"), reverse=True)
    assert wide.startswith("task wide: finetune starts 5 workers at once,")
    assert "the cluster's nodes hold 2 of them" in wide
    assert large.startswith(
        "task large: factorize asks for 3 CPUs and 0 GPUs a worker, and the cluster's largest nodes have 2 CPUs"
    )
    assert not (tmp_path / "many" / "tasks").exists()
    # A cluster that grows to more is said to.
    prepared = prepare_batch(read_batch(path, ["limits.cpus=8"]), reporter=PageReporter())
    check_fit(prepared)
