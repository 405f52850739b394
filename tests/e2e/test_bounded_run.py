"""A whole run whose workers may hold a third of the original's weights ends in the losses of one that holds it whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import task_rows, write_jsonl
from tiny import make_model, make_tokenizer

from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.planning.memory import BASE_BYTES
from emloc_ray.stages.ray.session import LEAN_MEMORY

pytestmark = [pytest.mark.deep, pytest.mark.without_ray]

TESTS = Path(__file__).parent.parent
# What the plan does not count: Python's own objects of a model of 24 blocks and its copies, code that libraries make.
BESIDE = 16 * 2**20
SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 384,
    "intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bounded") / "model"
    make_model("llama", **SIZES).save_pretrained(directory, max_shard_size="20MB")
    make_tokenizer().save_pretrained(directory)
    return directory


def values(root: Path, model_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run_dir": str(root / "run"),
        "model": {"source": str(model_dir)},
        "data": {
            "train": {"path": str(write_jsonl(root / "rows.jsonl", task_rows(60)))},
            "format": "prompt_completion",
            "max_seq_length": 32,
        },
        "calibration": {"num_calibration_samples": 8, "batch_size": 4, "rows_per_shard": 8},
        "emulator": {
            "compression_ratio": 0.15,
            "allocation": "sensitivity",
            "objective": "predictions",
            "healing": {"steps": 2},
        },
        "adapter": {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "finetune": {"max_steps": 2, "exact_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
        "correction": {"max_share": None, "num_selection_samples": 8},
        "evaluation": {"num_exact_match": 2, "num_generations": 2, "max_new_tokens": 2, "batch_size": 4},
        **changes,
    }


def measured(root: Path, model_dir: Path, **changes: Any) -> Any:
    root.mkdir()
    (root / "values.json").write_text(json.dumps(values(root, model_dir, **changes)))
    paths = [str(root / "values.json"), str(model_dir), str(root / "found.json")]
    places = os.pathsep.join(map(str, (TESTS.parent, TESTS.parent / "pipelines", TESTS)))
    own = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", **LEAN_MEMORY}
    command = [sys.executable, str(TESTS / "measured_run.py"), *paths]
    done = subprocess.run(command, env={**os.environ, **own}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((root / "found.json").read_text())


@pytest.mark.timeout(1200)
def test_a_third_of_the_weights_is_enough(model_dir: Path, tmp_path: Path) -> None:
    third = sum(entry.num_bytes for entry in Checkpoint(model_dir)) // 3
    bounded = measured(tmp_path / "bounded", model_dir, memory_budget=BASE_BYTES + third - BESIDE)
    assert bounded["holds"]["calibrate"] == "block_by_block"
    assert {hold for stage, hold in bounded["holds"].items() if stage != "calibrate"} <= {"offloaded", "all_offloaded"}
    assert {stage: peak for stage, peak in bounded["peaks"].items() if peak > third} == {}
    resident = {"source": str(model_dir), "hold": "resident"}
    whole = measured(tmp_path / "whole", model_dir, model=resident, memory_budget=None)
    assert bounded["losses"] == pytest.approx(whole["losses"], abs=1e-4)
    assert bounded["step_losses"] == pytest.approx(whole["step_losses"], abs=1e-4)
    assert len(bounded["losses"]) == 7


@pytest.mark.timeout(1200)
def test_left_to_its_default_every_stage_stays_within_inference(model_dir: Path, tmp_path: Path) -> None:
    training = {"max_steps": 2, "exact_steps": 2, "per_device_train_batch_size": 64, "gradient_checkpointing": False}
    training |= {"logging_steps": 1}
    found = measured(tmp_path / "run", model_dir, finetune=training)
    assert {"gradients", "heal", "finetune", "finish", "evaluate"} <= found["peaks"].keys()
    assert {stage: peak for stage, peak in found["peaks"].items() if peak > found["inference"] + BESIDE} == {}
