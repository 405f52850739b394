from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulting.s3 import uri
from peft import PeftModel
from safetensors.torch import load_file
from tiny import EXPERT_FAMILIES, make_config
from transformers import AutoModelForCausalLM, LagunaConfig

from emloc_ray.errors import ConfigError
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.modeling.adapter import attach_adapter, load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_files import Adapter, LoraModule, write_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.expert_adapters import renamed_by_peft, split_experts
from emloc_ray.modeling.experts import experts_of
from emloc_ray.modeling.loading import load_model

IDS = torch.randint(2, 300, (3, 11), generator=torch.Generator().manual_seed(5))
RANK, ALPHA = 3, 7.0


def trained(model_dir: Path, targets: list[str], **options: Any) -> Any:
    """An unfused model with a random adapter."""
    model = load_model(model_dir)
    names = [spec.name for spec in block_linears(model) if spec.name.endswith(tuple(targets))]
    adapted = attach_adapter(model, adapter_config(target_modules=names, r=RANK, lora_alpha=ALPHA, **options)).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    return adapted


def save(model: Any, directory: Path) -> Path:
    plain = [n for n in model.peft_config["default"].target_modules if ".experts." not in n]
    save_trained_adapter(model, directory, targets=plain, base_model="original")
    return directory


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


ALL = ["q_proj", "o_proj", "gate_up", "down", "up_proj", "down_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
@pytest.mark.parametrize("targets", [ALL, ["down"], ["q_proj", "gate_up"]], ids=["all", "down", "gate_up"])
def test_plain_peft_loads_what_was_trained_on_experts_apart(
    tiny_model_dir: Callable[..., Path], family: str, targets: list[str], tmp_path: Path
) -> None:
    model_dir = tiny_model_dir(family)
    model = trained(model_dir, targets)
    wanted = logits(model)
    directory = save(model, tmp_path / "adapter")
    original = AutoModelForCausalLM.from_pretrained(model_dir)
    assert float((logits(original) - wanted).abs().max()) > 1e-2 * float(wanted.abs().max())
    loaded = PeftModel.from_pretrained(original, directory)
    assert_close(logits(loaded), wanted)
    again = load_adapter(load_model(model_dir), directory).eval()
    assert torch.equal(logits(again), wanted)


def test_ranks_by_pattern_and_experts_left_out_are_kept(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model_dir = tiny_model_dir("mixtral")
    model = trained(
        model_dir, ["q_proj", "1.down", "2.gate_up"], rank_pattern={"down": 2}, alpha_pattern={"gate_up": 4.0}
    )
    wanted = logits(model)
    directory = save(model, tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), directory)), wanted)
    adapter = Adapter(directory)
    module = adapter.module("model.layers.0.mlp.experts.1.down")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.experts.1.down")
    assert torch.equal(module.lora_a, layer.lora_A["default"].weight)
    assert torch.equal(module.lora_b, layer.lora_B["default"].weight)
    assert module.scale == ALPHA / 2
    assert adapter.module("model.layers.0.mlp.experts.2.gate_up").scale == 4 / RANK
    assert not adapter.module("model.layers.0.mlp.experts.3.gate_up").lora_b.any()


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern", [r"layers\.0\..*", r".*\.experts\..*", r"^model\.layers\.0\.mlp\.experts\.\d+\.down"]
)
def test_a_pattern_by_layer_is_the_experts_too(
    tiny_model_dir: Callable[..., Path], table: str, pattern: str, tmp_path: Path
) -> None:
    model_dir = tiny_model_dir("mixtral")
    model = trained(model_dir, ["q_proj", "gate_up", "down"], **{table: {pattern: 2}})
    wanted = logits(model)
    directory = save(model, tmp_path / "adapter")
    original = AutoModelForCausalLM.from_pretrained(model_dir)
    assert_close(logits(PeftModel.from_pretrained(original, directory)), wanted)
    assert torch.equal(logits(load_adapter(load_model(model_dir), directory).eval()), wanted)
    adapter = Adapter(directory)
    for name in adapter.names:
        assert adapter.module(name).scale == model.base_model.model.get_submodule(name).scaling["default"]


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"down": 2}, "alpha_pattern": {"q_proj": 3, "gate_up": 4}}])
def test_an_adapter_that_trains_on_names_no_single_expert(
    tiny_model_dir: Callable[..., Path], patterns: dict[str, Any], tmp_path: Path
) -> None:
    """As after exact steps."""
    model_dir = tiny_model_dir("mixtral")
    trained_first = save(trained(model_dir, ["q_proj", "gate_up", "down"], **patterns), tmp_path / "first")
    further = load_adapter(load_model(model_dir), trained_first).eval()
    trained_on = save(further, tmp_path / "further")
    first, second = (json.loads((at / "adapter_config.json").read_text()) for at in (trained_first, trained_on))
    for table in ("rank_pattern", "alpha_pattern"):
        assert bool(first[table]) == bool(patterns)
        assert second[table] == first[table]
    assert_close(logits(load_adapter(load_model(model_dir), trained_on).eval()), logits(further))


