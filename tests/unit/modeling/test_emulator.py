"""The emulator as a transformers model: what was saved is what loads, bit for bit, and never without emloc_ray."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_weights import dense_weight
from safetensors import safe_open
from tiny import EXPERT_FAMILIES, FAMILIES, VOCABULARY, Storage, make_emulator, make_model, save_emulator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, FalconH1Config, FalconH1ForCausalLM
from transformers.pytorch_utils import Conv1D
from vlms import VLMS, image_tokenizer

from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import (
    FactorizedLinear,
    PivotedLinear,
    factorize_modules,
    write_emulator_config,
)
from emloc_ray.modeling.emulator_type import EmulatorModelConfig
from emloc_ray.modeling.experts import unfuse

IDS = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def built(family: str, storage: Storage = "factors", **options: Any) -> tuple[Any, dict[str, int]]:
    """An emulator in memory and its ranks: one layer dense, the others of two ranks."""
    model = unfuse(make_model(family, **options))
    ranks = {spec.name: 5 + number % 2 for number, spec in enumerate(block_linears(model)[:-1])}
    return make_emulator(model, ranks, storage), ranks


def saved(directory: Path, model: Any, ranks: dict[str, int], storage: Storage = "factors") -> Path:
    model.save_pretrained(directory, max_shard_size="50KB")
    write_emulator_config(directory, model.config, ranks, storage=storage)
    return directory


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERT_FAMILIES])
@pytest.mark.parametrize(("dtype", "tied"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_round_trip_is_bit_equal(tmp_path: Path, family: str, dtype: str, tied: bool) -> None:
    model, ranks = built(family, dtype=dtype, tied=tied)
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "e", model, ranks))
    assert loaded.dtype == getattr(torch, dtype)
    assert not loaded.training
    assert {n: m.down.out_features for n, m in loaded.named_modules() if isinstance(m, FactorizedLinear)} == ranks
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    assert torch.equal(logits(loaded), logits(model))


def test_an_emulator_of_a_text_model_alone_has_the_config_of_the_whole(tmp_path: Path) -> None:
    config, _ = VLMS["Qwen3.5"](image_tokenizer())
    model = AutoModelForCausalLM.from_config(config)
    ranks = {spec.name: 3 for spec in block_linears(model)}
    make_emulator(model, ranks).save_pretrained(tmp_path)
    write_emulator_config(tmp_path, config, ranks)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_what_files_do_not_hold_is_set_as_the_original_sets_it(tmp_path: Path) -> None:
    # Falcon-H1's multipliers: a model without weights of its own sets them in its blocks.
    config = FalconH1Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_d_ssm=32,
        mamba_n_heads=2,
        mamba_d_head=16,
        mamba_d_state=16,
        ssm_multipliers=[0.5, 2.0, 3.0, 0.25, 1.5],
    )
    torch.manual_seed(0)
    model = FalconH1ForCausalLM(config)
    ranks = {spec.name: 5 for spec in block_linears(model)}
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "e", make_emulator(model, ranks), ranks))
    left_out = dict(loaded.named_non_persistent_buffers())
    assert any(name.endswith("mup_vector") for name in left_out)
    for name, value in model.named_non_persistent_buffers():
        assert torch.equal(left_out[name], value), name


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pivoted_factors_are_saved_and_loaded_bit_equal(tmp_path: Path, family: str, dtype: str) -> None:
    model, ranks = built(family, "pivoted", dtype=dtype)
    once = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "a", model, ranks, "pivoted"))
    once.save_pretrained(tmp_path / "b")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert {n: m.down.out_features for n, m in loaded.named_modules() if isinstance(m, PivotedLinear)} == ranks
    assert torch.equal(logits(loaded), logits(model))
    if dtype == "float32":
        torch.testing.assert_close(logits(loaded), logits(built(family)[0]), rtol=1e-4, atol=1e-4)


def test_asked_dtype_wins(tmp_path: Path) -> None:
    model, ranks = built("llama", dtype="bfloat16")
    saved(tmp_path / "e", model, ranks)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "e", dtype=torch.float32).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "e", torch_dtype=torch.float32).dtype == torch.float32
    for options in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": None}):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "e", **options).dtype == torch.bfloat16


def test_keywords_of_the_original_s_config_change_it(tmp_path: Path) -> None:
    model, ranks = built("llama")
    saved(tmp_path / "e", model, ranks)
    changes = {"use_cache": False, "output_hidden_states": True, "attn_implementation": "eager"}
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "e", **changes)
    assert (changed.config.use_cache, changed.config._attn_implementation) == (False, "eager")
    output = changed(input_ids=IDS)
    assert output.past_key_values is None
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(output.logits, logits(model))
    config, unused = AutoConfig.from_pretrained(tmp_path / "e", use_cache=False, x=1, return_unused_kwargs=True)
    assert (config.original().use_cache, unused) == (False, {"x": 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "e", x=1)


def test_an_untrained_emulator_is_made_from_its_config(tmp_path: Path) -> None:
    model, ranks = built("llama", "pivoted", dtype="bfloat16")
    config = AutoConfig.from_pretrained(saved(tmp_path / "e", model, ranks, "pivoted"), attn_implementation="eager")
    made = AutoModelForCausalLM.from_config(config)
    assert (made.dtype, made.config._attn_implementation) == (torch.bfloat16, "eager")
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert logits(made).isfinite().all()


def test_an_emulator_is_pickled_and_copied_whole(tmp_path: Path) -> None:
    model, ranks = built("llama", "pivoted")
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "e", model, ranks, "pivoted"))
    torch.save(loaded, tmp_path / "e.pt")
    for again in (torch.load(tmp_path / "e.pt", weights_only=False), copy.deepcopy(loaded)):
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")
        assert AutoConfig.from_pretrained(tmp_path / "again").ranks == ranks


@pytest.mark.parametrize("tied", [False, True])
def test_saved_again_it_is_still_an_emulator(tmp_path: Path, tied: bool) -> None:
    model, ranks = built("qwen2", tied=tied)
    once = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "a", model, ranks))
    once.save_pretrained(tmp_path / "b")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(twice), logits(model))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0]["model_type"] == configs[1]["model_type"] == "emloc_emulator"
    assert configs[0]["ranks"] == configs[1]["ranks"] == ranks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_carries_the_original_s(tmp_path: Path, family: str) -> None:
    model, ranks = built(family)
    saved(tmp_path / "e", model, ranks)
    config = AutoConfig.from_pretrained(tmp_path / "e")
    assert isinstance(config, EmulatorModelConfig)
    theirs, ours = model.config.to_dict(), config.original().to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype"):
        theirs.pop(key, None), ours.pop(key, None)
    assert type(config.original()) is type(model.config)
    assert ours == theirs
    assert config.ranks == ranks


def test_files_hold_factors_and_biases_once(tmp_path: Path) -> None:
    model, ranks = built("qwen2")
    names = set()
    for file in saved(tmp_path / "e", model, ranks).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names |= set(stored.keys())
    q = "model.layers.0.self_attn.q_proj"
    assert {f"{q}.up.weight", f"{q}.down.weight", f"{q}.up.bias"} <= names
    assert f"{q}.weight" not in names
    assert "model.layers.1.mlp.down_proj.weight" in names


def test_a_missing_factor_is_not_made_up(tmp_path: Path) -> None:
    model, ranks = built("llama")
    saved(tmp_path / "e", model, {**ranks, "model.layers.0.self_attn.q_proj": 3})
    with pytest.raises(Exception, match=r"mismatch|size"):  # transformers' own error, of any type
        AutoModelForCausalLM.from_pretrained(tmp_path / "e")


LOAD = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print(type(error).__name__, "emloc_emulator" in str(error))
print("emloc_ray" in sys.modules)
"""


