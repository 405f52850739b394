"""What blocks take of a token, as watched on the meta device, against what real experts and functions take."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    Exaone4Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.activations import NewGELUActivation

from emloc_ray.modeling import grouped_experts
from emloc_ray.modeling.architecture import auto_class, block_names, empty_model, traced_inputs
from emloc_ray.modeling.block_activations import BlockActivations, LiveBytes, PassNumbers, watched_blocks
from emloc_ray.modeling.experts import UnfusedExperts, experts_of, unfuse
from emloc_ray.modeling.meta_pass import MetaPass

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dtype": "bfloat16",
}
NAMES: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, **NAMES, intermediate_size=192),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=48),
    "gpt_oss": GptOssConfig(**SIZES, **NAMES, intermediate_size=64),
    "deepseek_v3": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "head_dim": 16},
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    ),
}
TOKENS = 256


def watched(config: Any) -> dict[str, BlockActivations]:
    model = empty_model(config)
    with watched_blocks(model, block_names(model)) as by_block, torch.no_grad(), MetaPass():
        model(**traced_inputs(config), use_cache=False)
    return by_block


def real_experts(config: Any) -> tuple[UnfusedExperts, tuple[Tensor, ...]]:
    """A layer's, frozen, and what its router gives them of :data:`TOKENS` tokens."""
    model = unfuse(auto_class(config).from_config(config)).requires_grad_(False)
    given: list[tuple[Tensor, ...]] = []
    experts = next(iter(experts_of(model).values()))
    handle = experts.register_forward_pre_hook(lambda module, args: given.append(tuple(t.detach() for t in args)))
    with torch.no_grad():
        model(torch.randint(2, 60, (1, TOKENS), generator=torch.Generator().manual_seed(0)))
        handle.remove()
        experts(*given[0])  # lays the weights side by side
    return experts, given[0]


def kept_by(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> int:
    """Bytes that experts keep for their backward pass beside weights and what they are given."""
    before = [*experts.parameters(), hidden, chosen, weights]
    return kept_beside(before, lambda: experts(hidden.requires_grad_(), chosen, weights.requires_grad_()))


def kept_beside(before: Sequence[Tensor], run: Callable[[], Any]) -> int:
    """Bytes that are kept for the backward pass of what is run, beside some tensors."""
    known, saved = {t.untyped_storage().data_ptr() for t in before}, dict[int, Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known)


@pytest.mark.parametrize("family", CONFIGS)
def test_experts_take_what_is_watched_on_the_meta_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(b.experts for b in watched(CONFIGS[family]).values() if b.experts is not None)
    monkeypatch.setattr(grouped_experts, "KERNELS_ON", {"cpu"})
    experts, given = real_experts(CONFIGS[family])
    with torch.no_grad(), LiveBytes([*experts.parameters(), *given]) as held:
        experts(*given)
    size = TOKENS * given[0].itemsize
    assert held.most == pytest.approx(expected.forward * size, rel=0.03)
    kept = kept_by(experts, *given)
    assert kept == pytest.approx(expected.kept * size, rel=0.03)
    with LiveBytes([*experts.parameters(), *given]) as held:
        done = experts(*given)
        torch.autograd.grad(done, (given[0], given[2]), torch.ones_like(done))
    assert held.most - kept == pytest.approx(expected.backward * size, rel=0.05)


@pytest.mark.parametrize("family", CONFIGS)
def test_experts_one_after_another_keep_no_more(family: str) -> None:
    expected = next(b.experts for b in watched(CONFIGS[family]).values() if b.experts is not None)
    experts, given = real_experts(CONFIGS[family])
    assert kept_by(experts.train(), *given) == pytest.approx(expected.kept * TOKENS * given[0].itemsize, rel=0.03)


def test_norms_of_queries_and_keys_are_watched_too() -> None:
    llama = watched(LlamaConfig(**SIZES, intermediate_size=192))
    assert {block.normed for block in llama.values()} == {2 * 128}
    assert {block.normed for block in watched(CONFIGS["qwen3_moe"]).values()} == {2 * 128 + (4 + 2) * 32}
    # Its first norm is that of the queries' heads.
    exaone = watched(Exaone4Config(**SIZES, intermediate_size=192, sliding_window=64))
    assert {block.normed for block in exaone.values()} == {2 * 128 + (4 + 2) * 32}
    assert all(block.experts is None for block in llama.values())


def test_a_function_that_is_computed_step_by_step_keeps_what_is_watched() -> None:
    """Beside its input, which one that a kernel computes keeps too."""
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_inner=160, dtype="bfloat16")
    functions = {block.functions for block in watched(config).values()}
    assert len(functions) == 1
    expected, x = functions.pop(), torch.randn(TOKENS, 160, dtype=torch.bfloat16).requires_grad_()
    assert kept_beside([], lambda: NewGELUActivation()(x)) == TOKENS * 2 * (expected.kept + 160)
    with torch.no_grad(), LiveBytes([x]) as held:
        NewGELUActivation()(x)
    assert held.most == TOKENS * 2 * (expected.forward + 160)


def test_one_that_a_kernel_computes_takes_nothing_more() -> None:
    model = LlamaConfig(**SIZES, intermediate_size=192)
    assert {block.functions for block in watched(model).values()} == {PassNumbers(0.0, 0.0, 0.0)}
