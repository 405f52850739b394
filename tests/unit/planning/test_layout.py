"""The layout of a model under a config: what is compressed, adapted, packed, and to which ranks."""

from __future__ import annotations

from typing import Any

import pytest
from bare_runs import bare_run
from tiny import make_config
from torch import nn
from transformers import LlamaConfig

from emloc_ray.config.reading import parse_config
from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.matching import lookup
from emloc_ray.planning.layout import Layout, adapter_settings, make_layout
from emloc_ray.planning.skeleton import skeleton_of


def layout(family: str = "llama", model_config: Any = None, **sections: Any) -> Layout:
    return bare_run(model_config or make_config(family), **sections).layout


def test_every_linear_is_compressed_and_adapted_by_default() -> None:
    found = layout()
    names = [spec.name for spec in found.specs]
    assert len(names) == 14
    assert list(found.compressed) == list(found.adapted) == names
    assert found.ranks["model.layers.0.self_attn.q_proj"] == 16  # ⌊½ · 64 · 64 / 128⌋
    assert found.ranks["model.layers.1.mlp.gate_proj"] == 21  # ⌊½ · 128 · 64 / 192⌋
    grouped = [sorted(spec.name.rsplit(".", 1)[-1] for spec in group) for group in found.groups]
    assert grouped == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_the_head_may_be_excluded_and_stays_as_it_is_where_it_is_named() -> None:
    """PEFT's usual companion of ``all-linear``, which never reaches it here."""
    excluded = layout(adapter={"target_modules": "all-linear", "exclude_modules": ["lm_head"]})
    assert (excluded.adapted, excluded.left_dense) == (layout().adapted, {})
    named = layout(adapter={"target_modules": ["q_proj", "lm_head"]})
    assert (named.portable_targets, named.left_dense) == (("q_proj",), {"lm_head": "Linear"})
    with pytest.raises(
        ConfigError, match=r"adapter.target_modules names no linear of the blocks, only lm_head \(Linear\)"
    ):
        layout(adapter={"target_modules": ["lm_head"]})


def test_what_overlapping_patterns_say_does_not_hang_on_their_order() -> None:
    table = {"q_proj": 32.0, r"layers\.0\..*": 8.0}
    config = parse_config({"run_dir": "x", "model": {"source": "y"}, "data": {"train": {"path": "z"}}})
    adapter = config.adapter.model_copy(update={"alpha_pattern": table})
    given = adapter_settings(adapter, layout(), make_config("llama"))["alpha_pattern"]
    for turned in (given, dict(reversed(given.items()))):
        assert lookup("model.layers.0.self_attn.q_proj", turned, 16) == 32
        assert lookup("model.layers.0.self_attn.k_proj", turned, 16) == 8
        assert lookup("model.layers.1.self_attn.k_proj", turned, 16) == 16


def test_parameters_add_up() -> None:
    found = layout(emulator={"target_modules": ["q_proj", "down_proj"]})
    assert found.parameters_targeted == 2 * (64 * 64 + 64 * 128)
    assert found.parameters_factorized == 2 * (16 * 128 + 21 * 192)
    dense = next(spec for spec in found.specs if spec.name.endswith("k_proj"))
    assert found.kept(dense) == 32 * 64
    assert found.num_parameters == sum(p.numel() for p in empty_model(make_config("llama")).parameters())


def test_a_layer_that_no_rank_makes_smaller_stays_dense() -> None:
    narrow = LlamaConfig(
        hidden_size=2,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        vocab_size=10,
        num_key_value_heads=1,
        head_dim=2,
    )
    found = layout(model_config=narrow, emulator={"compression_ratio": 0.1}, adapter={"r": 1})
    # One rank of a 2 × 2 layer holds four parameters, as many as it has.
    assert {name.rsplit(".", 1)[-1] for name in found.ranks} == {"gate_proj", "up_proj", "down_proj"}


def test_ratio_one_compresses_nothing_whatever_the_patterns_say() -> None:
    found = layout(emulator={"compression_ratio": 1.0, "ratios": {"q_proj": 0.1}})
    assert found.ranks == {}
    assert found.parameters_factorized == found.parameters_targeted


def test_patterns_give_their_ratio_and_the_first_match_wins() -> None:
    ratios = {"layers.0.*q_proj": 1.0, "q_proj": 0.25}
    found = layout(emulator={"ratios": ratios})
    assert "model.layers.0.self_attn.q_proj" not in found.ranks
    assert found.ranks["model.layers.1.self_attn.q_proj"] == 8
    assert found.ranks["model.layers.1.self_attn.o_proj"] == 16


