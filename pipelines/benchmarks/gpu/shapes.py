"""Models by their configs alone, with random weights on any device, and how their ranks are aligned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.core.unpacking import SCALE_STEPS
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model
from emloc_ray.modeling.emulator import factorize_modules
from emloc_ray.modeling.integer_linear import IntegerLinear

RATIO = 0.5


@dataclass(frozen=True)
class Shapes:
    """The measured shapes: ``model`` as a whole, one block of it and of ``large``, and ``linears (out, in)`` one by one.

    A micro-batch is ``rows`` of ``length`` tokens. Ranks are multiples of ``multiple``. ``effort`` is the share of the
    seconds of a full size that a case is expected to take.
    """

    name: str
    model: dict[str, int]
    large: dict[str, int]
    linears: tuple[tuple[int, int], ...]
    rows: int
    length: int
    multiple: int
    repeats: int
    effort: float

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length


def _llama(hidden: int, mlp: int, layers: int, heads: int, cached: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": cached,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "full": Shapes(
        "full",
        _llama(4096, 14336, 32, 32, 8, 128256),
        _llama(8192, 28672, 80, 64, 8, 128256),
        ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672)),
        rows=2,
        length=2048,
        multiple=64,
        repeats=5,
        effort=1.0,
    ),
    "tiny": Shapes(
        "tiny",
        _llama(64, 128, 2, 4, 2, 300),
        _llama(128, 256, 3, 8, 2, 300),
        ((64, 64), (128, 64), (64, 128)),
        rows=2,
        length=32,
        multiple=8,
        repeats=2,
        effort=0.0,
    ),
}


def llama_config(values: dict[str, int], **changes: int) -> LlamaConfig:
    """Its embedding and its head are apart."""
    sizes: dict[str, Any] = {**values, **changes}
    return LlamaConfig(**sizes, tie_word_embeddings=False, max_position_embeddings=8192)


def linears_of(config: LlamaConfig) -> list[LinearSpec]:
    """The linears inside its blocks."""
    return block_linears(empty_model(config))


def uniform_ranks(specs: list[LinearSpec], ratio: float, multiple: int = 1) -> dict[str, int]:
    """``r = ⌊ratio · out · in / (out + in)⌋``, down to a multiple, but to no less than that; dense layers are left out."""
    ranks = {spec.name: rank_for_ratio(spec.out_features, spec.in_features, ratio) for spec in specs}
    return {name: max(rank // multiple, 1) * multiple for name, rank in ranks.items() if rank is not None}


def random_llama(
    config: LlamaConfig,
    device: torch.device,
    ranks: dict[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    bits: dict[str, int] | None = None,
) -> Any:
    """A Llama, or its emulator of these ``ranks`` or of integers of these ``bits``, with random weights; a replaced dense
    weight is never made."""
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        factorize_modules(model, ranks or {}, integers=IntegerForms(bits or {}))
    model.to(dtype).to_empty(device=device)
    model.config.dtype = dtype
    return fill_randomly(model).eval()


@torch.no_grad()
def fill_randomly(model: Any) -> Any:
    """Frozen normal weights, norms of 1, and the rotary frequencies, which are no parameters, computed."""
    with model.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif name.endswith((".up.weight", ".down.weight")):
            parameter.normal_(std=(0.02 / min(parameter.shape) ** 0.5) ** 0.5)  # so that their product is of 0.02
        else:
            parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            _fill_integers(module)
    return model


def _fill_integers(layer: IntegerLinear) -> None:
    """Codes of all values, the scales such that weights have a standard deviation of 0.02, about 0."""
    deviation = 2**layer.bits / 12**0.5
    layer.get_buffer(f"int{layer.bits}").random_(0, 256)
    layer.get_buffer("zeros").fill_(127)
    layer.get_buffer("scales").fill_(128)
    layer.get_buffer("exponent").fill_(round(math.log2(0.02 / deviation)) - 128 // SCALE_STEPS)


def random_batch(rows: int, length: int, vocabulary: int, device: torch.device, padded: bool = False) -> dict[str, Any]:
    """Rows of random tokens, all of them of the completion; ``padded``: the last one ends in a token of padding."""
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, length, dtype=torch.long)
    if padded:
        mask[-1, -1] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask.bool()}
    return {key: value.to(device) for key, value in batch.items()}
