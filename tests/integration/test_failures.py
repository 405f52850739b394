"""Runs that cannot go well: they stop with what is wrong and where, and what was finished stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from small_runs import FinishedRun, make_values, run_values, task_rows, write_jsonl
from typer.testing import CliRunner

from emloc_ray.cli import app
from emloc_ray.config import parse_config
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import NumericsError
from emloc_ray.io.run_directory import RunDirectory
from emloc_ray.preparation import prepare
from emloc_ray.stages.cluster import Resources
from emloc_ray.stages.factorize import FactorizationJob, build_emulator
from emloc_ray.stages.finetune import FinetuneJob, finetune

STEPS = 12


def poison(model_dir: Path, target: Path, tensor: str, row: int = 0) -> Path:
    """A copy of a checkpoint with NaN in one row of a tensor."""
    shutil.copytree(model_dir, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor][row] = float("nan")
            save_file(tensors, file, {"format": "pt"})
            return target
    raise AssertionError(f"no {tensor} in {model_dir}")


def test_a_bad_row_past_the_checked_ones_fails_the_run_by_file_and_row(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    rows = [*task_rows(1100), {"prompt": "a prompt and no more"}]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_values(tmp_path / "run", tiny_model_dir("llama"), data)))
    result = CliRunner().invoke(app, ["run", str(config)])
    assert result.exit_code == 1
    assert f"Error: {data}, row 1101: no field 'completion' (it has prompt)" in result.stderr
    assert "the same command goes on from there" in result.stderr
    assert "data" not in RunDirectory(tmp_path / "run").manifest()["stages"]
    # Mended, the same command gets further.
    write_jsonl(data, task_rows(1100))
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), data)
    poisoned = poison(tiny_model_dir("llama"), tmp_path / "poisoned", "model.layers.0.mlp.gate_proj.weight")
    values["model"] = {"source": str(poisoned)}
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.mlp\.down_proj reads hold NaN or Inf"):
        run_values(values)
    assert set(RunDirectory(tmp_path / "run").manifest()["stages"]) == {"data"}


def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_what_was_done(
    llama_run: FinishedRun, tmp_path: Path
) -> None:
    copied = llama_run.copy(tmp_path)
    values = copied.changed(finetune={"learning_rate": 1e30})
    with pytest.raises(NumericsError, match=r"NaN or Inf at step [2-8]: lower the learning rate"):
        run_values(values)
    stages = RunDirectory(copied.root).manifest()["stages"]
    assert {"data", "calibrate", "factorize"} <= set(stages)
    assert "finetune" not in stages
    assert not (copied.root / "adapter_emulator").exists()
    assert json.loads((copied.root / "metrics.json").read_text())["emulator"] == copied.metrics["emulator"]


def test_a_number_lost_on_one_rank_stops_all(llama_run: FinishedRun, tmp_path: Path) -> None:
    # One token in one row of one rank's batch meets a row of NaN; the other rank sees none of it.
    tokens = llama_run.root / "data" / "tokens" / "train"
    shards = TokenShards(tokens)
    rows = [set(shards.row(position).input_ids) for position in range(len(shards))]
    orders = [SampleOrder(len(rows), 1, rank, 2, 0).micro_steps(0, STEPS) for rank in (0, 1)]
    seen = [[rows[row] for row in order] for order in orders]
    step, token = next(
        (step, token)
        for step in range(1, STEPS)
        for token in sorted(seen[1][step] - seen[0][step])
        if not any(token in ids for rank in seen for ids in rank[:step])
    )
    emulator = poison(llama_run.root / "emulator", tmp_path / "emulator", "model.embed_tokens.weight", token)
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    job = FinetuneJob(
        emulator_dir=emulator,
        tokens_dir=tokens,
        out_dir=tmp_path / "adapter",
        storage_dir=tmp_path / "training",
        name="one-rank",
        adapter=adapter,
        portable_targets=adapter["target_modules"],
        base_model="tiny",
        max_steps=STEPS,
        batch_size=1,
        max_failures=0,
        training_arguments={"learning_rate": 1e-3, "logging_steps": 1, "gradient_checkpointing": False},
    )
    with pytest.raises(NumericsError, match=f"at step {step + 1}: "):
        finetune(job, Resources(2))
    assert not (tmp_path / "adapter").exists()


def test_infinity_in_the_last_weight_is_told_by_the_factorization(llama_run: FinishedRun, tmp_path: Path) -> None:
    # No linear reads what the last down_proj writes: calibration cannot see it.
    copied = llama_run.copy(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    poisoned = poison(llama_run.model_dir, tmp_path / "poisoned", f"{name}.weight")
    prepared = prepare(parse_config(copied.values))
    job = FactorizationJob(poisoned, copied.root / "calibration", tmp_path / "emulator")
    layout = prepared.layout
    with pytest.raises(NumericsError, match=rf"{name}"):
        build_emulator(job, layout.groups, layout.ranks, prepared.model_config, Resources(2))
    assert not list((tmp_path / "emulator").glob("*.index.json"))  # nothing that would load
