"""A tiny model of each family that the table of emloc_ray/README.md names, built from transformers' own config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import EOS, HIDDEN, PAD, VOCABULARY, make_tokenizer

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


def _llama() -> Any:
    return transformers.LlamaConfig(**_GROUPED)


def _qwen2() -> Any:
    return transformers.Qwen2Config(**_GROUPED)


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


def _gpt2() -> Any:
    return transformers.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, **_TOKENS)


def _opt() -> Any:
    sizes = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
    return transformers.OPTConfig(ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN, **sizes)


def _gpt_neox() -> Any:
    return transformers.GPTNeoXConfig(**_SIZES)


_HEAD: dict[str, Any] = {"head_dim": 16}
_ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def _mixtral() -> Any:
    """On disk an expert's gate and up are two tensors, in memory all experts' are one."""
    return transformers.MixtralConfig(num_local_experts=4, **_GROUPED)


def _qwen2_moe() -> Any:
    """An expert that all tokens go to beside those that a router picks."""
    return transformers.Qwen2MoeConfig(shared_expert_intermediate_size=96, **_ROUTED, **_GROUPED)


def _qwen3_moe() -> Any:
    """The first layer dense: linears there are called as experts' are on disk."""
    return transformers.Qwen3MoeConfig(mlp_only_layers=[0], **_ROUTED, **_GROUPED, **_HEAD)


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
    "Llama": _llama,
    "Qwen2": _qwen2,
    "Qwen3": _qwen3,
    "Mistral": _mistral,
    "Gemma": _gemma,
    "Gemma 3": _gemma3,
    "Phi-3": _phi3,
    "GPT-2": _gpt2,
    "OPT": _opt,
    "GPT-NeoX": _gpt_neox,
    "Mixtral": _mixtral,
    "Qwen2-MoE": _qwen2_moe,
    "Qwen3-MoE": _qwen3_moe,
    "gpt-oss": _gpt_oss,
    "T5": _t5,
    "BART": _bart,
}


def build(family: str) -> Any:
    """A random model of the family, with random biases too, in evaluation mode."""
    from emloc_ray.modeling.architecture import auto_class

    config = FAMILIES[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class(config).from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.eval()


def save(family: str, directory: Path) -> Path:
    """Saves :func:`build` as transformers would, in shards, beside a tokenizer."""
    build(family).save_pretrained(directory, max_shard_size="200KB")
    make_tokenizer().save_pretrained(directory)
    return directory
