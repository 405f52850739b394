"""One process that runs the original, or fine-tunes its emulator, and prints the peak of its memory as JSON.

    python pipelines/memory_probe.py inference MODEL_DIR --rows 1 --length 512
    python pipelines/memory_probe.py finetune EMULATOR_DIR --rows 1 --length 512

The peak is above what the imports took: the resident set on a CPU, the allocator's peak on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import peft  # noqa: F401  part of the baseline
import psutil
import torch

from emloc_ray.modeling.adapter import attach_adapter, lora_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import token_loss


def peak_bytes() -> int:
    """The most that this process, or its GPU allocator, has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def inference(directory: Path, ids: torch.Tensor) -> None:
    """Prefill of the original with its KV cache, logits of the last token."""
    model = load_model(directory)
    with torch.no_grad():
        model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1)


def finetune(directory: Path, ids: torch.Tensor, steps: int, r: int) -> None:
    """Steps of LoRA on every linear of the emulator's blocks, as the stage takes them; every token is a label."""
    model = load_model(directory)
    targets = [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]
    targets = targets or [spec.name for spec in block_linears(model)]
    model = attach_adapter(model, lora_config(target_modules=targets, r=r, lora_alpha=2 * r))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    mask = torch.ones_like(ids)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask.bool()}
    for _ in range(steps):
        result = token_loss(model, {key: value.to(model.device) for key, value in batch.items()}, "all")
        (result.loss_sum / result.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["inference", "finetune"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    baseline = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    ids = torch.randint(3, 1000, (arguments.rows, arguments.length), generator=torch.Generator().manual_seed(0))
    if arguments.what == "inference":
        inference(arguments.directory, ids)
    else:
        finetune(arguments.directory, ids, steps=2, r=arguments.r)
    print(json.dumps({"baseline": baseline, "peak": peak_bytes() - baseline}))


if __name__ == "__main__":
    main()
