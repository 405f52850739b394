"""The Hugging Face Trainer's own loop on the pretend device: how often the host waits from one step to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import TARGETS, settings
from pretend_device import Meter
from stage_artifacts import write_tokens
from tiny import save_emulator
from transformers import AutoConfig

from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.stages.finetune import training
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import LoneSession, own_environment
from emloc_ray.stages.finetune.trainer import EmulatorTrainer

PASSES, LOGGED = 2, 3  # of a step; every so many steps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, meter: Meter) -> list[Counter[str]]:
    """What the host waited for before each forward pass since the one before it, and at last since the last."""
    waits: list[Counter[str]] = []

    class Watched(EmulatorTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.look()
            return super().training_step(*args, **kwargs)

        def save_adapter(self) -> None:
            """Nothing: safetensors reads no memory of the device."""
            self.look()

        def look(self) -> None:
            waits.append(meter.waits.copy())
            meter.restart()

    monkeypatch.setattr(training, "EmulatorTrainer", Watched)
    return waits


@pytest.mark.slow
def test_the_host_waits_once_a_step_and_once_more_where_it_logs(
    steps: list[Counter[str]],
    device: torch.device,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the gradients' norm, which says that they are numbers and which the log has too, and for the log's loss."""
    model_dir = tiny_model_dir("llama")
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    arguments = {"gradient_checkpointing": True, "gradient_accumulation_steps": PASSES, "logging_steps": LOGGED}
    losses = []
    for where in (str(device), "cpu"):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", where)
        job = FinetuneJob(
            emulator_dir=save_emulator(model_dir, tmp_path / where / "emulator"),
            tokens_dir=write_tokens(tmp_path / where / "tokens", 20, 5),
            out_dir=tmp_path / where / "adapter",
            storage_dir=tmp_path / where,
            name="training",
            adapter=settings("lora", "llama", [spec.name for spec in specs]),
            portable_targets=TARGETS["llama"],
            base_model="the/original",
            max_steps=5,
            batch_size=2,
            training_arguments={**arguments, "save_strategy": "no", "learning_rate": 0.01, "use_cpu": where == "cpu"},
            model_options={"device": where},
        )
        steps.clear()
        with own_environment():
            losses.append(training.train(job, LoneSession(tmp_path / where / "session"))["train_loss"])
        if where != "cpu":
            # Without the first, which warms it, and the last, after which there is no other.
            between = [sum(steps[k : k + PASSES], Counter()) for k in range(1 + PASSES, len(steps) - PASSES, PASSES)]
            assert between == [{"_local_scalar_dense": waits} for waits in (1, 2, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
