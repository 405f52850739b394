"""What blocks keep for their backward pass, as planned, against what torch keeps of a block that is trained."""

from typing import Any

import pytest
import torch
from bare_runs import bare_run
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel

TOKENS = 96  # no width of the model, by which its tensors are told apart
HEADS, R = 4, 8


def kept(model: LlamaForCausalLM, narrow: bool, mask: Tensor | None) -> tuple[float, int]:
    """What the last block of a model with an adapter keeps beside parameters and what all blocks share: bytes of a token, and
    those that hold weights."""
    block = model.model.layers[-1]
    x = torch.randn(1, TOKENS, model.config.hidden_size, dtype=model.dtype).requires_grad_()
    angles = model.model.rotary_emb(x, torch.arange(TOKENS)[None])
    tensors: list[Tensor] = [*model.parameters(), *model.buffers(), *angles, *([] if mask is None else [mask])]
    before = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow),
    ):
        block(x, position_embeddings=angles, attention_mask=mask)
    mine = [tensor for at, tensor in saved.items() if at not in before and not isinstance(tensor, nn.Parameter)]
    of_tokens = [tensor for tensor in mine if TOKENS in tensor.shape]
    # Those of the adapter are planned with its optimizer.
    weights = [tensor for tensor in mine if tensor.ndim == 2 and TOKENS not in tensor.shape and R not in tensor.shape]
    return sum(map(num_bytes, of_tokens)) / TOKENS, sum(map(num_bytes, weights))


def num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("heads_cached", [HEADS, 2])
@pytest.mark.parametrize(
    ("dtype", "bf16", "dropout", "attention"),
    [
        ("bfloat16", True, 0.0, "sdpa"),
        ("bfloat16", True, 0.1, "sdpa"),
        ("bfloat16", True, 0.0, "eager"),
        ("bfloat16", False, 0.0, "sdpa"),
        ("float32", True, 0.0, "sdpa"),
        ("float32", False, 0.0, "sdpa"),
        ("float32", False, 0.1, "sdpa"),
        ("float32", False, 0.0, "eager"),
    ],
)
def test_a_block_keeps_for_its_backward_pass_what_is_planned(
    heads_cached: int, dtype: str, bf16: bool, dropout: float, attention: str
) -> None:
    check(heads_cached, dtype, bf16, dropout, attention, packing=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_block_keeps_of_packs_the_mask_and_keys_for_each_head(attention: str) -> None:
    check(2, "bfloat16", True, 0.0, attention, packing=True)


def check(heads_cached: int, dtype: str, bf16: bool, dropout: float, attention: str, packing: bool) -> None:
    """Compares the plan with a block of one row, or a pack, of :data:`TOKENS` tokens."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=heads_cached)
    prepared = bare_run(
        config,
        memory_budget=None,
        model={"source": "unused", "dtype": dtype, "attn_implementation": attention},
        data={"train": {"path": "unused"}, "max_seq_length": TOKENS},
        adapter={"r": R, "lora_dropout": dropout},
        finetune={"bf16": bf16, "packing": packing, "per_device_train_batch_size": 1},
    )
    memory = MemoryModel(prepared, Lengths(TOKENS, TOKENS))
    planned = memory.saved_in_training(memory.blocks[0])

    config._attn_implementation = attention
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
    attach_adapter(model, LoraConfig(r=R, lora_dropout=dropout, target_modules="all-linear")).train()
    mask = None
    if packing or attention == "eager":
        mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -1e9) if attention == "eager" else mask
    measured, weights = kept(model, bf16, mask)
    assert memory.cast_weights(memory.blocks[0], of_original=True) == weights
    assert measured <= planned * 1.005
    assert planned <= measured * 1.06
