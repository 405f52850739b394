"""Runs that cannot go well: they stop with what is wrong and where, and what was finished stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_runs import GROUP, FinishedRun, make_values, run_values, task_rows, write_jsonl
from typer.testing import CliRunner

from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import NumericsError
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.digests import digest
from emloc_ray.planning.calibration_memory import BASE_BYTES
from emloc_ray.ui.cli import app

STEPS = 12


def poison(checkpoint: Path, tensor: str, row: int = 0) -> None:
    """Puts NaN into one row of a tensor of a checkpoint, in place."""
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor][row] = float("nan")
            save_file(tensors, file, {"format": "pt"})
            return
    raise AssertionError(f"no {tensor} in {checkpoint}")


def take_as_written(root: Path, stage: str) -> None:
    """Has the manifest say that a stage wrote what its files hold now: altered files would be found, and written again."""
    manifest = json.loads((root / "manifest.json").read_text())
    for path, content in manifest["stages"][stage]["outputs"].items():
        content |= {"size": (root / path).stat().st_size, "sha256": digest(root / path)}
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_a_group_that_the_joined_cluster_never_holds_is_refused_before_anything_is_written(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), task_file, finetune={"num_workers": 3})
    config = tmp_path / "config.yaml"
    config.write_text(write_yaml({**values, "ray": {"address": "auto"}}))
    result = CliRunner().invoke(app, ["run", str(config)])
    assert result.exit_code == 2
    assert (
        "finetune starts 3 workers at once, with 1 CPUs and 0 GPUs a worker, and the cluster's nodes hold 2 of them: lower"
        in (" ".join(result.stderr.split()))
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_bad_row_past_the_checked_ones_fails_the_run_by_file_and_row(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    rows = [*task_rows(1100), {"prompt": "a prompt and no more"}]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    config = tmp_path / "config.yaml"
    config.write_text(write_yaml(make_values(tmp_path / "run", tiny_model_dir("llama"), data)))
    result = CliRunner().invoke(app, ["run", str(config)])
    assert result.exit_code == 1
    assert f"Error: {data}, row 1101: no field 'completion' (it has prompt)" in result.stderr
    assert "UDF" not in result.stderr
    assert "the same command continues from there" in result.stderr
    assert "data" not in RunDirectory(tmp_path / "run").manifest()["stages"]
    # Mended, the same command gets further.
    write_jsonl(data, task_rows(1100))
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), data)
    poisoned = tmp_path / "poisoned"
    shutil.copytree(tiny_model_dir("llama"), poisoned)
    poison(poisoned, "model.layers.0.mlp.gate_proj.weight")
    values["model"] = {"source": str(poisoned)}
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.down_proj reads hold NaN or Inf"):
        run_values(values)
    assert set(RunDirectory(tmp_path / "run").manifest()["stages"]) == {"data"}


@pytest.mark.deep
def test_a_number_lost_on_one_rank_stops_all_at_its_step_and_keeps_what_was_done(
    llama_run: FinishedRun, tmp_path: Path
) -> None:
    # One token in a row of one rank's batch meets an embedding of NaN; the other rank sees none of it.
    copied = llama_run.copy(tmp_path)
    shards = TokenShards(copied.root / "data" / "tokens" / "train")
    rows = [set(shards.row(position).input_ids) for position in range(len(shards))]
    orders = [SampleOrder(len(rows), 1, rank, 2, 0).micro_steps(0, STEPS) for rank in (0, 1)]
    seen = [[rows[row] for row in order] for order in orders]
    step, token = next(
        (step, token)
        for step in range(1, STEPS)
        for token in sorted(seen[1][step] - seen[0][step])
        if not any(token in ids for rank in seen for ids in rank[:step])
    )
    poison(copied.root / "emulator", "model.embed_tokens.weight", token)
    take_as_written(copied.root, "factorize")
    values = copied.changed(finetune={**GROUP, "per_device_train_batch_size": 1, "max_steps": STEPS})
    with pytest.raises(NumericsError, match=rf"NaN or Inf at step {step + 1}: lower the learning rate"):
        run_values(values)
    stages = RunDirectory(copied.root).manifest()["stages"]
    assert {"data", "calibrate", "factorize"} <= set(stages)
    assert "finetune" not in stages
    assert not (copied.root / "adapter_emulator").exists()
    assert json.loads((copied.root / "metrics.json").read_text())["emulator"] == copied.metrics["emulator"]


def test_a_cluster_whose_gpus_hold_too_little_ends_the_run_before_anything_is_written(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's machine has no GPU: only the nodes of the Ray that is joined can say what theirs hold."""
    monkeypatch.setattr("emloc_ray.runs.run.gpus_within_reach", lambda: 2.0)
    monkeypatch.setattr("emloc_ray.runs.run.smallest_gpu_bytes", lambda: BASE_BYTES)
    data, config = write_jsonl(tmp_path / "rows.jsonl", task_rows(60)), tmp_path / "config.yaml"
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), data, calibration={"gpus_per_worker": "auto"})
    config.write_text(write_yaml(values))
    result = CliRunner().invoke(app, ["run", str(config)])
    assert result.exit_code == 2, result.stderr
    assert "calibration.gpus_per_worker is 1, of which" in " ".join(result.stderr.split())
    assert not RunDirectory(tmp_path / "run").stages()
