"""The quickstart on the real model with fewer steps: what a newcomer gets, checked from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[2]
pytest.importorskip("gguf")

# In a process that never imports emloc_ray: adapter on the original against the merged model.
_OUTSIDE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
run = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(run + "/merged")
assert tokenizer.chat_template
x = tokenizer("def add(a, b):\\n    return a + b\\n", return_tensors="pt")
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained(run + "/model", dtype=torch.float32).eval()
    original = base(**x).logits
    adapted = PeftModel.from_pretrained(base, run + "/adapter").eval()(**x).logits
    merged = AutoModelForCausalLM.from_pretrained(run + "/merged", dtype=torch.float32).eval()(**x).logits
assert "emloc_ray" not in sys.modules
figures = {"apart": (adapted - merged).abs().max(), "moved": (merged - original).abs().max(), "scale": original.abs().max()}
print(json.dumps({name: float(value) for name, value in figures.items()}))
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("e2e") / "quickstart"
    overrides = [
        "finetune.max_steps=4",
        "finetune.gradient_accumulation_steps=2",
        "calibration.num_calibration_samples=8",
        "correction.num_selection_samples=4",
        "evaluation.num_samples=8",
        "evaluation.num_exact_match=1",
        "evaluation.num_generations=1",
        "evaluation.max_new_tokens=4",
    ]
    command = [sys.executable, "-c", "from emloc_ray.ui.cli import main; main()"]
    arguments = ["run", "configs/quickstart.yaml", f"run_dir={run_dir}", *overrides]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "Held-out data" in done.stdout
    return run_dir


@pytest.fixture(scope="module")
def metrics(quickstart: Path) -> dict[str, Any]:
    return json.loads((quickstart / "metrics.json").read_text())


@pytest.mark.timeout(1200)
def test_a_few_steps_already_help(metrics: dict[str, Any]) -> None:
    losses = {name: values["loss"] for name, values in metrics["evaluation"].items()}
    assert losses["merged"] < losses["original"] - 0.02
    assert losses["emulator_adapter"] < losses["emulator"]
    assert losses["merged"] == pytest.approx(losses["corrected"], abs=1e-3)


def test_rows_enough_and_no_module_in_two_splits(quickstart: Path, metrics: dict[str, Any]) -> None:
    import pyarrow.parquet

    tables = {
        split: pyarrow.parquet.read_table(quickstart / "data" / "rows" / f"{split}.parquet")
        for split in ("train", "calibration", "selection", "eval")
    }
    assert sum(table.num_rows for table in tables.values()) >= 800
    modules = [set(table["module"].to_pylist()) for table in tables.values()]
    assert sum(map(len, modules)) == len(set.union(*modules))
    assert metrics["data"]["train"]["rows"] > 500


def test_it_loads_without_us(quickstart: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OUTSIDE, str(quickstart)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["apart"] <= 1e-4 * figures["scale"]
    assert figures["moved"] > 10 * figures["apart"]


def test_no_trace_of_quantization_and_untouched_tensors_are_the_originals(quickstart: Path) -> None:
    assert "quantization_config" not in json.loads((quickstart / "model" / "config.json").read_text())
    original, merged = _tensors(quickstart / "model"), _tensors(quickstart / "merged")
    assert original.keys() == merged.keys()
    changed = {name for name in original if not torch.equal(original[name], merged[name])}
    assert len(changed) == 210
    assert all(".layers." in name and name.endswith("_proj.weight") for name in changed)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return found
