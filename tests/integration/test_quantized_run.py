"""Runs with emulators in few bits, from end to end: in NF4 at a ratio of 0.25 ("25 % + QLoRA"), QLoRA itself at 1.0, and in
integers with factors beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_differences import assert_covariance_corrects
from peft import PeftModel
from small_runs import FinishedRun, redone
from transformers import AutoModelForCausalLM

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.emulator_weights import emulator_weight
from emloc_ray.planning.prepared import prepare

FORMS: tuple[dict[str, object], ...] = (
    {"quantization": "nf4", "compression_ratio": 0.25},
    {"quantization": "nf4", "compression_ratio": 1.0},
    {"quantization": "int4", "ratios": {"v_proj": 1.0}, "residual_rank": 4, "group_size": 16},
)


@pytest.fixture(scope="session", params=FORMS, ids=["factors", "dense", "integers"])
def quantized_run(request: pytest.FixtureRequest, make_run: Callable[..., FinishedRun], task_file: Path) -> FinishedRun:
    return make_run(
        task_file,
        "qwen2",  # biases
        "bfloat16",
        # One linear that compression leaves alone: in 4 bits all the same, and without a Gram.
        emulator={**request.param, "exclude_modules": ["layers.1.mlp.down_proj"]},
        correction={"method": "covariance", "clamp": None},
    )


def weights(run: FinishedRun, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's weight, and what the emulator stores of it."""
    original, emulator = Checkpoint(run.model_dir), Checkpoint(run.root / "emulator")
    weight = original.read(f"{name}.weight").double()
    stored = emulator_weight(emulator, name, weight.shape[1])
    assert stored is not None
    return weight, stored.rows().double()


def test_everything_inside_the_blocks_is_in_4_bits_and_counted(quantized_run: FinishedRun) -> None:
    run, told = quantized_run, quantized_run.metrics["emulator"]
    emulator = Checkpoint(run.root / "emulator")
    wide = {entry.name for entry in emulator if entry.dtype == torch.bfloat16}
    assert not [name for name in wide if name.endswith("proj.weight")]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= wide
    assert told["quantization"] in ("nf4", "int4")
    assert told["bytes"] == emulator.num_bytes
    index = json.loads((run.root / "emulator" / "model.safetensors.index.json").read_text())
    # Rows of integers end with a byte: half of one is counted with them.
    assert told["parameters"] == pytest.approx(index["metadata"]["total_parameters"], rel=0.01)
    page = (run.root / "report.html").read_text()
    assert "in 4 bits" in page


def test_errors_told_are_of_what_is_stored(quantized_run: FinishedRun) -> None:
    told = quantized_run.metrics["emulator"]["layers"]
    grams = GramStore(quantized_run.root / "calibration")
    assert len(told) == 13
    for name, layer in told.items():
        (weight, stored), gram = weights(quantized_run, name), grams.read(name).double()
        left, whole = ((m @ gram @ m.T).trace() for m in (weight - stored, weight))
        assert layer["relative_error"] == pytest.approx(float((left / whole).sqrt()), rel=1e-2)


def test_correction_takes_out_the_difference_to_the_weights_in_4_bits(quantized_run: FinishedRun) -> None:
    run = quantized_run
    trained, corrected = Adapter(run.root / "adapter_emulator"), Adapter(run.root / "adapter")
    grams = GramStore(run.root / "calibration")
    for name in trained.names:
        weight, stored = weights(run, name)
        gram = grams.read(name) if name in grams else None
        assert_covariance_corrects(weight, stored, trained.module(name), corrected.module(name), gram, name)


def test_the_adapter_loads_on_the_original_and_is_what_was_merged(quantized_run: FinishedRun) -> None:
    run = quantized_run
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(run.model_dir, dtype=torch.float32)
        served = PeftModel.from_pretrained(original, run.root / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run.root / "merged", dtype=torch.float32)(ids).logits
    assert float((served - merged).abs().max() / served.abs().max()) < 1e-2  # merged in bfloat16
    losses = {variant: scores["loss"] for variant, scores in run.metrics["evaluation"].items()}
    assert losses["emulator_adapter"] < losses["emulator"]
    assert losses["corrected"] < losses["original"]


def test_the_quantization_is_among_the_inputs(quantized_run: FinishedRun) -> None:
    assert redone(quantized_run.values) == []
    changed = quantized_run.changed(emulator={"quantization": "none", "residual_rank": 0, "compression_ratio": 0.25})
    assert redone(changed)[:2] == ["factorize", "finetune"]


def test_lora_on_the_original_in_4_bits_is_no_upper_bound(quantized_run: FinishedRun) -> None:
    values = quantized_run.changed(evaluation={"upper_bound": str(quantized_run.root)})
    with pytest.raises(
        ConfigError, match=r"is no finished run at ratio 1\.0 in floats: .* emulator\.quantization=none"
    ):
        prepare(parse_config(values))
