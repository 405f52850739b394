"""What a model is made of: its blocks, its linears, and which of them read the same tensor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import make_config
from torch import nn
from transformers import (
    BartConfig,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    JambaConfig,
    Llama4Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    ResNetConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import auto_class, block_linears, block_names, empty_model, trace_inputs
from emloc_ray.planning.skeleton import skeleton_of


def traced(config: Any) -> tuple[Any, list[str], list[list[str]]]:
    """A model on the meta device, its linears' names and their groups."""
    model = empty_model(config)
    specs = block_linears(model)
    return model, [spec.name for spec in specs], trace_inputs(model, specs).groups


def of_layers(prefix: str, groups: list[list[str]]) -> list[list[str]]:
    return [[f"{prefix}.{layer}.{name}" for name in group] for layer in range(2) for group in groups]


ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]]
LLAMA = [*ATTENTION, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
GPT2 = [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
OPT = [*ATTENTION, ["self_attn.out_proj"], ["fc1"], ["fc2"]]


@pytest.mark.parametrize(
    ("family", "prefix", "groups"),
    [
        ("llama", "model.layers", LLAMA),
        ("qwen2", "model.layers", LLAMA),
        ("gpt2", "transformer.h", GPT2),
        ("opt", "model.decoder.layers", OPT),
    ],
)
def test_families(family: str, prefix: str, groups: list[list[str]]) -> None:
    model, names, found = traced(make_config(family))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert block_names(model) == [f"{prefix}.0", f"{prefix}.1"]
    expected = of_layers(prefix, groups)
    assert [sorted(group) for group in found] == [sorted(group) for group in expected]
    assert sorted(names) == sorted(name for group in expected for name in group)
    assert not any("head" in name or "embed" in name for name in names)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_specs_are_the_checkpoint_s_own_shapes(family: str) -> None:
    model = empty_model(make_config(family))
    state = model.state_dict()
    for spec in block_linears(model):
        shape = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
        assert tuple(state[spec.weight_name].shape) == shape
        assert spec.num_parameters == state[spec.weight_name].numel()
        assert spec.has_bias == (f"{spec.name}.bias" in state)
        assert spec.transposed == (family == "gpt2")
        assert spec.name.startswith(f"{spec.block}.")
    if family == "qwen2":
        assert {s.name.rsplit(".", 1)[-1] for s in block_linears(model) if s.has_bias} == {"q_proj", "k_proj", "v_proj"}


def test_auto_class() -> None:
    assert auto_class(make_config("llama")).__name__ == "AutoModelForCausalLM"
    assert auto_class(T5Config()).__name__ == "AutoModelForSeq2SeqLM"
    cases = {"BartForConditionalGeneration": "Seq2SeqLM", "BartForCausalLM": "CausalLM", "BartModel": "Seq2SeqLM"}
    for named, opens in cases.items():
        assert auto_class(BartConfig(architectures=[named])).__name__ == f"AutoModelFor{opens}"
    assert auto_class(BartConfig()).__name__ == "AutoModelForSeq2SeqLM"
    whole = Llama4Config(architectures=["Llama4ForConditionalGeneration"])
    assert auto_class(whole).__name__ == "AutoModelForImageTextToText"
    with pytest.raises(ConfigError, match="resnet"):
        auto_class(ResNetConfig())


# Hand-made models.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.router = nn.Linear(4, 2)
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate(x), self.router(x)
        y = self.a(x) + self.b(x.view(x.shape))  # the same memory, seen alike
        z = torch.relu(y)
        u = self.c(z)
        z.mul_(2)
        return u + self.d(z)  # the same storage, but not the same numbers any more


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.mixed = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
        self.lm_head = nn.Linear(4, 9)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = torch.zeros(*input_ids.shape, 4, device=input_ids.device)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def groups_of(block: type[nn.Module]) -> list[list[str]]:
    with torch.device("meta"):
        model = Model(block)
    return trace_inputs(model, block_linears(model)).groups


def test_same_tensor_means_same_memory_and_same_version() -> None:
    assert groups_of(Block) == of_layers("blocks", [["a", "b"], ["c"], ["d"]])


def test_logits_that_are_changed_after_the_head_are_found() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "vocab_size": 99,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}

    def whole(made: type[Any], config: Any) -> bool:
        with torch.device("meta"):
            model = made(config)
        return trace_inputs(model, block_linears(model)).whole_logits

    assert whole(Gemma2ForCausalLM, Gemma2Config(**sizes, **heads, final_logit_softcapping=30.0))
    assert not whole(Gemma2ForCausalLM, Gemma2Config(**sizes, **heads, final_logit_softcapping=None))
    assert not whole(LlamaForCausalLM, LlamaConfig(**sizes, **heads))

    class Masked(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits[..., 3] = -1e4
            return output

    assert whole(Masked, LlamaConfig(**sizes, **heads))


def test_only_repeated_blocks_with_linears_count() -> None:
    assert block_names(Model()) == ["blocks.0", "blocks.1"]
    assert not any("gate" in spec.name or "router" in spec.name for spec in block_linears(Model()))


def test_routers_that_hold_a_linear_are_left_out() -> None:
    class Routed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.ModuleDict({"proj": nn.Linear(4, 2)})  # type: ignore[assignment]
            self.router_gate = nn.Linear(4, 2)

    assert {spec.name.split(".", 2)[-1] for spec in block_linears(Model(Routed))} == {"a", "b", "c", "d"}


def test_a_linear_whose_weight_its_owner_reads_stays_as_it_is() -> None:
    """Mamba's mixer hands its other linears' weights to kernels: factors would be an empty weight to these."""
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=99, time_step_rank=4)
    assert [spec.name for spec in block_linears(empty_model(config))] == ["backbone.layers.0.mixer.in_proj"]


def test_a_linear_that_is_not_called_in_a_block_that_runs_stays_as_it_is() -> None:
    config = make_config("llama")
    model = empty_model(config)
    model.model.layers[0].extra = nn.Linear(4, 4, device="meta")
    assert "model.layers.0.extra" in {spec.name for spec in block_linears(model)}
    assert "model.layers.0.extra" not in {spec.name for spec in skeleton_of(config, model).specs}


def test_layers_of_several_classes_are_blocks() -> None:
    """A hybrid's layers are of a class for each kind of mixer."""
    config = JambaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=99,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
    )
    model = empty_model(config)
    assert len({type(layer) for layer in model.model.layers}) == 2
    assert block_names(model) == ["model.layers.0", "model.layers.1"]
    named = {spec.name.removeprefix("model.") for spec in block_linears(model)}
    assert {"layers.0.mamba.in_proj", "layers.1.self_attn.q_proj"} <= named


