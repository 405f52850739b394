"""A tiny model of each family that the table of emloc_ray/README.md names, built from transformers' own config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import EOS, HIDDEN, PAD, VOCABULARY, make_config, make_tokenizer, random_model

_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * HIDDEN,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}


def _qwen3() -> Any:
    return transformers.Qwen3Config(head_dim=16, **_GROUPED)


def _mistral() -> Any:
    return transformers.MistralConfig(sliding_window=8, **_GROUPED)


def _gemma() -> Any:
    """Embeddings tied and scaled, as released."""
    return transformers.GemmaConfig(head_dim=16, **{**_GROUPED, "tie_word_embeddings": True})


def _gemma3() -> Any:
    """Layers of two kinds of attention, logits of a head that is the embedding."""
    kinds = ["sliding_attention", "full_attention"]
    changes: dict[str, Any] = {"tie_word_embeddings": True, "sliding_window": 8, "layer_types": kinds, "head_dim": 16}
    return transformers.Gemma3TextConfig(query_pre_attn_scalar=16, **{**_GROUPED, **changes})


def _phi3() -> Any:
    """q, k and v are one linear, gate and up another."""
    return transformers.Phi3Config(**_GROUPED)


def _gpt_neox() -> Any:
    return transformers.GPTNeoXConfig(**_SIZES)


def _gpt_oss() -> Any:
    """Experts stored transposed and fused, with biases."""
    sizes = {key: value for key, value in _GROUPED.items() if key != "intermediate_size"}
    return transformers.GptOssConfig(
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48, **sizes
    )


def _t5() -> Any:
    """Encoder and decoder; the gated variant that the later releases are."""
    more = {key: value for key, value in _TOKENS.items() if key != "bos_token_id"}
    more |= {"decoder_start_token_id": PAD, "tie_word_embeddings": False}
    return transformers.T5Config(
        d_model=HIDDEN,
        d_kv=16,
        d_ff=2 * HIDDEN,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        **more,
    )


def _bart() -> Any:
    """Encoder and decoder, of a type whose decoder transformers opens alone as well: the architecture says which."""
    more = {"decoder_start_token_id": EOS, "forced_eos_token_id": None, "tie_word_embeddings": True}
    return transformers.BartConfig(
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        max_position_embeddings=128,
        architectures=["BartForConditionalGeneration"],
        **{**_TOKENS, **more},
    )


# Of each kind one that no other test runs on Ray; all others go through the same stages' plain functions.
ON_RAY = ("T5", "gpt-oss", "Qwen2.5-VL")


def cases(names: Iterable[str]) -> list[Any]:
    """Families as a fixture's parameters, marked where they start no Ray."""
    return [name if name in ON_RAY else pytest.param(name, marks=pytest.mark.without_ray) for name in names]


# By the names that the table of emloc_ray/README.md has.
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": partial(make_config, "llama"),
    "Qwen2": partial(make_config, "qwen2"),
    "Qwen3": _qwen3,
    "Mistral": _mistral,
    "Gemma": _gemma,
    "Gemma 3": _gemma3,
    "Phi-3": _phi3,
    "GPT-2": partial(make_config, "gpt2", tied=True),
    "OPT": partial(make_config, "opt"),
    "GPT-NeoX": _gpt_neox,
    "Mixtral": partial(make_config, "mixtral"),
    "Qwen2-MoE": partial(make_config, "qwen2_moe"),
    "Qwen3-MoE": partial(make_config, "qwen3_moe"),
    "gpt-oss": _gpt_oss,
    "T5": _t5,
    "BART": _bart,
}


def build(family: str) -> Any:
    """A random model of the family."""
    return random_model(FAMILIES[family]())


def save(family: str, directory: Path) -> Path:
    """Saves :func:`build` as transformers would, in shards, beside a tokenizer."""
    build(family).save_pretrained(directory, max_shard_size="200KB")
    make_tokenizer().save_pretrained(directory)
    return directory