@pytest.mark.parametrize(
    ("adapter", "targets"),
    [
        ({}, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ({"target_modules": ["q_proj"]}, ("q_proj",)),
        ({"target_modules": r".*\.1\..*q_proj"}, r".*\.1\..*q_proj"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            ("model.layers.1.self_attn.q_proj",),
        ),
    ],
)
def test_targets_that_the_adapter_carries_name_just_what_was_adapted(adapter: dict[str, Any], targets: Any) -> None:
    assert layout(adapter=adapter).portable_targets == targets


def test_r_is_held_against_every_adapted_layer_with_its_own_rank() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.r is 40, above the smaller side 32 of .*k_proj"):
        layout(adapter={"r": 40})
    assert layout(adapter={"r": 40, "exclude_modules": ["k_proj", "v_proj"]}).adapted
    assert layout(adapter={"r": 40, "rank_pattern": {"k_proj": 4, "v_proj": 4}}).adapted
    with pytest.raises(ConfigError, match="33"):
        layout(adapter={"rank_pattern": {"v_proj": 33}})


def test_linears_too_narrow_for_r_that_only_help_are_left_out_by_default() -> None:
    """Gemma 3n mixes four streams by linears of four outputs, which no adapter of a usual rank fits."""
    config = make_config("llama")
    model = empty_model(config)
    model.model.layers[1].mlp.mix = nn.Linear(64, 4, device="meta")
    called = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: called(x) + model.model.layers[1].mlp.mix(x).sum()
    skeleton, mix = skeleton_of(config, model), "model.layers.1.mlp.mix"

    def found(**adapter: Any) -> Layout:
        values = {"run_dir": "x", "model": {"source": "y"}, "data": {"train": {"path": "z"}}, "adapter": adapter}
        return make_layout(parse_config(values), skeleton)

    assert mix in found().compressed
    assert mix not in found().adapted
    assert len(found().adapted) == 14
    assert mix in found(r=4).adapted
    assert mix in found(rank_pattern={"mix": 2}).adapted
    with pytest.raises(ConfigError, match=r"adapter\.r is 8, above the smaller side 4 of .*mix"):
        found(target_modules=["mix"])


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "ratios"])
def test_a_pattern_that_is_no_expression_is_told(key: str) -> None:
    value = {"q_proj(": 0.5} if key == "ratios" else "q_proj("
    with pytest.raises(ConfigError, match="is not a regular expression"):
        layout(emulator={key: value})


def test_conv1d_is_turned() -> None:
    found = layout("gpt2")
    attention = next(spec for spec in found.specs if spec.name.endswith("c_attn"))
    assert (attention.out_features, attention.in_features, attention.transposed) == (192, 64, True)


def test_ia3_adapts_what_peft_would_by_default() -> None:
    found = layout(adapter={"method": "ia3"})
    assert {name.rsplit(".", 1)[-1] for name in found.adapted} == {"k_proj", "v_proj", "down_proj"}
    assert found.feedforward == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert not layout(adapter={"method": "prompt_tuning", "num_virtual_tokens": 2}).adapted


def test_in_4_bits_is_what_lies_inside_the_blocks() -> None:
    assert layout().in_4bit == ()
    assert not layout(emulator={"compression_ratio": 1.0}).differs
    for ratio in (0.25, 1.0):
        found = layout(emulator={"quantization": "nf4", "compression_ratio": ratio, "target_modules": ["q_proj"]})
        assert found.in_4bit == tuple(spec.name for spec in found.specs)
        assert found.kept_wide == ("lm_head",)
        assert found.differs


def test_integers_are_what_lies_inside_the_blocks() -> None:
    options = {
        "quantization": "int2",
        "residual_rank": 4,
        "target_modules": ["q_proj", "v_proj"],
        "ratios": {"v_proj": 1.0},
    }
    found = layout(emulator=options)
    assert found.quantized_linears == tuple(found.forms.bits) == tuple(spec.name for spec in found.specs)
    assert found.in_4bit == ()
    # Beside dense ones that have a Gram.
    assert {name.rsplit(".", 1)[-1] for name in found.forms.residual_ranks} == {"v_proj"}
    assert set(found.forms.residual_ranks.values()) == {4}
    value = next(spec for spec in found.specs if spec.name.endswith("v_proj"))
    size = value.num_parameters * 2.25 / 8 + 4 * (value.in_features + value.out_features) * 4.25 / 8
    assert size < found.quantized_bytes(value) < 1.5 * size  # a scale for each of the few columns of ``up``
    assert layout(emulator={**options, "compression_ratio": 1.0}).differs