@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_shared_experts_is_not_the_experts(
    tiny_model_dir: Callable[..., Path], table: str, tmp_path: Path
) -> None:
    """PEFT reads it for the parameter of the same name too."""
    model_dir = tiny_model_dir("qwen2_moe")
    model = trained(model_dir, ALL, **{table: {"down_proj": 2}})
    wanted = logits(model)
    directory = save(model, tmp_path / "adapter")
    original = AutoModelForCausalLM.from_pretrained(model_dir)
    assert_close(logits(PeftModel.from_pretrained(original, directory)), wanted)
    assert torch.equal(logits(load_adapter(load_model(model_dir), directory).eval()), wanted)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), directory).save_pretrained(
        str(tmp_path / "two")
    )
    again = AutoModelForCausalLM.from_pretrained(model_dir)
    assert_close(logits(PeftModel.from_pretrained(again, tmp_path / "two")), wanted)


def test_an_adapter_that_is_read_and_written_is_the_same(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = save(trained(tiny_model_dir("qwen2_moe"), ALL), tmp_path / "adapter")
    adapter = Adapter(directory)
    write_adapter(tmp_path / "written", adapter.config, [adapter.module(name) for name in adapter.names])
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (directory, tmp_path / "written"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "written" / "adapter_config.json").read_text())
    assert "model.layers.1.mlp.experts.gate_up_proj" in config["target_parameters"]
    assert config["lora_dropout"] == 0


def test_an_adapter_on_a_store_that_was_sent_is_fetched_where_it_is_read(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, s3_port: int, node_cache: Path
) -> None:
    directory = save(trained(tiny_model_dir("mixtral"), ALL), tmp_path / "adapter")
    wanted = [module for adapter in [Adapter(directory)] for module in map(adapter.module, adapter.names)]
    stored = mirror(uri(s3_port, "sent/run")) / "adapter"
    for file in directory.iterdir():
        copy_file(file, stored / file.name)
    sent = pickle.dumps(Adapter(stored))
    shutil.rmtree(stored)  # as on another node
    again_opened: Adapter = pickle.loads(sent)
    for module in wanted:
        again = again_opened.module(module.name)
        assert torch.equal(again.lora_a, module.lora_a)
        assert torch.equal(again.lora_b, module.lora_b)


def test_of_an_adapter_on_attention_nothing_changes(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    directory = save(trained(tiny_model_dir("mixtral"), ["q_proj"]), tmp_path / "adapter")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert not config["target_parameters"]
    keys = load_file(directory / "adapter_model.safetensors").keys()
    assert keys
    assert all(".self_attn.q_proj.lora_" in key for key in keys)


def test_other_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"targets the parameter mlp\.gate\.bias"):
        split_experts({"target_parameters": ["mlp.gate.bias"], "r": 4}, {}, Path("adapter"))


def test_a_linear_that_peft_loads_under_another_name_is_named() -> None:
    """transformers renames Laguna's checkpoints by an expression that fits the names in memory too."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = LagunaConfig(**{**sizes, **experts, "intermediate_size": 64, "vocab_size": 64})
    model = empty_model(config)
    names = [spec.name for spec in block_linears(model) if spec.routed_share is None]
    renamed = renamed_by_peft(model, names)
    assert renamed == [name for name in names if ".shared_experts." in name] != []
    mixtral = empty_model(make_config("mixtral"))
    assert renamed_by_peft(mixtral, [spec.name for spec in block_linears(mixtral) if spec.routed_share is None]) == []


def test_untrained_experts_are_lora_modules_too(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = trained(tiny_model_dir("qwen3_moe"), ALL)
    adapter = Adapter(save(model, tmp_path / "adapter"))
    [experts] = experts_of(model).values()
    assert sum(".experts." in name for name in adapter.names) == 2 * experts.num_experts
    assert isinstance(adapter.module(adapter.names[-1]), LoraModule)
