"""Running again: what is done is skipped, what changed is redone, what was killed goes on, to the same result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_runs import GROUP, FinishedRun, KillingReporter, act_in_training, redone, run_values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emloc_ray.config.reading import parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.planning.prepared import prepare
from emloc_ray.runs import run as pipeline
from emloc_ray.runs.status import older_stages
from emloc_ray.runs.trace import read_trace

WITHOUT_HEALING = [stage for stage in VERBS if stage != "heal"]
ALL = ["data", *WITHOUT_HEALING]


@pytest.fixture
def copied(llama_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A finished run to spoil."""
    return llama_run.copy(tmp_path)


def tail(stage: str) -> list[str]:
    return ALL[ALL.index(stage) :]


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("evaluation", {"num_workers": 1}, []),
        ("calibration", {"num_workers": 1, "cpus_per_worker": 2}, []),
        ("finetune", {"cpus_per_worker": 0.5, "max_failures": 0}, []),
        ("finetune", {"report_to": "tensorboard"}, []),
        ("evaluation", {"num_generations": 0}, ["evaluate"]),
        ("correction", {"strength": 0.3}, []),  # auto ignores it
        ("correction", {"dampening_frac": 1e-3}, tail("correct")),
        ("correction", {"method": "projection"}, tail("correct")),
        ("finetune", {"learning_rate": 1e-3}, tail("finetune")),
        ("finetune", {"num_workers": 2}, tail("finetune")),
        ("finetune", {"weight_decay": 0.1}, tail("finetune")),
        ("adapter", {"lora_alpha": 8}, tail("finetune")),
        ("emulator", {"compression_ratio": 0.25}, tail("factorize")),
        ("emulator", {"ratios": {"q_proj": 0.4}}, tail("factorize")),
        ("emulator", {"dampening_frac": 1e-3}, tail("factorize")),
        ("calibration", {"tokens": "completion"}, tail("calibrate")),
        ("calibration", {"num_calibration_samples": 16}, ["data"]),  # and on, once the rows are made
        ("data", {"max_seq_length": 32}, ["data"]),
    ],
)
def test_a_changed_config_redoes_what_depends_on_it(
    copied: FinishedRun, section: str, keys: dict[str, Any], expected: list[str]
) -> None:
    assert redone(copied.changed(**{section: keys})) == expected


def test_from_a_stage_redoes_it_and_what_follows(copied: FinishedRun) -> None:
    assert redone(copied.values, begin="merge") == ["merge", "evaluate"]
    assert redone(copied.values, begin="calibrate") == WITHOUT_HEALING


def test_a_changed_model_redoes_everything(copied: FinishedRun, tiny_model_dir: Callable[..., Path]) -> None:
    assert redone(copied.changed(model={"source": str(tiny_model_dir("llama", seed=1))})) == ALL


def test_changed_data_redoes_the_rows(copied: FinishedRun, task_file: Path, tmp_path: Path) -> None:
    longer = tmp_path / task_file.name
    longer.write_text(task_file.read_text() + json.dumps({"prompt": "more", "completion": "more"}) + "\n")
    assert redone(copied.changed(data={"train": {"path": str(longer)}})) == ["data"]


