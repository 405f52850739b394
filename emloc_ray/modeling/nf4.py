"""NF4: weights in 4 bits (QLoRA, arXiv 2305.14314, section 3), laid out as transformers stores bitsandbytes' weights.

Quantile levels of a normal distribution times the largest magnitude of 64 consecutive elements; these magnitudes, less
their mean, in 8 bits, 256 to a block ("double quantization"): 4.13 bits an element. Both are QLoRA's, fixed: they halve
what scales cost at no measurable loss, and one layout is what emulators, correction and planner have to agree on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from emloc_ray.core.products import is_finite
from emloc_ray.errors import NumericsError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK = 64  # elements that share a scale, along the rows of a weight as it lies in memory
_NESTED_BLOCK = 256  # scales that share one
_STATE = "quant_state.bitsandbytes__nf4"
STATE_KEYS = tuple(f"weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE))
_CONSTANT_BYTES = 4 * (16 + 256) + 170  # of a weight: both tables of levels, and its shape and dtype as JSON
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def quantize_nf4(weight: Tensor, dtype: torch.dtype, name: str = "the layer") -> dict[str, Tensor]:
    """``weight (out, in)``, of any floating dtype, in 4 bits as the tensors of a checkpoint, by what follows the module's name.

    Rounded once, from float32; ``dtype`` is what :func:`dequantize_nf4` gives back, 16-bit floats or float32. Raises
    NumericsError, with the layer's ``name``, where the weight holds a NaN or an Inf.
    """
    from bitsandbytes.functional import quantize_4bit

    if not is_finite(weight):
        raise NumericsError(f"The weight of {name} holds a NaN or an Inf.")
    packed, state = quantize_4bit(
        weight.detach().float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype if dtype in _FLOATS else torch.float32
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def dequantize_nf4(tensors: Mapping[str, Tensor]) -> Tensor:
    """What :func:`quantize_nf4` made its ``tensors`` of, as nearly as they tell: ``(out, in)`` in the dtype they name."""
    from bitsandbytes.functional import QuantState

    packed = tensors["weight"]
    parts = {key: value for key, value in tensors.items() if key.startswith("weight.")}
    return nf4_weight(packed, QuantState.from_dict(parts, packed.device))


def nf4_weight(packed: Tensor, state: QuantState) -> Tensor:
    """The weight ``(out, in)`` that ``packed`` and its state stand for.

    By bitsandbytes on GPUs. Not on CPUs: its AVX-512 kernel (0.50) reads other scales than it should where the inner size
    is no multiple of 64, as the ranks of factors seldom are, with errors of 24 % instead of 9 %.
    """
    if packed.device.type != "cpu":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(packed, state)
    scales = state.absmax
    if state.nested:
        shared = state.state2.absmax.repeat_interleave(_NESTED_BLOCK)[: scales.numel()]
        scales = state.state2.code[scales.int()] * shared + state.offset
    levels = state.code
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # of a byte: high half, low half
    flat = packed.reshape(-1)
    padded = nn.functional.pad(flat, (0, scales.numel() * BLOCK // 2 - flat.numel()))
    values = nn.functional.embedding(padded.int(), pairs).view(-1, BLOCK).mul_(scales[:, None])
    return values.view(-1)[: math.prod(state.shape)].view(state.shape).to(state.dtype)


def is_nf4(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a module's tensors are as :func:`quantize_nf4` makes them."""
    return f"weight.{_STATE}" in tensors


def module_weight(module: Any) -> Tensor:
    """A linear's weight in the dtype it computes in, in 4 bits or not."""
    weight: Tensor = module.weight.detach()
    state = getattr(module.weight, "quant_state", None)
    return weight if state is None else nf4_weight(weight, state)


def nf4_bytes(out_features: int, in_features: int) -> int:
    """Bytes of a weight in 4 bits, its scales and tables included: on disk, and in memory."""
    size = out_features * in_features
    blocks = math.ceil(size / BLOCK)
    return math.ceil(size / 2) + blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + _CONSTANT_BYTES


def replaceable_linears(model: nn.Module) -> tuple[str, ...]:
    """The linears that transformers puts 4-bit ones in place of where it is not told to skip them, in the model's order."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    return tuple(
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    )


def quantization_config(dtype: torch.dtype, skipped: tuple[str, ...]) -> dict[str, Any]:
    """``quantization_config`` of a config.json whose model holds weights of :func:`quantize_nf4`; ``skipped`` does not."""
    import re

    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # Whole names: transformers takes plain ones for endings of others too.
        llm_int8_skip_modules=[f"{re.escape(name)}$" for name in skipped],
    ).to_dict()