def test_nothing_to_compress() -> None:
    with pytest.raises(ConfigError, match="Model has no linears inside repeated blocks"):
        block_linears(Model(lambda: nn.LayerNorm(4)))  # type: ignore[arg-type]


class ReadTwice(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) + self.c(x)) + self.a(x + 1) + self.d(x)


def test_a_linear_that_reads_two_tensors_stands_alone() -> None:
    assert groups_of(ReadTwice) == of_layers("blocks", [["a"], ["b"], ["c", "d"]])


class Untraceable(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x[x.sum(-1).nonzero()])


class Unused(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


def test_a_model_that_cannot_be_traced_has_one_group_for_each_linear() -> None:
    assert groups_of(Untraceable) == of_layers("blocks", [["a"], ["b"], ["c"], ["d"]])


def test_a_linear_that_is_never_called_stands_alone() -> None:
    assert groups_of(Unused) == of_layers("blocks", [["a", "b"], ["c"], ["d"]])


def test_tracing_leaves_no_hook_behind() -> None:
    model, _, _ = traced(make_config("llama"))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_subclass_of_linear_may_compute_something_else() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3

    class Mixed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.a = Scaled(4, 4)
            self.b = Conv1D(4, 4)  # type: ignore[assignment]

    specs = {spec.name: spec for spec in block_linears(Model(Mixed))}
    assert "blocks.0.a" not in specs
    assert specs["blocks.0.b"].transposed


def test_empty_models_of_many_threads_leave_torch_as_it_was() -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(empty_model, [make_config("llama") for _ in range(8)]))
    assert all(tensor.is_meta for model in models for tensor in (*model.parameters(), *model.buffers()))
    assert torch.empty(1).device == nn.Linear(1, 1).weight.device == torch.device("cpu")


def test_a_subclass_that_computes_what_a_linear_does_is_one() -> None:
    """Falcon has one of its own, for the order of its roundings."""
    config = FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    names = {spec.name.rpartition(".")[-1] for spec in block_linears(empty_model(config))}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