@pytest.mark.parametrize(
    ("artifact", "stage"),
    [
        ("data/tokens/train/shard-00000.arrow", "data"),
        ("calibration/grams.index.json", "calibrate"),
        ("emulator/model.safetensors.index.json", "factorize"),
        ("adapter_emulator/adapter_model.safetensors", "finetune"),
        ("adapter/adapter_model.safetensors", "correct"),
        ("merged/config.json", "merge"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_artifact_is_not_taken_for_done(copied: FinishedRun, artifact: str, stage: str, damage: str) -> None:
    spoil(copied.root / artifact, damage)
    assert redone(copied.values)[0] == stage


def spoil(path: Path, damage: str) -> None:
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


def test_stages_with_damaged_artifacts_are_redone_and_no_others(copied: FinishedRun) -> None:
    damaged = {
        "data/tokens/train/shard-00000.arrow": "cut",
        "emulator/model.safetensors.index.json": "removed",
        "adapter/adapter_model.safetensors": "cut",
        "merged/config.json": "removed",
    }
    before = {name: (copied.root / name).read_bytes() for name in damaged}
    for name, damage in damaged.items():
        spoil(copied.root / name, damage)
    assert run_values(copied.values).started == ["data", "factorize", "correct", "merge"]
    assert {name: (copied.root / name).read_bytes() for name in damaged} == before


def test_a_finished_run_is_skipped_whole_without_ray(copied: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emloc_ray.runs.run.connection", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    before = {path: path.stat().st_mtime_ns for path in copied.root.rglob("*.safetensors")}
    reporter = run_values(copied.values)
    assert reporter.started == []
    assert reporter.skipped == ALL
    assert {path: path.stat().st_mtime_ns for path in copied.root.rglob("*.safetensors")} == before
    metrics = json.loads((copied.root / "metrics.json").read_text())
    assert metrics["hardware"] == copied.metrics["hardware"]
    assert metrics["evaluation"] == copied.metrics["evaluation"]

    (copied.root / "metrics.json").unlink()
    assert run_values(copied.values).skipped == ALL
    assert json.loads((copied.root / "metrics.json").read_text())["evaluation"] == copied.metrics["evaluation"]


def test_a_changed_correction_and_a_cut_shard_are_redone_for_real(copied: FinishedRun) -> None:
    shard = next((copied.root / "merged").glob("model-00001-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    values = copied.changed(correction={"method": "covariance", "clamp": None, "strength": 0.3})
    reporter = run_values(values)
    assert reporter.started == ["correct", "merge", "evaluate"]
    metrics = json.loads((copied.root / "metrics.json").read_text())
    choice = {key: metrics["correction"][key] for key in ("method", "clamp", "strength")}
    assert choice == {"method": "covariance", "clamp": None, "strength": 0.3}
    assert metrics["evaluation"]["original"] == copied.metrics["evaluation"]["original"]
    loss = metrics["evaluation"]["corrected"]["loss"]
    assert metrics["evaluation"]["merged"]["loss"] == pytest.approx(loss, abs=1e-4)
    assert loss != copied.metrics["evaluation"]["corrected"]["loss"]
    assert load_file(shard)


def test_altered_files_of_the_same_size_are_found_before_they_are_built_on(
    copied: FinishedRun, llama_run: FinishedRun
) -> None:
    shards = sorted((copied.root / "emulator").glob("model-*"))[:2]
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    reporter = run_values(copied.changed(correction={"method": "none"}), until="correct")
    assert reporter.started == ["factorize", "correct"]
    assert any(f"emulator/{shards[0].name} is damaged" in note for note in reporter.notes)
    for shard in shards:
        assert shard.read_bytes() == (llama_run.root / "emulator" / shard.name).read_bytes()
    # What was trained on it stands as it did; what was made of another correction does not.
    assert older_stages(json.loads((copied.root / "manifest.json").read_text())) == ["merge", "evaluate"]
    assert {"factorize", "finetune", "correct"} <= json.loads((copied.root / "metrics.json").read_text())[
        "stages"
    ].keys()


def test_shards_merged_with_another_adapter_do_not_stay(copied: FinishedRun) -> None:
    """A kill inside the merge, then another training of the same inputs: on a GPU it gives other numbers."""
    run = prepare(parse_config(copied.values)).run
    run.forget("merge")
    adapter = copied.root / "adapter" / "adapter_model.safetensors"
    save_file({name: 3 * value for name, value in load_file(adapter).items()}, adapter, {"format": "pt"})
    correct = run.manifest()["stages"]["correct"]
    files = [copied.root / path for path in correct["outputs"]]
    run.commit("correct", correct["inputs"], files, correct["result"], correct["versions"])
    assert run_values(copied.values).started == ["merge", "evaluate"]
    found = json.loads((copied.root / "metrics.json").read_text())["evaluation"]
    assert found["merged"]["loss"] == pytest.approx(found["corrected"]["loss"], abs=1e-4)
    assert found["merged"]["loss"] != pytest.approx(copied.metrics["evaluation"]["merged"]["loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("folder", "stages"),
    [("calibration", ["calibrate", "correct"]), ("emulator/spectra", ["factorize", "correct"])],
)
def test_altered_sums_and_spectra_are_made_anew(copied: FinishedRun, folder: str, stages: list[str]) -> None:
    """An index that is still there does not stand for the file that went."""
    file = min((copied.root / folder).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    values = copied.changed(correction={"method": "covariance", "strength": 0.3})
    reporter = run_values(values, until="correct")
    assert reporter.started == stages
    assert file.is_file()
    assert run_values(values, until="correct").started == []


def test_a_killed_calibration_worker_leaves_no_trace(copied: FinishedRun, llama_run: FinishedRun) -> None:
    reporter = KillingReporter()
    run_values(copied.values, reporter, begin="calibrate", until="calibrate")
    assert len(reporter.killed) == 1
    [told] = [note for note in reporter.notes if note.startswith("calibrate: ")]
    assert re.match(
        "calibrate: slot [01](?: at (token shard [0-9]+|its end))? lost its worker because .*; restarted", told
    )
    assert reporter.started == ["calibrate"]
    calm, disturbed = llama_run.root / "calibration", copied.root / "calibration"
    files = sorted(path.name for path in calm.iterdir())
    assert sorted(path.name for path in disturbed.iterdir()) == files
    for name in files:
        assert (disturbed / name).read_bytes() == (calm / name).read_bytes(), name


def test_a_group_that_loses_a_worker_trains_as_one_worker_that_lives(
    copied: FinishedRun, llama_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = copied.changed(finetune={**GROUP, "save_steps": 1, "report_to": "tensorboard"})
    act_in_training(monkeypatch, "finetune", 4, tmp_path / "killed")
    reporter = run_values(values, until="finetune")
    assert any(re.match("finetune: rank [01] .*; restarted from the last", n) for n in reporter.notes)
    metrics = json.loads((copied.root / "metrics.json").read_text())
    assert "tokens_per_second" not in metrics["finetune"]  # it went on from a checkpoint; it did not begin again
    assert [line["step"] for line in metrics["finetune"]["history"]] == list(range(1, 9))
    assert metrics["stages"]["finetune"]["num_workers"] == 2
    workers = {span.worker for span in read_trace(RunDirectory(copied.root))[0] if span.stage == "finetune"}
    assert {"rank 0 on training group", "rank 1 on training group"} <= workers
    assert reporter.skipped == ["data", "calibrate", "factorize"]
    calm, disturbed = (
        load_file(run.root / "adapter_emulator" / "adapter_model.safetensors") for run in (llama_run, copied)
    )
    assert calm.keys() == disturbed.keys()
    assert max(float((calm[name] - disturbed[name]).abs().max()) for name in calm) <= 1e-4  # the order of sums
    (reported,) = (copied.root / "tensorboard").iterdir()
    assert len(list(reported.iterdir())) == 2  # by rank 0 of the killed group and by rank 0 of the next
    events = EventAccumulator(str(reported)).Reload()
    assert {event.step for event in events.Scalars("train/loss")} == set(range(1, 9))


def test_fresh_forgets_what_was_there(copied: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "run_stages", lambda steps, until, actors: None)
    pipeline.run(parse_config(copied.values), fresh=True)
    left = {entry.name for entry in copied.root.iterdir()}
    assert left == {"manifest.json", "config.yaml", "log.jsonl", ".lock"}
    assert json.loads((copied.root / "manifest.json").read_text())["stages"] == {}


def test_two_processes_do_not_share_a_run(copied: FinishedRun, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(write_yaml(copied.values))
    holder = RunDirectory(copied.root)
    holder.lock()
    try:
        command = [sys.executable, "-c", "from emloc_ray.ui.cli import main; main()", "run", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    finally:
        holder.unlock()
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"is in use by process {os.getpid()} on" in done.stderr
