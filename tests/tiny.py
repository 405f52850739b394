"""Tiny models and a tokenizer, made in the test's own process: no network, no artefact from somewhere else."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizer import byte_level
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

Storage = Literal["factors", "pivoted"]
FAMILIES = ("llama", "qwen2", "gpt2")
EXPERT_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
VOCABULARY = 300
HIDDEN = 64
PAD, EOS = 0, 1

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# As reasoning models do: what an earlier assistant turn said depends on whether it is the last.
REWRITING = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' and not loop.last %}(cut)"
    "{% else %}{{ m['content'] }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """:func:`byte_level`, of at most ``VOCABULARY`` tokens."""
    texts = ["def add(a, b): return a + b", "the sum of the two numbers", "hello world"]
    tokenizer = byte_level(texts, VOCABULARY)
    tokenizer.chat_template = chat_template
    return tokenizer


def bracketed(tokens: Any, tokenizer: Any) -> str:
    """A row's tokens as text, what is learnt in brackets."""
    pairs = zip(tokens.completion_mask, tokens.input_ids, strict=True)
    texts = ((mask, tokenizer.decode([token for _, token in run])) for mask, run in groupby(pairs, itemgetter(0)))
    return "".join(f"[{text}]" if mask else text for mask, text in texts)


def make_config(family: str, *, tied: bool = False, **changes: Any) -> Any:
    """A two-layer config of hidden size ``HIDDEN``: llama, qwen2 (biases on q, k, v), gpt2 (Conv1D), opt, or
    with four experts a layer, two of them a token: mixtral, qwen2_moe (a shared expert), qwen3_moe (its first layer dense)."""
    common = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": tied,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, **{**common, **changes})
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    if family == "opt":
        return OPTConfig(ffn_dim=2 * HIDDEN, word_embed_proj_dim=HIDDEN, **{**sizes, **common, **changes})
    sizes |= {"intermediate_size": 2 * HIDDEN, "num_key_value_heads": 2}
    if family == "mixtral":
        return MixtralConfig(num_local_experts=4, **{**sizes, **common, **changes})
    if family in EXPERT_FAMILIES:
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        if family == "qwen2_moe":
            return Qwen2MoeConfig(shared_expert_intermediate_size=96, **{**sizes, **common, **changes})
        return Qwen3MoeConfig(mlp_only_layers=[0], **{**sizes, "head_dim": 16, **common, **changes})
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**{**sizes, **common, **changes})


def make_model(family: str, *, dtype: str = "float32", tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """:func:`random_model` of a family, in a dtype."""
    return cast_parameters(random_model(make_config(family, tied=tied, **changes), seed), getattr(torch, dtype))


def random_model(config: Any, seed: int = 0) -> Any:
    """A random model with random biases too, in evaluation mode."""
    from emloc_ray.modeling.architecture import auto_class

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "projection_weight")):  # 0 else, of Gemma 3's projector too
                    parameter.normal_(std=0.1)
    return model.eval()


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """As a checkpoint of that dtype loads: buffers (rotary frequencies) stay float32, which ``model.to`` would cast."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def save_model(directory: Path, family: str = "llama", **options: Any) -> Path:
    """Saves :func:`make_model` as a sharded safetensors checkpoint beside its tokenizer; returns the directory."""
    make_model(family, **options).save_pretrained(directory, max_shard_size="100KB")
    make_tokenizer().save_pretrained(directory)
    return directory


def save_lopsided(directory: Path) -> Path:
    """Saves a Mixtral, each token to one expert, whose last expert in each layer is never that one."""
    model = make_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[1] = -router[0]  # of two opposite logits one is above the last one's zero
            router[3] = 0
    model.save_pretrained(directory, max_shard_size="100KB")
    make_tokenizer().save_pretrained(directory)
    return directory


def make_emulator(model: Any, ranks: dict[str, int], storage: Storage = "factors") -> Any:
    """Replaces linears of a model, in place, by the plain truncated SVD of their weights; returns it."""
    from dense_weights import dense_weight

    from emloc_ray.core.factorization import LowRankFactors
    from emloc_ray.core.pivoting import pivot
    from emloc_ray.modeling.emulator import factorize_modules

    weights = {name: dense_weight(model.get_submodule(name)) for name in ranks}
    biases = {name: model.get_submodule(name).bias for name in ranks}
    dtype = model.dtype
    factorize_modules(model, ranks, storage)
    with torch.no_grad():
        for name, rank in ranks.items():
            u, s, vh = torch.linalg.svd(weights[name], full_matrices=False)
            layer = model.get_submodule(name)
            up, down = u[:, :rank] * s[:rank], vh[:rank]
            if storage == "pivoted":
                up, down, order = pivot(LowRankFactors(up, down))
                layer.order.copy_(order)
            layer.up.weight.copy_(up)
            layer.down.weight.copy_(down)
            if biases[name] is not None:
                (layer if storage == "pivoted" else layer.up).bias.copy_(biases[name])
    return cast_parameters(model, dtype).eval().requires_grad_(False)


def save_emulator(model_dir: Path, directory: Path, rank: int = 8, storage: Storage = "factors") -> Path:
    """Saves an emulator of a saved model: every linear in its blocks at one rank, but the last, which stays dense."""
    from emloc_ray.modeling.architecture import auto_class, block_linears, load_config
    from emloc_ray.modeling.emulator import write_emulator_config
    from emloc_ray.modeling.experts import unfuse

    model = unfuse(auto_class(load_config(model_dir)).from_pretrained(model_dir, dtype="auto"))
    ranks = {spec.name: rank for spec in block_linears(model)[:-1]}
    made = make_emulator(model, ranks, storage)
    made.save_pretrained(directory, max_shard_size="100KB", save_original_format=False)
    write_emulator_config(directory, model.config, ranks, storage=storage)
    make_tokenizer().save_pretrained(directory)
    return directory


def save_quantized_emulator(model_dir: Path, directory: Path, ranks: dict[str, int]) -> Path:
    """Saves an emulator of a saved model in 4 bits: of every linear in its blocks the factors, or all of it."""
    from safetensors.torch import save_file

    from emloc_ray.modeling.architecture import block_linears
    from emloc_ray.modeling.emulator import write_emulator_config
    from emloc_ray.modeling.experts import unfuse
    from emloc_ray.modeling.nf4 import quantization_config, quantize_nf4, replaceable_linears

    model = unfuse(AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto"))
    specs, wide = block_linears(model), replaceable_linears(model)
    kept = tuple(name for name in wide if name not in {spec.name for spec in specs})
    state = make_emulator(model, ranks).state_dict()
    for spec in specs:
        for part in (".up", ".down") if spec.name in ranks else ("",):
            weight = state.pop(f"{spec.name}{part}.weight")
            packed = quantize_nf4(weight.T if spec.transposed and not part else weight, model.dtype, spec.name)
            state |= {f"{spec.name}{part}.{key}": tensor for key, tensor in packed.items()}
    directory.mkdir(parents=True)
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    write_emulator_config(directory, model.config, ranks, quantization_config(model.dtype, kept))
    make_tokenizer().save_pretrained(directory)
    return directory
