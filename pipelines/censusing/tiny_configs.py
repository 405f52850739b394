"""A tiny config of any model type of transformers, made from its default one by rules for the names of its keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCABULARY = 300
PAD, EOS = 0, 1
_FIRST_SPECIAL = 280  # ids of tokens for images and the like, which no text has

# What a key becomes whose whole name matches: the first that does. Only integers are changed.
_RULES: tuple[tuple[str, int], ...] = (
    (r"(un)?(padded_)?(\w+_)?vocab_size(_\w+)?|vocab_offset|num_codes", VOCABULARY),
    (r"pad_token_id|_pad_token_id", PAD),
    (r"(bos|eos|sep|cls|decoder_start)_token_id", EOS),
    (
        r"(max|n|num)_(position\w*|ctx|source_positions|target_positions|seq_len|sequence_length)|n_ctx|context_length"
        r"|model_max_length|max_position_embeddings|\w+_max_position_embeddings|max_seq_len",
        128,
    ),
    (r"num_kv_shared_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|\w+_layer_offset|num_hash_layers", 1),
    (
        r"(\w+_)?(num|n)_?(\w+_)*layers?(_\w+)?|\w*depth|layers|(en|de)coder_layers|num_blocks|(\w+_)?layer_period"
        r"|(n|num)_layers?",
        2,
    ),
    (r"linear_num_key_heads|mamba_n_groups|n_groups|num_query_groups", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),  # times the size of a head they are twice the hidden size
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"mamba_d_ssm", 128),
    (r"\w*(num_)?(key_value|kv)_heads|num_kv_heads|n_mamba_heads", 2),
    (r"index_n_heads|num_ln_in_parallel_attn", 2),
    (r"(\w+_)?(num_)?(attention_heads\w*|n_heads?|heads?)|linear_num_\w+_heads|linear_num_heads", 4),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"global_head_dim", 32),
    (r"(\w+_)?(head_dim|dim_head|head_size|d_head)|d_kv|kv_channels|\w+_head_dim|mamba_headdim", 16),
    (r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k_experts|num_selected_experts|\w*experts_per_tok\w*", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|num_zero_experts|zero_expert_num", 1),
    (r"(\w+_)?(n|num)_(\w+_)?experts|num_local_experts", 4),
    (r"\w*_rank|d_rel", 16),
    (r"mamba_d_state|state_size|ssm_state_size|hc_sinkhorn_iters|index_topk\w*", 8),
    (r"(\w+_)?chunk_size|\w*sliding_window\w*|\w*window_size|local_attention\w*|\w+_chunk_length|block_size", 8),
    (r"(\w+_)?moe_(\w+_)?intermediate_size|expert_ffn_hidden_size", 48),
    (
        r"(\w+_)?(intermediate_size\w*|ffn_dim|ffn_hidden_size|n_inner|d_ff|dff|dim_ff|feed_forward_size|d_inner|mlp_dim"
        r"|moe_hidden_size|share_expert_dim)",
        96,
    ),
    (
        r"(\w+_)?(hidden_size(_\w+)?|d_model|n_embd|dim_model(_\w+)?|embedding_dim|emb_dim|embed_dim|embedding_size"
        r"|projection_dim|hidden_dim|word_embed_proj_dim|lru_width|output_dim|output_channels|out_channels|input_size)",
        64,
    ),
    (r"image_size|resolution|crop_size", 28),
    (r"(\w+_)?patch_size", 7),
    (r"num_position_embeddings", 16),
)
_TOKEN = re.compile(r"(\w+_)?(token_(id|index)|image_patch_id|im_\w+_id|token_offset)")
# Keys whose default is None, where the type's code wants a number.
_MISSING = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
}
# What rules do not give, by type.
_TYPES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "hy_v4_vl": {"text_config": {"mrope_section": [1, 1, 2]}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 281},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "xlnet": {"d_head": 16},
    "zamba2": {"mamba_headdim": 32, "n_mamba_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "florence2": {
        "vision_config": {
            "embed_dim": [16, 16, 32, 32],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "depths": [1, 1, 1, 1],
        }
    },
    "muse_spark": {"audio_config": {"hidden_sizes": [16, 16, 32, 64], "depths": [1, 1, 1, 1]}},
    "dots3_note": {"audio_config": {"adapter_out_dim": 64}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}


_TEXT_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
for _name in ("qwen2_vl", "qwen2_5_vl", "glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker"):
    _TYPES[_name] = {"text_config": {"rope_parameters": _TEXT_ROTARY}}
_TYPES["glm4v_moe"] = {"text_config": {"rope_parameters": {**_TEXT_ROTARY, "mrope_section": [1, 1, 2]}}}
for _name in ("idefics3", "smolvlm"):
    _TYPES[_name] = {"pad_token_id": PAD}


def tiny_config(model_type: str) -> Any:
    """The default config of a type with few layers, one of each kind, tiny widths and a vocabulary of ``VOCABULARY``."""
    default = CONFIG_MAPPING[model_type]()
    return type(default)(**_changes(default, _TYPES.get(model_type, {})))


def _changes(config: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What is passed to the class of ``config`` for a tiny one."""
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    changed: dict[str, Any] = {}
    special = iter(range(_FIRST_SPECIAL, VOCABULARY))
    layers, kept = _kept_layers(values)
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changed[key] = type(value)(**_changes(value, overrides.get(key, {})))
        elif value is None and key in _MISSING:
            changed[key] = _MISSING[key]
        elif key == "rope_parameters" and "mrope_section" in value:
            changed[key] = {**value, "mrope_section": overrides.get("mrope_section", [2, 3, 3])}
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            if (new := _shrunk(key, value, special)) != value:
                changed[key] = new
        elif isinstance(value, (list, tuple)) and layers is not None:
            if (shorter := _of_layers(key, value, layers, kept)) is not None:
                changed[key] = shorter
        elif key.endswith("token_id") and isinstance(value, list):
            changed[key] = EOS
    if layers is not None:
        changed |= {key: len(kept) for key in _LAYERS if key in values}
    if values.get("num_key_value_heads") and values.get("num_key_value_heads") == values.get("num_attention_heads"):
        changed["num_key_value_heads"] = 4
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        changed["head_dim"] = 8
    if "is_decoder" in values:
        changed["is_decoder"] = True
    own = {
        key: value
        for key, value in overrides.items()
        if not isinstance(values.get(key), PreTrainedConfig) and key != "mrope_section"
    }
    return {**changed, **own}


