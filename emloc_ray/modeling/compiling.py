"""``torch.compile`` of a model's blocks, one by one.

The head is left out. It computes where labels are, at other places in every batch, and would be compiled anew at each step; the
Trainer compiles the whole model. So are linears in few bits: a graph would unpack their weights once, and keep them for the
backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import block_names

KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # of TrainingArguments
_GRAPHS = 8  # of a block: the first batch's length and any, with gradients and without


def is_compiled(arguments: Mapping[str, Any]) -> bool:
    """Whether these arguments of a training ask for it, as TrainingArguments reads them."""
    return any(arguments.get(key) for key in KEYS)


def check_compiling(has_experts: bool, is_scattered: bool, comes_and_goes: bool) -> None:
    """Raises ConfigError where a block is no graph: it would be compiled anew for each batch, or runs by hooks."""
    reasons = {
        "experts, which run on other numbers of tokens in every batch": has_experts,
        "finetune.deepspeed, which gathers weights while a block runs": is_scattered,
        "weights that come and go while a block runs, as they do within this memory_budget": comes_and_goes,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"finetune.torch_compile does not go with {reason}: remove it.")


def compile_blocks(model: Any, arguments: Mapping[str, Any]) -> None:
    """Has each block compiled when it first runs, in place; blocks that are alike share a graph."""
    from torch._dynamo import config, disable

    from emloc_ray.modeling.integer_linear import FrozenLinear

    names = block_names(model)
    limit = _GRAPHS * len(names)  # else blocks of many ranks run as they are, in silence
    config.recompile_limit = limit
    options = {"backend": arguments.get(KEYS[1]) or "inductor", "mode": arguments.get(KEYS[2])}
    # From torch 2.13 on the config is each thread's own, and autograd's computes checkpointed blocks again.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = limit
    if arguments.get("tf32"):  # which the Trainer sets by a name that inductor cannot ask for
        torch.set_float32_matmul_precision("high")
    for name in names:
        block = model.get_submodule(name)
        for module in block.modules():
            if isinstance(module, FrozenLinear):
                setattr(module, "forward", disable(module.forward))  # noqa: B010
        block.compile(**options)
