"""Checkpoints of which no emulator can be made: each is refused in one plain sentence, before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PAD, make_config, make_tokenizer
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM, Zamba2Config, Zamba2ForCausalLM

from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.architecture import empty_model
from emloc_ray.modeling.loading import ModelSource, read_model_config
from emloc_ray.modeling.source_checks import check_source


def test_a_checkpoint_that_lacks_a_block_of_its_config_is_refused(tiny_model_dir: Callable[..., Path]) -> None:
    source, deeper = ModelSource(tiny_model_dir()), empty_model(make_config("llama", num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"holds no model\.layers\.2\.self_attn\.q_proj\.weight \(7 linears"):
        check_source(source, deeper)
    check_source(source, empty_model(make_config("llama")))


@pytest.mark.parametrize("lost", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"])
def test_a_checkpoint_that_lacks_what_is_no_linear_of_a_block_is_refused(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, lost: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    kept = {name: tensor for name, tensor in model.state_dict().items() if name != f"{lost}.weight"}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(
        ConfigError, match=rf"lacks {lost}\.weight \(parameters missing in all: 1\), which transformers"
    ):
        check_source(ModelSource(tmp_path), empty_model(model.config))


def test_an_index_on_the_hub_is_checked_before_its_weights_are_fetched(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(
        tiny_model_dir("llama"), tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    deeper = empty_model(make_config("llama", num_hidden_layers=3))
    for source in (ModelSource(tmp_path, hub_id="org/tiny"), ModelSource(tmp_path, only_index=True)):
        with pytest.raises(ConfigError, match=rf"{source.name} holds no model\.layers\.2\.self_attn\.q_proj\.weight"):
            check_source(source, deeper)
        check_source(source, empty_model(make_config("llama")))


def test_codes_of_a_quantized_checkpoint_are_no_weights(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    directory = Path(shutil.copytree(tiny_model_dir(), tmp_path / "fp8"))
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    source = ModelSource(directory)
    with pytest.raises(
        ConfigError, match=r"is stored quantized \(fp8\), and codes are no weights.*8Config\(dequantize=True\)"
    ):
        check_source(source, empty_model(read_model_config(source)))


def test_codes_are_known_without_a_word_in_the_config(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    directory = Path(shutil.copytree(tiny_model_dir(), tmp_path / "fp8"))
    entry = next(entry for entry in Checkpoint(directory) if entry.name.endswith("k_proj.weight"))
    tensors = load_file(entry.file)
    scale = {f"{entry.name}_scale": torch.ones(())}
    save_file(tensors | {entry.name: tensors[entry.name].to(torch.float8_e4m3fn)} | scale, entry.file, {"format": "pt"})
    source = ModelSource(directory)
    with pytest.raises(ConfigError, match=rf"holds {entry.name} in float8_e4m3fn, and codes are no weights"):
        check_source(source, empty_model(read_model_config(source)))


def test_blocks_that_share_weights_are_no_damaged_checkpoint(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    states: dict[str, Any] = {"mamba_d_state": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1}
    kinds: dict[str, Any] = {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
    }
    model = Zamba2ForCausalLM(Zamba2Config(vocab_size=300, pad_token_id=PAD, **sizes, **states, **kinds))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"is of the type zamba2, whose blocks share weights \(model\.layers\.3\.shared"
    ):
        check_source(ModelSource(tmp_path), model)


def test_a_model_that_changes_its_own_weights_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "attention_hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    model = RwkvForCausalLM(RwkvConfig(vocab_size=300, **sizes))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is of the type rwkv, which .*: set rescale_every to 0 in its config\.json"):
        check_source(ModelSource(tmp_path), model)
    model.config.rescale_every = 0
    check_source(ModelSource(tmp_path), model)