_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _kept_layers(values: Mapping[str, Any]) -> tuple[int | None, list[int]]:
    """How many layers the default has, and which of them are kept: the first of each kind, and two at the least."""
    layers = next((values[key] for key in _LAYERS if isinstance(values.get(key), int)), None)
    if layers is None:
        return None, []
    lists = [value for value in values.values() if isinstance(value, (list, tuple)) and len(value) == layers]
    kinds = list(zip(*(value for value in lists if not _is_indices(value)), strict=True))
    first = sorted({kind: index for index, kind in reversed(list(enumerate(map(repr, kinds))))}.values())
    shared = values.get("num_kv_shared_layers")
    if shared:  # those that share keys and values come last, one of each kind, after one of each that they share with
        return layers, [*first, *(i for i in range(layers - shared, layers) if repr(kinds[i]))][: 2 * len(first)]
    return layers, (first + [i for i in range(layers) if i not in first])[: max(2, min(len(first), 6))]


def _is_indices(value: Any) -> bool:
    return len(value) > 2 and all(isinstance(i, int) for i in value) and sorted(set(value)) == list(value)


def _of_layers(key: str, value: Any, layers: int, kept: list[int]) -> list[Any] | None:
    """A list with one entry for each layer, or of layers' indices, for those that are kept; None for any other list."""
    if len(value) == layers and not _is_indices(value):
        some = [value[index] for index in kept]
        return [_shrunk(key, entry, iter(())) if type(entry) is int else entry for entry in some]
    if _is_indices(value) and re.search(r"layer|idxs|ids", key):
        return [place for place, index in enumerate(kept) if index in value] or [0]
    return None


def _shrunk(key: str, value: int, special: Any) -> int:
    if _TOKEN.fullmatch(key) and not re.fullmatch(r"_?(pad|bos|eos|sep|cls|decoder_start)_token_id", key):
        return next(special)
    for pattern, small in _RULES:
        if re.fullmatch(pattern, key):
            return min(value, small) if value > 0 else value
    return value