@pytest.mark.parametrize("bits", [2, 8])
def test_factors_beside_integers_leave_a_linear_smaller_than_in_16_bits(bits: int) -> None:
    found = layout(emulator={"quantization": f"int{bits}", "compression_ratio": 1.0, "residual_rank": 1000})
    sizes = found.form_sizes(2)
    for spec in found.specs:
        shape, rank = (spec.out_features, spec.in_features), found.residual_ranks[spec.name]
        assert 1 <= rank <= min(shape)
        assert found.quantized_bytes(spec) < 2 * spec.num_parameters
        beyond = sizes.num_bytes(*shape, Form(bits=bits, residual_rank=rank + 1))
        assert rank == min(shape) or beyond >= 2 * spec.num_parameters


def test_a_linear_too_small_for_factors_beside_its_integers_has_none() -> None:
    assert FormSizes(2).residual_rank(2, 2, bits=8, asked=4) == 0
    assert FormSizes(2).residual_rank(2048, 640, bits=2, asked=8) == 8


def test_ranks_that_follow_from_data_are_those_whose_ratio_no_pattern_names() -> None:
    plain = layout(emulator={"ratios": {"q_proj": 0.3, "o_proj": 1.0}})
    assert plain.allocated == plain.gradient_linears == ()
    options = {"ratios": {"q_proj": 0.3, "o_proj": 1.0}, "allocation": "sensitivity"}
    found = layout(emulator=options)
    assert found.ranks == plain.ranks
    assert {name.rsplit(".", 1)[-1] for name in found.allocated} == {
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert found.gradient_linears == found.allocated
    assert layout(emulator={**options, "objective": "predictions"}).gradient_linears == tuple(found.ranks)
    whole = layout(emulator={"allocation": "sensitivity", "objective": "predictions", "compression_ratio": 1.0})
    assert whole.allocated == whole.gradient_linears == ()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_pivoted_factors_have_higher_ranks_in_as_many_parameters(quantization: str) -> None:
    plain = layout("gpt2", emulator={"quantization": quantization})
    found = layout("gpt2", emulator={"storage": "pivoted", "quantization": quantization})
    assert found.ranks.keys() == plain.ranks.keys()
    assert all(found.ranks[name] > rank for name, rank in plain.ranks.items())
    for spec in found.specs:
        rows, columns = spec.out_features, spec.in_features
        rank = found.ranks[spec.name]
        assert found.stored_shapes(spec) == ((rows - rank, rank), (rank, columns))
        assert found.kept(spec) == rank * (rows + columns - rank) <= spec.num_parameters / 2
    assert found.order_bytes == 4 * sum(spec.out_features for spec in found.specs)
    assert plain.order_bytes == 0


def test_a_layout_takes_the_ranks_of_the_emulator_that_was_made() -> None:
    found = layout(emulator={"allocation": "sensitivity"})
    layers = {name: {"rank": 3, "solver": "exact"} for name in found.ranks}
    first, second, *_ = layers
    del layers[first]  # left dense
    layers[second] = {"rank": 32, "solver": "dense"}  # dense, in 4 bits
    made = found.as_made({"layers": layers})
    assert set(made.ranks) == set(found.ranks) - {first, second}
    assert set(made.ranks.values()) == {3}
    assert layout().as_made({"layers": layers}).ranks == layout().ranks
    healed = dict.fromkeys(made.ranks, 11)  # to be healed by eight more
    assert found.as_made({"layers": layers, "ranks": healed}).ranks == healed


def test_in_4_bits_only_what_can_be_stored_dense_may_be() -> None:
    wide = layout("gpt2", emulator={"allocation": "sensitivity"})
    assert all(wide.may_be_dense(name) for name in wide.allocated)
    packed = layout("gpt2", emulator={"allocation": "sensitivity", "quantization": "nf4"})
    assert {name for name in packed.allocated if packed.may_be_dense(name)} == set(packed.replaceable) & set(
        packed.allocated
    )
