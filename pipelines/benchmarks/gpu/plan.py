"""What the planner says that fine-tuning takes, from a model's config and the settings that memory depends on alone."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from emloc_ray.modeling.architecture import empty_model
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.skeleton import Skeleton, skeleton_of

R = 8  # of LoRA on every linear in the blocks


def planned_bytes(
    config: LlamaConfig, ranks: dict[str, int], rows: int, length: int, bits: dict[str, int] | None = None
) -> int:
    """Of a worker's fine-tuning with gradient checkpointing, the base in bfloat16; without its imports."""
    skeleton = _skeleton(config.to_json_string())
    names = tuple(spec.name for spec in skeleton.specs)
    sizes = skeleton.num_parameters, skeleton.head_parameters, skeleton.hidden_size
    compressed = tuple(ranks or bits or {})
    layout = Layout(skeleton.specs, skeleton.groups, ranks, compressed, names, names, *sizes, bits=bits or {})
    settings: Any = SimpleNamespace(
        memory_budget=float("inf"),
        budget_is_default=False,
        ray=SimpleNamespace(joins=False),
        model=SimpleNamespace(dtype="bfloat16", hold="resident"),
        adapter=SimpleNamespace(method="lora", lora_dropout=0.0, settings={"r": R}),
        finetune=SimpleNamespace(
            per_device_train_batch_size=rows,
            gradient_checkpointing=True,
            num_workers=1,
            deepspeed=None,
            packing=False,
            bf16=True,
            gpus=1.0,
            model_extra={},
        ),
    )
    prepared: Any = SimpleNamespace(
        config=settings,
        finetuning=SimpleNamespace(section=settings.finetune, adapter=settings.adapter, layout=layout),
        source=SimpleNamespace(gguf_file=None),
        model_config=config,
        file_dtype=torch.bfloat16,
        calibration_tokens=lambda mean: 0.0,
        gpu_bytes=None,
    )
    return total(MemoryModel(prepared, Lengths(length, length)).training_step_parts())


@functools.cache
def _skeleton(values: str) -> Skeleton:
    """Of the Llama whose config that is in JSON: made once, for it takes longer than the plan."""
    config = LlamaConfig(**json.loads(values))
    return skeleton_of(config, empty_model(config))
