"""What a pass that keeps nothing holds at once, as planned, against what torch makes."""

from typing import Any

import pytest
import torch
from bare_runs import bare_run
from transformers import LlamaConfig, LlamaModel

from emloc_ray.modeling.block_activations import LiveBytes
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel

TOKENS = 512


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("attention", "heads_cached"), [("sdpa", 8), ("eager", 8), ("eager", 2)])
def test_a_pass_holds_what_is_planned(attention: str, heads_cached: int, dtype: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=heads_cached, dtype=dtype)
    prepared = bare_run(
        config,
        memory_budget=None,
        model={"source": "unused", "dtype": dtype, "attn_implementation": attention},
        data={"train": {"path": "unused"}, "max_seq_length": TOKENS},
        finetune={"per_device_train_batch_size": 1},
    )
    planned = MemoryModel(prepared, Lengths(TOKENS, TOKENS)).forward_bytes(TOKENS)

    config._attn_implementation = attention
    model = LlamaModel(config).to(getattr(torch, dtype))
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.no_grad():
        model(ids, use_cache=False)  # what is made once
        with LiveBytes([*model.parameters(), *model.buffers()]) as held:
            model(ids, use_cache=False)
    assert planned == pytest.approx(held.most, rel=0.05)
