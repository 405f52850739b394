"""A tiny Mistral Large 4, whose blocks read keys and values that others made, where transformers has it."""

from __future__ import annotations

from typing import Any

import transformers

MISTRAL: dict[str, Any] = {
    "image_token_index": 299,
    "text_config": {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "index_topk": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "kv_source_layers": [0, 1, 1, 1],
        "no_rope_layers": [1, 1, 1, 1],
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 16,
    },
}
TRANSFORMERS: Any = transformers  # 5.20, the newest for Python 3.10, has none
HAS_MISTRAL = hasattr(TRANSFORMERS, "MistralLarge4Config")
