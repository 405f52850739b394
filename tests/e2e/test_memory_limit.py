"""A model larger than what the operating system lets a worker take: each stage runs, evaluation included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limited_worker import LIMIT
from small_runs import task_rows, write_jsonl
from tiny import make_model, make_tokenizer

from emloc_ray.io.formats.yaml_text import write_yaml

pytestmark = pytest.mark.deep

TESTS = Path(__file__).parent.parent
ABOVE_IMPORTS = 256 * 2**20

_MEASURE = """
import limited_worker, ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
task = ray.remote(limited_worker.data_bytes_after_imports)
print(max(ray.get([task.remote(), task.remote()])))
"""

_WHOLE = """
import os, pathlib, sys, limited_worker
limited_worker.data_bytes_after_imports()
from emloc_ray.modeling.loading import load_model
os.environ[limited_worker.LIMIT] = str(limited_worker.data_bytes() + int(sys.argv[2]))
limited_worker.limit_memory()
load_model(pathlib.Path(sys.argv[1]), dtype="float32")
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 M parameters: 200 MB as stored, 400 MB in the float32 that the run asks for."""
    directory = tmp_path_factory.mktemp("large") / "model"
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    make_model("llama", dtype="bfloat16", num_attention_heads=8, num_key_value_heads=8, **sizes).save_pretrained(
        directory, max_shard_size="50MB"
    )
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Workers may take so much above what their imports took."""
    own = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    found = _started([sys.executable, "-c", _MEASURE], own)
    assert found.returncode == 0, found.stderr
    return {**own, LIMIT: str(int(found.stdout.splitlines()[-1]) + ABOVE_IMPORTS)}


def run(root: Path, model_dir: Path, environment: dict[str, str]) -> Any:
    values = {
        "run_dir": str(root / "run"),
        "memory_budget": 450 * 2**20 + ABOVE_IMPORTS,
        "model": {"source": str(model_dir), "dtype": "float32"},
        "data": {
            "train": {"path": str(write_jsonl(root / "rows.jsonl", task_rows(60)))},
            "format": "prompt_completion",
            "max_seq_length": 32,
        },
        "calibration": {"num_calibration_samples": 16, "batch_size": 4, "rows_per_shard": 8},
        "emulator": {"compression_ratio": 0.25, "num_workers": 2},
        "adapter": {"r": 4},
        "finetune": {"max_steps": 2, "per_device_train_batch_size": 2},
        "correction": {"max_share": None},
        "evaluation": {"num_exact_match": 2, "num_generations": 2, "max_new_tokens": 2},
        "ray": {"num_cpus": 2, "runtime_env": {"worker_process_setup_hook": "limited_worker.limit_memory"}},
    }
    config = root / "config.yaml"
    config.write_text(write_yaml(values))
    command = [sys.executable, "-c", "from emloc_ray.ui.cli import main; main()", "run", str(config)]
    return _started(command, environment)


def _started(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run with small stacks for the many threads of Ray: the limit counts their reserve, of which they use little."""
    script = 'ulimit -s 1024 && exec "$@"'
    return subprocess.run(
        ["bash", "-c", script, "bash", *command], env=environment, check=False, capture_output=True, text=True
    )


def test_every_stage_runs_where_the_model_does_not_fit(
    model_dir: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    result = run(tmp_path, model_dir, environment)
    assert result.returncode == 0, result.stderr
    assert "memory_budget is" not in result.stdout  # each stage is planned to fit
    stages = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert stages["calibrate"]["result"]["hold"] == "block_by_block"
    assert stages["merge"]["result"]["merged_tensors"] == 7 * 8
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["correction"]["candidates"]) > 1
    losses = {variant: scored["loss"] for variant, scored in metrics["evaluation"].items()}
    assert losses["merged"] == pytest.approx(losses["corrected"], abs=0.1)  # it is stored in bfloat16
    assert max(losses["merged"], losses["corrected"]) < losses["original"]


def test_the_limit_is_one_that_the_whole_model_breaks(model_dir: Path, environment: dict[str, str]) -> None:
    result = _started([sys.executable, "-c", _WHOLE, str(model_dir), str(ABOVE_IMPORTS)], environment)
    assert result.returncode == 1
    assert "can't allocate memory" in result.stderr or "MemoryError" in result.stderr