@pytest.mark.slow
def test_without_the_import_it_raises(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    directory = save_emulator(tiny_model_dir(), tmp_path / "e")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(directory)], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ValueError", "True", "False"]


# The layer.


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_two_products_and_a_bias(bias: bool) -> None:
    layer = FactorizedLinear(6, 4, 2, bias)
    x = torch.randn(3, 5, 6)
    expected = x @ (layer.up.weight @ layer.down.weight).T + (layer.up.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (6 + 4) + 4 * bias
    assert layer.weight.numel() == 0
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
def test_a_pivoted_layer_is_its_dense_weight_forward_and_back(bias: bool) -> None:
    layer = PivotedLinear(6, 4, 2, bias)
    layer.order.copy_(torch.tensor([2, 0, 3, 1]))
    if bias:
        layer.bias.data.normal_()
    x = torch.randn(3, 5, 6, requires_grad=True)
    dense = nn.Linear(6, 4, bias)
    dense.weight.data = dense_weight(layer).detach()
    dense.register_parameter("bias", layer.bias)
    torch.testing.assert_close(layer(x), dense(x))
    upstream = torch.randn(3, 5, 4)
    [ours], [theirs] = (torch.autograd.grad(module(x), x, upstream) for module in (layer, dense))
    torch.testing.assert_close(ours, theirs)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (6 + 4 - 2) + 4 * bias
    assert layer.weight.numel() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_factors_compute_what_the_original_does(family: str) -> None:
    original = logits(make_model(family))
    model = make_model(family)
    ranks = {spec.name: min(spec.out_features, spec.in_features) for spec in block_linears(model)}
    emulator = make_emulator(model, ranks)
    torch.testing.assert_close(logits(emulator), original, rtol=1e-4, atol=1e-4)


def test_a_conv1d_whose_weight_is_scattered_is_factorized_at_its_size() -> None:
    model = make_model("gpt2")
    name = "transformer.h.0.attn.c_attn"
    model.get_submodule(name).weight.data = torch.empty(0)  # as ZeRO-3 leaves it between uses
    factorize_modules(model, {name: 4})
    layer = model.get_submodule(name)
    assert (layer.in_features, layer.out_features) == (64, 192)


def test_dense_weight_of_each_kind() -> None:
    linear, conv, factored = nn.Linear(3, 5), Conv1D(5, 3), FactorizedLinear(3, 5, 2)
    assert torch.equal(dense_weight(linear), linear.weight)
    assert torch.equal(dense_weight(conv), conv.weight.T)
    product = factored.up.weight.double() @ factored.down.weight.double()
    assert torch.equal(dense_weight(factored, torch.float64), product)


def test_ranks_of_unknown_modules_raise() -> None:
    with pytest.raises(AttributeError):
        factorize_modules(make_model("llama"), {"model.layers.9.self_attn.q_proj": 2})
