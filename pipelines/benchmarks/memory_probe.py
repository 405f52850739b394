"""One process that runs inference of a model, or trains on an emulator, and prints the peak of its memory as JSON.

    python pipelines/benchmarks/memory_probe.py inference MODEL_DIR --rows 1 --length 512
    python pipelines/benchmarks/memory_probe.py finetune EMULATOR_DIR --rows 1 --length 512

``peak`` is the most bytes held above what the imports took: the resident set on a CPU, the allocator's peak on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import peft  # noqa: F401  part of the baseline
import psutil
import torch

from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.loss import token_loss


def held_bytes() -> int:
    """What this process, or its GPU allocator, holds."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most that it has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def opened(directory: Path) -> Any:
    """A model, every page of it touched: checkpoints are mapped lazily."""
    model = open_model(directory, "resident")
    for parameter in model.parameters():
        float(parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum())
    return model


def inference(directory: Path, rows: int, length: int) -> None:
    """Prefill of the original with its KV cache, logits of the last token."""
    model = opened(directory)
    with torch.no_grad():
        ids = _random_ids(rows, length, model.config.vocab_size)
        model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1)


def finetune(directory: Path, rows: int, length: int) -> None:
    """Two steps of LoRA on every linear of the emulator's blocks, as the stage takes them; half of a row is completion."""
    model = opened(directory)
    targets = [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]
    targets = targets or [spec.name for spec in block_linears(model)]
    model = attach_adapter(model, adapter_config(target_modules=targets, r=8, lora_alpha=16))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = {key: value.to(model.device) for key, value in _batch(rows, length, model.config.vocab_size).items()}
    for _ in range(2):
        result = token_loss(model, batch, "all")
        (result.loss_sum / result.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def _batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = _random_ids(rows, length, vocabulary)
    completion = (torch.arange(length) >= length // 2).expand(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def _random_ids(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, min(1000, vocabulary), (rows, length), generator=torch.Generator().manual_seed(0))


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["inference", "finetune"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    baseline = 0 if torch.cuda.is_available() else held_bytes()
    measured = {"inference": inference, "finetune": finetune}[arguments.what]
    measured(arguments.path, arguments.rows, arguments.length)
    print(json.dumps({"baseline": baseline, "peak": peak_bytes() - baseline}))


if __name__ == "__main__":
    main()
