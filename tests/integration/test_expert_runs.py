"""A mixture of experts, one of which no token is ever sent to, from end to end and through every trouble."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import FinishedRun, RecordingReporter, kill_worker, make_values, run_values
from tiny import EOS, save_lopsided
from transformers import AutoModelForCausalLM

from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.experts import experts_of

IDLE = "model.layers.1.mlp.experts.3.down"


@pytest.fixture(scope="session")
def run(ray_session: None, tmp_path_factory: pytest.TempPathFactory, task_file: Path) -> FinishedRun:
    """The whole model in each worker."""
    root = tmp_path_factory.mktemp("lopsided")
    model_dir = save_lopsided(root / "model")
    values = make_values(
        root / "run", model_dir, task_file, model={"hold": "resident"}, calibration={"min_expert_tokens": 64}
    )
    return FinishedRun(root / "run", values, model_dir, run_values(values))


class SecondPass(RecordingReporter):
    """Does something once, when the second pass of the calibration has its first unit done."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act, self.acted, self.last = act, False, 0

    def start(self, stage: str) -> Callable[[int, int], None]:
        super().start(stage)
        return self._progress if stage == "calibrate" else lambda done, total: None

    def _progress(self, done: int, total: int) -> None:
        again = done < self.last
        self.last = 10**9 if again else max(done, self.last)
        if self.last == 10**9 and done >= 1 and not self.acted:
            self.acted = True
            self.act()


def assert_same_grams(found: Path, expected: Path) -> None:
    ours, theirs = GramStore(found / "calibration"), GramStore(expected / "calibration")
    for key in ("num_tokens", "routed_tokens", "groups"):
        assert ours.index[key] == theirs.index[key]
    for name in theirs.index["groups"]:
        scale = float(theirs.read(name).diagonal().max())
        torch.testing.assert_close(ours.read(name), theirs.read(name), rtol=1e-4, atol=1e-5 * scale)


def calibration(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())["calibration"]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(EOS + 1, 300, (3, 17), generator=torch.Generator().manual_seed(3))
    return model.eval()(ids).logits


def test_the_idle_expert_is_made_of_all_tokens_and_that_is_told(run: FinishedRun) -> None:
    told = calibration(run.root)["experts"]
    assert (told["number"], told["never_routed"], told["plain_svd"]) == (8, 2, 0)
    assert told["reread_tokens"] == calibration(run.root)["num_tokens"]
    [note] = [note for note in run.reporter.notes if note.startswith("The router sent")]
    assert f"{told['too_few']} of 8 experts fewer than 64 tokens (2 none" in note
    store = GramStore(run.root / "calibration")
    assert store.index["routed_tokens"][IDLE] == 0
    assert store.num_tokens(IDLE) == told["reread_tokens"]
    assert not list((run.root / "calibration").rglob("slot-*"))


def test_parity_of_the_merged_model_with_plain_peft_on_the_original(run: FinishedRun) -> None:
    original = AutoModelForCausalLM.from_pretrained(run.model_dir)
    before = logits(original)
    adapted = logits(PeftModel.from_pretrained(original, run.root / "adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained(run.root / "merged"))
    scale = float(adapted.abs().max())
    assert float((merged - adapted).abs().max()) <= 1e-5 * scale
    assert float((adapted - before).abs().max()) > 1e-2 * scale
    config = json.loads((run.root / "adapter" / "adapter_config.json").read_text())
    assert any(name.endswith("experts.gate_up_proj") for name in config["target_parameters"])
    for folder in ("adapter", "adapter_emulator", "merged", "emulator"):
        for file in (run.root / folder).glob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def test_the_emulator_opens_by_the_auto_class_with_factors_in_every_expert(run: FinishedRun) -> None:
    emulator, said = AutoModelForCausalLM.from_pretrained(run.root / "emulator", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    for experts in experts_of(emulator).values():
        layers = [experts.get_submodule(f"{index}.{part}") for index in range(4) for part in ("gate_up", "down")]
        assert all(isinstance(layer, FactorizedLinear) for layer in layers)
    evaluation = run.metrics["evaluation"]
    assert evaluation["merged"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=1e-4)
    assert evaluation["emulator_adapter"]["loss"] < evaluation["emulator"]["loss"]


def test_some_experts_may_stay_dense_and_be_left_alone(run: FinishedRun, tmp_path: Path) -> None:
    values = run.changed(
        emulator={"exclude_modules": ["1.gate_up", "2.down"]},
        adapter={"exclude_modules": ["3.gate_up", "3.down", "q_proj"]},
    )
    values["run_dir"] = str(tmp_path / "run")
    run_values(values)
    emulator, said = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "emulator", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(run.model_dir)
    fused = original.get_submodule("model.layers.1.mlp.experts")
    dense = emulator.get_submodule("model.layers.1.mlp.experts.1.gate_up")
    assert torch.equal(dense.weight, fused.gate_up_proj[1])
    assert torch.equal(emulator.get_submodule("model.layers.0.mlp.experts.2.down").weight, fused_down(original, 0, 2))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert torch.equal(fused_down(merged, 1, 3), fused_down(original, 1, 3))
    assert not torch.equal(fused_down(merged, 1, 2), fused_down(original, 1, 2))
    adapted = logits(PeftModel.from_pretrained(original, tmp_path / "run" / "adapter"))
    assert float((logits(merged) - adapted).abs().max()) <= 1e-5 * float(adapted.abs().max())


def fused_down(model: Any, layer: int, index: int) -> torch.Tensor:
    return model.get_submodule(f"model.layers.{layer}.mlp.experts").down_proj[index]


@pytest.mark.deep
@pytest.mark.parametrize("hold", ["resident", "offloaded", "block_by_block"])
def test_a_worker_lost_in_the_second_pass_leaves_no_trace(run: FinishedRun, hold: str, tmp_path: Path) -> None:
    reporter = SecondPass(lambda: kill_worker("slot"))
    values = {**run.changed(model={"hold": hold}), "run_dir": str(tmp_path / "run")}
    run_values(values, reporter, until="calibrate")
    assert reporter.acted
    assert calibration(tmp_path / "run")["hold"] == hold
    assert_same_grams(tmp_path / "run", run.root)


@pytest.mark.deep
def test_a_run_stopped_in_the_second_pass_goes_on_with_the_first_ones_grams(run: FinishedRun, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    values = {**run.changed(model={"hold": "block_by_block"}), "run_dir": str(tmp_path / "run")}
    with pytest.raises(KeyboardInterrupt):
        run_values(values, SecondPass(stop), until="calibrate")
    first = next((tmp_path / "run" / "calibration").glob("grams-*.safetensors"))
    made = first.stat().st_mtime_ns
    run_values(values, until="calibrate")
    assert first.stat().st_mtime_ns == made
    assert_same_grams(tmp_path / "run", run.root)
