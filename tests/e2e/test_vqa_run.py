"""A tiny vision-language model that names the highest bar of a chart learns to name the lowest, through its emulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_runs import make_values, run_values
from vlms import small_llava

from emloc_ray.data.formats import Tokens, encode, sequences
from emloc_ray.data.images import load_images
from emloc_ray.data.processors import ImageInputs, open_processor
from emloc_ray.data.token_shards import collate
from emloc_ray.demos.vqa import VqaTask, examples, generate, messages
from emloc_ray.modeling.loss import token_loss

pytestmark = pytest.mark.deep

SIDE = 24
CHARTS: dict[str, Any] = {"image_size": SIDE, "kinds": ("chart",), "max_bars": 3}
ONE = {"num_workers": 1}


def rows(task: VqaTask, processor: Any) -> list[Tokens]:
    found = []
    for example in examples(task):
        row = {"messages": messages(example)}
        shown = load_images(row, "here")
        found += sequences(row, "messages", processor.tokenizer, "here", False, processor, shown)
    return encode(found, processor.tokenizer)


def pretrained(directory: Path) -> Path:
    """A model that says which bar is the highest, trained for some seconds: an emulator needs something to emulate."""
    small_llava(directory, SIDE)
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory).train()
    processor = open_processor(str(directory))
    seen = rows(VqaTask(num_rows=2500, questions=("highest",), seed=7, **CHARTS), processor)
    batch = collate(seen, 0, ImageInputs(directory))
    steps, size, rate = 180, 48, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(steps):
        chosen = torch.randint(0, len(seen), (size,), generator=generator)
        loss = token_loss(model, {key: value[chosen] for key, value in batch.items()}, "completion")
        optimizer.zero_grad()
        (loss.loss_sum / loss.num_tokens).backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    model.save_pretrained(directory)
    return directory


def test_a_held_out_accuracy_far_above_chance_survives_the_merge(ray_session: None, tmp_path: Path) -> None:
    model_dir = pretrained(tmp_path / "model")
    generate(tmp_path / "rows", VqaTask(num_rows=2400, questions=("lowest",), **CHARTS))
    splits = {
        name: {"path": str(tmp_path / "rows" / f"{name}.parquet")} for name in ("calibration", "selection", "eval")
    }
    values = make_values(
        tmp_path / "run",
        model_dir,
        tmp_path / "rows" / "train.parquet",
        data={"format": "messages", "max_seq_length": 128, **splits},
        calibration={**ONE, "num_calibration_samples": 96},
        emulator={
            **ONE,
            "compression_ratio": 0.7,
            "ratios": {r".*vision_tower\..*": 0.8, r".*projector\..*": 1.0},
        },
        adapter={"r": 16, "lora_alpha": 32},
        finetune={
            **ONE,
            "cpus_per_worker": 2,
            "max_steps": 320,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "gradient_checkpointing": False,
            "logging_steps": 20,
        },
        correction={"method": "auto", "num_selection_samples": 48},
        merge=ONE,
        evaluation={**ONE, "num_samples": 200, "num_exact_match": 150, "max_new_tokens": 10, "batch_size": 50},
    )
    run_values(values)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    exact, evaluation = metrics["exact_match"], metrics["evaluation"]
    # Whoever names a colour that the chart shows is right in five of twelve cases; the original names the highest bar.
    assert exact["num_prompts"] == 150
    assert exact["original"] < 0.2
    assert exact["merged"] > 0.7
    assert evaluation["merged"]["token_accuracy"] == pytest.approx(evaluation["corrected"]["token_accuracy"], abs=0.01)
    assert evaluation["merged"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=1e-3)
