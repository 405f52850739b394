"""A small model and a small task, made on the spot: what the fault matrix runs where no config names others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizer import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from emloc_ray.io.formats.yaml_text import write_yaml

_VOCABULARY = 300
_ROWS = 2400


def make_config(folder: Path, hidden_size: int = 192) -> Path:
    """A config in ``folder``, beside the model and the data that it names: two workers a stage, several pieces of work each."""
    folder.mkdir(parents=True, exist_ok=True)
    two = {"num_workers": 2}
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "memory_budget": None,  # inference of a tiny model takes less than a batch's activations
        "model": {"source": str(_make_model(folder / "model", hidden_size))},
        "data": {"train": {"path": str(_make_rows(folder / "rows.jsonl"))}, "format": "prompt_completion"},
        "calibration": {**two, "num_calibration_samples": 320, "rows_per_shard": 16, "batch_size": 2},
        "emulator": {**two, "compression_ratio": 0.5, "healing": {"steps": 16}},
        "adapter": {"r": 4, "lora_alpha": 16},
        "finetune": {**two, "max_steps": 16, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4},
        "correction": {"num_selection_samples": 32, "max_share": None},
        "merge": two,
        "evaluation": {**two, "num_samples": 64, "num_exact_match": 4, "num_generations": 2, "max_new_tokens": 8},
    }
    values["data"]["max_seq_length"] = 64
    config = folder / "config.yaml"
    config.write_text(write_yaml(values))
    return config


def _make_model(directory: Path, hidden_size: int) -> Path:
    """A random Llama of four blocks with a byte-level tokenizer; 192 wide it is a dozen shards."""
    byte_level(["the sum of the two numbers is"], _VOCABULARY).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 3,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory, max_shard_size="500KB")
    return directory


def _make_rows(path: Path) -> Path:
    """Sums in words, as prompts and completions."""
    rows = ({"prompt": f"add {i} and {i % 97}: ", "completion": f"the sum is {i + i % 97}"} for i in range(_ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
