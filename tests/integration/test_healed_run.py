"""A run whose emulator is healed before the adapter is trained: from end to end, again, broken off, shared, in 4 bits."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulting.s3 import uri
from peft import PeftModel
from run_samples import healing_metrics, metric_keys
from safetensors.torch import load_file
from small_runs import (
    HEALING,
    FinishedRun,
    Stopping,
    act_in_training,
    make_values,
    redone,
    run_values,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import Stopped
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fetch import fetch
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.stages.finetune.job import FinetuneJob

AFTER = ["finetune", "correct", "merge", "evaluate"]


@pytest.fixture
def copied(healed_run: FinishedRun, tmp_path: Path) -> FinishedRun:
    """It, to spoil."""
    return healed_run.copy(tmp_path)


def divergence(run: FinishedRun, emulator: str) -> float:
    """Of an emulator from the original on the held-out rows, in nats a token."""
    shards = TokenShards(run.root / "data" / "tokens" / "eval")
    original = AutoModelForCausalLM.from_pretrained(run.model_dir)
    model = AutoModelForCausalLM.from_pretrained(run.root / emulator)
    total, count = 0.0, 0
    with torch.no_grad():
        for position in range(len(shards)):
            ids = torch.tensor([shards.row(position).input_ids])
            ours, theirs = (m(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (model, original))
            total += float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True))
            count += len(ours)
    return total / count


def same_tensors(one: Path, other: Path, atol: float) -> None:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_it_runs_between_factorize_and_finetune_and_leaves_the_emulator_alone(healed_run: FinishedRun) -> None:
    assert healed_run.reporter.skipped == ["data", "calibrate"]
    assert healed_run.reporter.started == ["factorize", "heal", *AFTER]
    names = {entry.name for entry in healed_run.root.iterdir()}
    assert {"emulator", "emulator_healed"} <= names
    assert "healing" not in names
    metrics = healed_run.metrics
    found = metrics["healing"]
    assert metric_keys(healing_metrics()) <= metric_keys(found)
    assert found["steps"] == len(found["history"]) == HEALING["steps"]
    assert found["healed_layers"] == 14
    assert found["teacher_rows"] == metrics["data"]["train"]["rows"]  # 24 steps of eight rows: all of them
    assert found["teacher_bytes"] > 0
    assert metrics["disk_bytes"]["emulator_healed"] > metrics["disk_bytes"]["emulator"]
    assert "Healing the emulator" in (healed_run.root / "report.html").read_text()
    assert metrics["stages"]["heal"]["wall_s"] > 0


def test_it_predicts_more_as_the_original_does_on_rows_it_never_saw(healed_run: FinishedRun) -> None:
    before, after = divergence(healed_run, "emulator"), divergence(healed_run, "emulator_healed")
    assert after < 0.9 * before


def test_its_parameters_are_those_of_the_run_without_healing(healed_run: FinishedRun, llama_run: FinishedRun) -> None:
    model, loading = AutoModelForCausalLM.from_pretrained(
        healed_run.root / "emulator_healed", dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == healed_run.metrics["emulator"]["parameters"] == llama_run.metrics["emulator"]["parameters"]
    ranks = {name: m.down.out_features for name, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert ranks == {name: layer["rank"] for name, layer in llama_run.metrics["emulator"]["layers"].items()}


def test_the_adapter_is_trained_corrected_and_measured_on_the_healed_one(healed_run: FinishedRun) -> None:
    loss = {name: scores["loss"] for name, scores in healed_run.metrics["evaluation"].items()}
    assert loss["emulator_adapter"] < loss["emulator"] - 0.02
    assert loss["merged"] < loss["original"] - 0.02
    assert loss["merged"] == pytest.approx(loss["corrected"], abs=1e-4)
    original = AutoModelForCausalLM.from_pretrained(healed_run.model_dir)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        served = PeftModel.from_pretrained(original, healed_run.root / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(healed_run.root / "merged")(ids).logits
    torch.testing.assert_close(served, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("finetune", {"cpus_per_worker": 0.5, "max_failures": 0}, []),
        ("correction", {"dampening_frac": 1e-3}, ["correct", "merge", "evaluate"]),
        ("finetune", {"learning_rate": 1e-3}, AFTER),
        ("finetune", {"max_steps": 9}, AFTER),
        ("finetune", {"weight_decay": 0.1}, ["heal", *AFTER]),
        ("emulator", {"healing": {**HEALING, "steps": 5}}, ["heal", *AFTER]),
        ("emulator", {"healing": {**HEALING, "num_teacher_logits": 5}}, ["heal", *AFTER]),
        ("emulator", {"healing": {**HEALING, "r": 3}}, ["factorize", "heal", *AFTER]),
        ("emulator", {"quantization": "nf4"}, ["heal", *AFTER]),
        ("emulator", {"quantization": "int4"}, ["heal", *AFTER]),
    ],
)
def test_a_changed_config_redoes_what_depends_on_it(
    copied: FinishedRun, section: str, keys: dict[str, Any], expected: list[str]
) -> None:
    assert redone(copied.changed(**{section: keys})) == expected


def test_without_it_nothing_of_it_stays(copied: FinishedRun) -> None:
    assert redone(copied.changed(emulator={"healing": None})) == ["factorize", *AFTER]
    assert not (copied.root / "emulator_healed").exists()


def test_from_it_on(copied: FinishedRun) -> None:
    assert redone(copied.values, begin="heal") == ["heal", *AFTER]
    assert redone(copied.values) == []


def test_broken_off_in_each_part_it_goes_on_to_the_same_emulator(
    copied: FinishedRun, healed_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, steps = copied.values, int(HEALING["steps"])

    def await_stop(job: FinetuneJob) -> None:
        """Says how far it is, as the trainer does twice a second, and goes on once it is asked to stop."""
        job.step_path.write_text(json.dumps({"done": 6}))
        for _ in range(600):
            if job.stop_path.exists():
                break
            time.sleep(0.1)
        time.sleep(0.5)  # between two looks of the trainer

    act_in_training(monkeypatch, "heal", 6, tmp_path / "acted", await_stop)
    place = copied.root / "healing"

    def stop(when: int) -> set[str]:
        """Whatever was there before it was restarted is as it was."""
        before = {path: path.stat().st_ino for path in copied.root.rglob("logits-*")}
        with pytest.raises(Stopped):
            run_values(values, Stopping("heal", when), until="heal", begin=None if place.exists() else "heal")
        assert before.items() <= {path: path.stat().st_ino for path in copied.root.rglob("logits-*")}.items()
        return {path.name for path in place.iterdir()}

    assert "teacher" in stop(2)  # both of its shards
    assert "adapter" not in stop(8)
    assert {"adapter", "outcome.json"} <= stop(2 + steps + 1)
    outcome = json.loads((place / "outcome.json").read_text())
    assert [line["step"] for line in outcome["history"]] == list(range(1, steps + 1))
    reporter = run_values(values, until="heal")
    assert reporter.started == ["heal"]
    assert not place.exists()
    same_tensors(copied.root / "emulator_healed", healed_run.root / "emulator_healed", 1e-5)


def test_it_may_have_rows_of_its_own(copied: FinishedRun, healed_run: FinishedRun, tmp_path: Path) -> None:
    others = write_jsonl(
        tmp_path / "others.jsonl", [{"prompt": "write ", "completion": f"text {i}"} for i in range(50)]
    )
    data = {"healing": {"path": str(others), "num_samples": 20}}
    values = copied.changed(data=data, emulator={"healing": {**HEALING, "steps": 8}})
    reporter = run_values(values, until="heal")
    assert reporter.started == ["data", "heal"]
    metrics = json.loads((copied.root / "metrics.json").read_text())
    assert metrics["data"]["healing"]["rows"] == metrics["healing"]["teacher_rows"] == 20
    before, after = (json.loads((run.root / "manifest.json").read_text())["stages"] for run in (healed_run, copied))
    assert after["factorize"].pop("confirmed_at") > after["data"]["finished_at"]
    assert before["factorize"] == after["factorize"]
    assert redone(values) == AFTER
    reporter = run_values(copied.changed(emulator={"healing": {**HEALING, "steps": 8}}), until="factorize")
    assert reporter.started == ["data"]
    assert not (copied.root / "data" / "tokens" / "healing").exists()


def test_a_killed_worker_leaves_no_trace(
    copied: FinishedRun, healed_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = copied.changed(finetune={"save_steps": 1})
    act_in_training(monkeypatch, "heal", 4, tmp_path / "killed")
    reporter = run_values(values, begin="heal", until="heal")
    result = json.loads((copied.root / "manifest.json").read_text())["stages"]["heal"]["result"]
    assert result["sequences_per_second"] is None  # it went on from a checkpoint; it did not begin again
    assert any(re.match("heal: the training lost its worker because .*; restarted", note) for note in reporter.notes)
    same_tensors(copied.root / "emulator_healed", healed_run.root / "emulator_healed", 1e-5)


def test_a_damaged_shard_has_all_of_them_made_of_one_training(copied: FinishedRun, healed_run: FinishedRun) -> None:
    """The others would be of an adapter that is there no more, and training again may end in another."""
    damaged, *others = sorted((copied.root / "emulator_healed").glob("model-*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    before = {path: path.stat().st_ino for path in others}
    reporter = run_values(copied.changed(correction={"method": "none"}), until="correct")
    assert reporter.started == ["heal", "correct"]
    assert all(path.stat().st_ino != inode for path, inode in before.items())
    same_tensors(copied.root / "emulator_healed", healed_run.root / "emulator_healed", 1e-5)


def test_on_an_object_store_it_is_the_same(
    healed_run: FinishedRun, s3_port: int, node_cache: Path, tmp_path: Path
) -> None:
    place = uri(s3_port, "healed/run")
    run_values({**healed_run.values, "run_dir": place}, until="heal")
    store = RunDirectory(place).store
    assert store is not None
    assert not store.versions("healing")
    shutil.rmtree(node_cache)  # what is not in the store is gone
    fetch(RunDirectory(place).existing(), tmp_path / "run", ["emulator_healed"])
    # It was calibrated anew: its workers may have shared the rows otherwise, so that sums round otherwise, and steps with them.
    same_tensors(tmp_path / "run" / "emulator_healed", healed_run.root / "emulator_healed", 1e-4)


def test_tasks_that_tune_otherwise_share_it(
    ray_session: None, tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    cache = ArtifactCache(str(tmp_path / "shared"))
    one = {"num_workers": 1}
    found = []
    for name, rate in (("one", 1e-3), ("other", 2e-3)):
        values = make_values(
            tmp_path / name,
            tiny_model_dir("llama"),
            task_file,
            emulator={**one, "healing": {"steps": 2, "r": 4, "learning_rate": 1e-3}, "quantization": "nf4"},
            finetune={**one, "learning_rate": rate},
        )
        reporter = run_values(values, cache=cache, until="finetune")
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())["stages"]
        found.append(manifest["heal"]["result"].get("taken_from"))
        assert reporter.started == ["data", "calibrate", "factorize", "heal", "finetune"]
    assert found[0] is None
    assert found[1] is not None
    # In 4 bits only once it is healed.
    packed = {key for file in (tmp_path / "one").glob("*/*.safetensors") for key in load_file(file) if "nf4" in key}
    assert packed
    assert not any(
        "nf4" in key for file in (tmp_path / "one" / "emulator").glob("*.safetensors") for key in load_file(file)
    )


def test_ranks_by_the_data_are_those_that_it_ends_with(llama_run: FinishedRun, tmp_path: Path) -> None:
    run = llama_run.copy(tmp_path)
    values = run.changed(emulator={"allocation": "sensitivity", "healing": {**HEALING, "steps": 2}})
    run_values(values, until="finetune")
    allocated = json.loads((run.root / "allocation" / "ranks.json").read_text())["layers"]
    model = AutoModelForCausalLM.from_pretrained(run.root / "emulator_healed")
    ranks = {name: m.down.out_features for name, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert ranks == {name: layer["rank"] for name, layer in allocated.items() if layer["rank"] is not None}
    metrics = json.loads((run.root / "metrics.json").read_text())
    assert sum(parameter.numel() for parameter in model.parameters()) == metrics["emulator"]["parameters"]
