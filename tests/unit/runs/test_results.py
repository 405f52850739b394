"""metrics.json from what finished stages left, and the share of the gap that was closed."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from bare_runs import bare_run
from faulting.s3 import uri
from tiny import make_config

from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.results import assemble_metrics
from emloc_ray.stages.evaluate.stage import gap_closed, other_bound

USAGE = {"wall_s": 2.0, "peak_pss_bytes": 10, "peak_rss_bytes": 5}


def losses(**values: float) -> dict[str, Any]:
    return {name: {"loss": loss, "token_accuracy": 0.5, "num_tokens": 100} for name, loss in values.items()}


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    ready = bare_run(make_config("llama"), run_dir=str(tmp_path / "run"))
    ready.run.create({}, steps=["data", "calibrate", "factorize", "finetune", "correct", "merge", "evaluate"])
    return ready


def test_a_run_that_has_only_begun_has_what_its_stages_left(prepared: Prepared) -> None:
    metrics = assemble_metrics(prepared.run, prepared)
    assert metrics["stages"] == {}
    assert metrics["disk_bytes"] == {}
    assert metrics["base_model"] == str(prepared.source.directory)  # the config names it from where the run was started
    assert {"python", "ray", "torch", "transformers", "peft"} <= set(metrics["versions"])
    artifact = prepared.run.path("data", "rows")
    artifact.parent.mkdir()
    artifact.write_bytes(b"12345")
    prepared.run.commit("data", "key", [artifact], {"usage": USAGE, "num_workers": 2, "splits": {"train": {"rows": 3}}})
    metrics = assemble_metrics(prepared.run, prepared)
    assert metrics["stages"] == {"data": {**USAGE, "num_workers": 2}}
    assert metrics["data"] == {"train": {"rows": 3}}
    assert metrics["disk_bytes"] == {"data": 5}
    assert "emulator" not in metrics
    assert "evaluation" not in metrics


def test_what_was_planned_stands_beside_what_was_measured(prepared: Prepared) -> None:
    assert "planned_memory" not in assemble_metrics(prepared.run, prepared)
    planned = {"calibrate": 5, "inference": 7}
    metrics = assemble_metrics(prepared.run, prepared, planned=planned)
    assert metrics["planned_memory"] == planned
    assert "planned_gpu_bytes" not in metrics
    held = {"calibrate": 3}
    assert assemble_metrics(prepared.run, prepared, planned_on_gpus=held)["planned_gpu_bytes"] == held


def test_the_files_of_stages_are_counted_until_they_are_dropped_or_out_of_date(prepared: Prepared) -> None:
    counts = {"num_tokens": 1, "num_shards": 1, "fewest_tokens": 1, "mean_relative_error": 0.25}
    for stage, folder in {"data": "data", "calibrate": "data", "factorize": "emulator"}.items():
        file = prepared.run.path(folder, f"{stage}.bin")
        write_bytes(file, b"12345")
        prepared.run.commit(stage, "key", [file], {"usage": USAGE, "splits": {}, "layers": {}, **counts})
    write_bytes(prepared.run.path("adapter", "half"), b"12345")
    assert assemble_metrics(prepared.run, prepared)["disk_bytes"] == {"data": 10, "emulator": 5}
    prepared.run.drop("calibrate")
    assert assemble_metrics(prepared.run, prepared)["disk_bytes"] == {"data": 5, "emulator": 5}
    prepared.run.forget("calibrate")  # of what follows nothing is taken for a result
    assert assemble_metrics(prepared.run, prepared)["disk_bytes"] == {"data": 5}


def test_the_emulators_parameters_are_told_beside_its_error(prepared: Prepared) -> None:
    result = {"usage": USAGE, "mean_relative_error": 0.25, "layers": {}, "fewest_tokens": 1, "splits": {}}
    for stage in ("data", "calibrate", "factorize"):
        prepared.run.commit(stage, "key", [], {**result, "num_tokens": 1, "num_shards": 1})
    emulator = assemble_metrics(prepared.run, prepared)["emulator"]
    layout = prepared.layout
    assert emulator["mean_relative_error"] == 0.25
    assert emulator["original_parameters"] == layout.num_parameters
    assert emulator["parameters_kept"] == layout.parameters_factorized / layout.parameters_targeted
    dropped = emulator["original_parameters"] - emulator["parameters"]
    assert dropped == layout.parameters_targeted - layout.parameters_factorized > 0


def test_the_gap_is_what_lora_on_the_original_gains(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"evaluation": losses(original=4.0, corrected=2.0)}))
    gap = gap_closed(losses(original=4.0, uncorrected=3.5, corrected=3.0, merged=3.1), tmp_path)
    assert gap is not None
    assert gap["corrected"] == pytest.approx(0.5)
    assert gap["uncorrected"] == pytest.approx(0.25)
    assert gap["merged"] == pytest.approx(0.45)
    assert gap["upper_bound_loss"] == 2.0
    assert gap["upper_bound"] == str(tmp_path)


def test_the_upper_bound_may_lie_on_an_object_store(s3_port: int, node_cache: Path) -> None:
    bound = RunDirectory(uri(s3_port, "bound/run"))
    bound.write_metrics({"evaluation": losses(original=4.0, corrected=2.0)})
    shutil.rmtree(node_cache)
    gap = gap_closed(losses(original=4.0, uncorrected=3.5, corrected=3.0, merged=3.1), bound.place)
    assert gap is not None
    assert gap["corrected"] == pytest.approx(0.5)
    assert gap["upper_bound"] == bound.place


def test_there_is_no_gap_where_lora_on_the_original_gained_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"evaluation": losses(original=4.0, corrected=4.0)}))
    assert gap_closed(losses(original=4.0, uncorrected=3.5, corrected=3.0, merged=3.1), tmp_path) is None


def test_there_is_no_gap_to_a_run_that_was_scored_on_something_else(tmp_path: Path) -> None:
    own = losses(original=4.0, uncorrected=3.5, corrected=3.0, merged=3.1)
    fewer = losses(original=4.0, corrected=2.0)
    fewer["original"]["num_tokens"] = 50
    for other in ({}, {"evaluation": losses(original=3.0, corrected=2.0)}, {"evaluation": fewer}):
        (tmp_path / "metrics.json").write_text(json.dumps(other))
        assert gap_closed(own, tmp_path) is None
        assert "was not scored on the same held-out tokens" in str(other_bound(own, str(tmp_path)))
    assert other_bound(own, None) is None


def test_a_bound_that_was_trained_for_fewer_steps_is_told(tmp_path: Path) -> None:
    own, other = losses(original=4.0, corrected=3.0), losses(original=4.0, corrected=2.0)
    (tmp_path / "metrics.json").write_text(json.dumps({"evaluation": other, "finetune": {"steps": 54}}))
    said = str(other_bound(own, str(tmp_path), 60))
    assert "was trained for 54 steps and this run's adapter for 60" in said
    assert said.endswith("run it again with finetune.max_steps: 60.")
    assert other_bound(own, str(tmp_path), 54) is None
    (tmp_path / "metrics.json").write_text(json.dumps({"evaluation": other}))
    assert other_bound(own, str(tmp_path), 60) is None


def test_what_stands_on_a_redone_stage_is_left_out_until_it_is_verified(prepared: Prepared) -> None:
    counts = {"usage": USAGE, "num_tokens": 7, "num_shards": 1}
    prepared.run.commit("calibrate", "key", [], counts)
    prepared.run.commit("data", "new key", [], {"usage": USAGE, "splits": {}})
    assert "calibration" not in assemble_metrics(prepared.run, prepared)
    prepared.run.confirm("calibrate", ahead=["import"])  # none that is newer
    assert "calibration" not in assemble_metrics(prepared.run, prepared)
    prepared.run.confirm("calibrate", ahead=["import", "data"])
    assert assemble_metrics(prepared.run, prepared)["calibration"]["num_tokens"] == 7


def test_a_clock_that_goes_back_hides_no_stage(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine goes on, or the same one after its clock was set."""
    ahead = time.time() + 300
    counts = {"usage": USAGE, "splits": {}, "num_tokens": 7, "num_shards": 1}
    with monkeypatch.context() as patch:
        patch.setattr("emloc_ray.io.runs.manifest.time.time", lambda: ahead)
        prepared.run.commit("data", "key", [], counts)
    prepared.run.commit("calibrate", "key", [], counts)
    assert "calibration" in assemble_metrics(prepared.run, prepared)
    prepared.run.commit("data", "newer key", [], counts)
    assert "calibration" not in assemble_metrics(prepared.run, prepared)


def test_what_stands_behind_a_stage_that_is_to_be_redone_is_left_out(prepared: Prepared) -> None:
    for stage in ("data", "calibrate", "factorize", "finetune"):
        result = {"usage": USAGE, "splits": {}, "num_tokens": 1, "num_shards": 1, "mean_relative_error": 0.1}
        result |= {"layers": {}, "fewest_tokens": 1, "steps": 1, "train_loss": 1.0, "history": []}
        prepared.run.commit(stage, "key", [], result)
    assert "finetune" in assemble_metrics(prepared.run, prepared)
    prepared.run.forget("factorize")
    assert set(assemble_metrics(prepared.run, prepared)["stages"]) == {"data", "calibrate"}
