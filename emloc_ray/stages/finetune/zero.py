"""DeepSpeed ZeRO in a worker of Ray Train: what has to be done otherwise where state is scattered over the ranks.

DeepSpeed opens its own checkpoints with pickle: a training under ZeRO runs whatever code its run directory holds.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def join_as_deepspeed_rank() -> dict[str, Any]:
    """Makes this worker, already in Ray Train's process group, a rank of DeepSpeed; before TrainingArguments are made. Returns
    the arguments that TrainingArguments needs for it."""
    # What DeepSpeed compiles it compiles with ninja, which is where this Python is; the path need not say so.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if torch.cuda.is_available():
        return {}
    import deepspeed
    from accelerate import PartialState

    # An all-reduce that ZeRO does not use; compiling it takes more than a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Left to itself accelerate takes every rank on a CPU for a world of its own, or leaves DeepSpeed out.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"accelerator_config": {"use_configured_state": True}}


@contextlib.contextmanager
def scattered_in(dtype: torch.dtype) -> Iterator[None]:
    """While it lasts ZeRO-3 scatters the weights of a model that is loaded in this dtype, not in float32. DeepSpeed has one
    dtype for all weights, float32 unless it also trains in 16 bits; frozen ones may have their own."""
    from transformers.integrations.deepspeed import deepspeed_config

    config = deepspeed_config() or {}
    key = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if key is None or any(config.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        yield
        return
    before = config[key]
    config[key] = {**before, "enabled": True}
    try:
        yield
    finally:
        config[key] = before


def step_was_finite(engine: Any) -> bool:
    """Whether the step that a DeepSpeed engine has just done came from finite gradients; the same on every rank. A step that
    float16 skips while it looks for its loss scale counts as finite."""
    if engine.fp16_enabled():
        return True
    norm = engine.get_global_grad_norm()
    if norm is None:  # no ZeRO, or told not to compute it: weights are whole then
        return all(bool(torch.isfinite(p).all()) for p in engine.parameters() if p.requires_grad)
    return math.isfinite(norm) and norm >= 0  # -1 is how it says NaN


def whole_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """The trainable parameters in float32, each gathered from all ranks, which all have to call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gathered = safe_get_full_fp32_param(parameter)
            whole[name] = (parameter if gathered is None else gathered).detach().to("cpu", torch.float32, copy=True)
    return whole
