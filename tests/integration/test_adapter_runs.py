"""Adapter methods through the whole pipeline, as one batch: what each leaves loads with plain PEFT and serves what is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_runs import make_values
from transformers import AutoModelForCausalLM

from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.scoring import score_rows
from emloc_ray.runs.batch.driver import prepare_batch, run_batch
from emloc_ray.runs.batch.state import BatchState
from emloc_ray.runs.batch.tasks import read_batch
from emloc_ray.ui.page import PageReporter

pytestmark = pytest.mark.deep

ONE = {"num_workers": 1}
TASKS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"method": "dora", "r": 4}},
    "lokr": {"adapter": {"method": "lokr", "r": 2, "alpha": 4}, "correction.method": "projection"},
    "vera": {"adapter": {"method": "vera", "r": 16}, "finetune.learning_rate": 0.05},
    "ia3": {"adapter": {"method": "ia3"}, "finetune.learning_rate": 0.05},
    "prefix": {  # by two ranks of a group
        "adapter": {"method": "prefix_tuning", "num_virtual_tokens": 4},
        "finetune.learning_rate": 0.05,
        "finetune.num_workers": 2,
    },
}


@pytest.fixture(scope="module")
def ended(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path], task_file: Path
) -> tuple[Path, BatchState]:
    """The batch's directory, and how it ended."""
    root = tmp_path_factory.mktemp("methods")
    values = make_values(
        root / "unused",
        tiny_model_dir("llama"),
        task_file,
        calibration=ONE,
        emulator=ONE,
        finetune={**ONE, "max_steps": 4, "save_steps": 2},
        merge=ONE,
        evaluation={**ONE, "num_samples": 8},
    )
    del values["run_dir"], values["adapter"]
    (root / "base.yaml").write_text(write_yaml(values))
    tasks = [{"name": name, **keys} for name, keys in TASKS.items()]
    batch = {"base": "base.yaml", "run_dir": str(root / "many"), "tasks": tasks}
    (root / "batch.yaml").write_text(write_yaml(batch))
    return root / "many", run_batch(prepare_batch(read_batch(root / "batch.yaml"), reporter=PageReporter()))


def directory(ended: tuple[Path, BatchState], name: str) -> RunDirectory:
    return RunDirectory(str(ended[0] / "tasks" / name))


def held_out_loss(run: RunDirectory, model: Any) -> float:
    shards = TokenShards(run.path("data", "tokens", "eval"))
    rows = [shards.row(position) for position in range(len(shards))]
    score = score_rows(model.eval(), rows, batch_size=8, loss_on="completion", pad_token_id=0, name="plain")
    return float(score.metrics()["loss"])


def test_every_method_ends(ended: tuple[Path, BatchState]) -> None:
    assert {task.name: task.status for task in ended[1].tasks} == dict.fromkeys(TASKS, "done")
    losses = [task.served_loss for task in ended[1].tasks]
    assert len(set(losses)) == len(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_adapter_serves_with_plain_peft_what_was_measured(
    ended: tuple[Path, BatchState], name: str, tiny_model_dir: Callable[..., Path]
) -> None:
    run = directory(ended, name)
    told = run.metrics()["evaluation"]
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    assert held_out_loss(run, original) == pytest.approx(told["original"]["loss"], rel=1e-5)
    served = PeftModel.from_pretrained(original, run.path("adapter"))
    assert held_out_loss(run, served) == pytest.approx(told["corrected"]["loss"], rel=1e-5)
    assert abs(told["corrected"]["loss"] - told["original"]["loss"]) > 1e-4
    if name == "prefix":
        return
    merged = AutoModelForCausalLM.from_pretrained(run.path("merged"))
    assert held_out_loss(run, merged) == pytest.approx(told["merged"]["loss"], rel=1e-5)
    assert told["merged"]["loss"] == pytest.approx(told["corrected"]["loss"], rel=1e-4)
    with torch.no_grad():
        ids = torch.arange(2, 22).unsqueeze(0)
        torch.testing.assert_close(merged(ids).logits, served(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_corrected_update_of_full_rank_is_lora_s(ended: tuple[Path, BatchState]) -> None:
    run = directory(ended, "lokr")
    assert Adapter(run.path("adapter_emulator")).peft_type == "LOKR"
    assert Adapter(run.path("adapter")).peft_type == "LORA"
    assert run.metrics()["correction"]["lora_form"]["largest_lack"] <= 1e-3


def test_ia3_is_plugged_in_as_trained_and_the_report_says_so(ended: tuple[Path, BatchState]) -> None:
    run = directory(ended, "ia3")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert run.path("adapter", file).read_bytes() == run.path("adapter_emulator", file).read_bytes()
    assert "The original takes the adapter as trained" in run.path("report.html").read_text()


def test_a_prefix_has_no_merge_and_all_say_so(ended: tuple[Path, BatchState]) -> None:
    run = directory(ended, "prefix")
    metrics = run.metrics()
    assert "merged" not in metrics["evaluation"]
    assert not run.path("merged").exists()
    assert "merge" not in json.loads(run.path("manifest.json").read_text())["stages"]
    assert "There is no merged model" in run.path("report.html").read_text()
    assert metrics["generations"][0]["corrected"] is not None
    assert set(metrics["exact_match"]) == {"original", "corrected", "num_prompts"}
