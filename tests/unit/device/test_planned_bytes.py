"""What each stage of a whole run takes of a device at its peak, beside what is planned."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from plain_runs import plain_run
from pretend_device import Meter
from small_runs import task_rows, write_jsonl

from emloc_ray.modeling import block_weights, loading
from emloc_ray.planning import machine
from emloc_ray.planning.plan import make_plan
from emloc_ray.stages.finetune.session import own_environment
from emloc_ray.stages.order import STEPS

pytestmark = [pytest.mark.usefixtures("small_parts"), pytest.mark.slow]

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "mixtral": {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 384},
    "gpt2": {"n_inner": 512},
}
BY_PREDICTIONS = {"compression_ratio": 0.3, "allocation": "sensitivity", "objective": "predictions"}
HEALED = {"emulator": {**BY_PREDICTIONS, "healing": {"steps": 2}}}
IN_BITS = {"emulator": {"budget": "2.4 bits"}}
REFINED = {"emulator": {"compression_ratio": 0.3, "refinement": {"steps": 2}}}


@pytest.fixture(autouse=True)
def models_are_there(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are on the pretend device, in this process where planning has made accelerate choose another; its tensors are
    written by way of the CPU."""
    inner = PeftModel.save_pretrained

    def save(self: Any, *args: Any, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> None:
        state = self.state_dict() if state_dict is None else state_dict
        inner(self, *args, state_dict={name: tensor.cpu() for name, tensor in state.items()}, **kwargs)

    figures = {"compute_cap": ("8.9",), "memory.total": ("24000",)}
    monkeypatch.setattr(machine, "ask_gpus", lambda what: figures.get(what, ()))
    for module in (loading, block_weights):
        monkeypatch.setattr(module, "own_device", lambda: str(device))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
    monkeypatch.setattr(PeftModel, "save_pretrained", save)


def values(root: Path, model_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    gpu = {"gpus_per_worker": 1}
    sections: dict[str, dict[str, Any]] = {
        "model": {"source": str(model_dir), "attn_implementation": "eager"},  # as the pretend device has it
        "calibration": {"num_calibration_samples": 16, "batch_size": 8, "rows_per_shard": 8, **gpu},
        "emulator": {"rank_multiple": 8, **gpu},
        "adapter": {"r": 4},
        "finetune": {"max_steps": 2, "exact_steps": 2, "per_device_train_batch_size": 8, "bf16": False, **gpu},
        "correction": {"max_share": None, "num_selection_samples": 16},
        "evaluation": {"batch_size": 8, "num_exact_match": 4, "num_generations": 4, "max_new_tokens": 4, **gpu},
    }
    sections["finetune"] |= {"gradient_checkpointing": False, "use_cpu": False, "save_strategy": "no"}
    data = {"train": {"path": str(write_jsonl(root / "rows.jsonl", task_rows(60)))}, "max_seq_length": 64}
    return {
        "run_dir": str(root / "run"),
        "memory_budget": None,
        "ray": {"num_gpus": 1, "num_cpus": 8},
        "data": {**data, "format": "prompt_completion"},
        **{name: {**section, **changes.get(name, {})} for name, section in sections.items()},
    }


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("llama", "float32", HEALED),
        ("llama", "bfloat16", {**REFINED, "finetune": {"gradient_checkpointing": True}}),
        ("gpt2", "float32", HEALED),
        ("mixtral", "float32", HEALED),
        pytest.param("mixtral", "bfloat16", IN_BITS, marks=pytest.mark.deep),
        pytest.param("llama", "float32", {**IN_BITS, "model": {"hold": "block_by_block"}}, marks=pytest.mark.deep),
    ],
)
def test_a_stage_takes_at_its_peak_what_is_planned(
    family: str,
    dtype: str,
    changes: dict[str, Any],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    device: torch.device,
    meter: Meter,
) -> None:
    peaks: dict[str, int] = {}

    @contextmanager
    def during(stage: str) -> Iterator[None]:
        AcceleratorState._reset_state(True)
        gc.collect()
        meter.restart()
        before = meter.current
        yield
        peaks[stage] = meter.peak - before

    model_dir = tiny_model_dir(family, dtype=dtype, **SIZES[family])
    with own_environment():
        run = plain_run(values(tmp_path, model_dir, changes), model_dir, during, device=str(device))
    planned = make_plan(STEPS, run.context.prepared).gpu_bytes
    assert {"calibrate", "factorize", "finetune", "correct", "finish", "evaluate"} <= planned.keys()
    assert planned.keys() <= peaks.keys()
    shares = {stage: round(peaks[stage] / held, 3) for stage, held in planned.items()}
    assert {stage: share for stage, share in shares.items() if not 0.5 <= share <= 1} == {}, shares
    assert [stage for stage, peak in peaks.items() if peak and stage not in planned] == []
