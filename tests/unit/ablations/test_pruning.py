"""Pruned models are their originals with parts masked; their adapters, made whole, do the same on those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ablations.pruning import FAMILIES, Kept, Kind, Shape, group_energies, kept_counts, prune, recover_adapter
from families import save
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import make_values, task_rows, write_jsonl
from tiny import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_ray.config.reading import parse_config
from emloc_ray.core.gram import Gram
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.formats.grams import write_gram_index, write_gram_shard
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.planning.prepared import prepare

SIZES: dict[str, Any] = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
KINDS: tuple[Kind, ...] = ("layers", "random", "structured")
IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))
SMOLLM2 = Shape(num_layers=30, hidden_size=576, head_dim=64, num_heads=9, num_groups=3, num_channels=1536)


def write_grams(directory: Path, model: Any) -> Path:
    """Of random inputs of every o and down projection."""
    grams, generator = {}, torch.Generator().manual_seed(3)
    for spec in block_linears(model):
        if spec.name.endswith(("o_proj", "down_proj")):
            scales = torch.rand(spec.in_features, generator=generator)
            grams[spec.name] = Gram.zero(spec.in_features)
            grams[spec.name].update(torch.randn(40, spec.in_features, generator=generator) * scales)
    write_gram_shard(directory / "grams.safetensors", grams)
    files = dict.fromkeys(grams, "grams.safetensors")
    write_gram_index(directory, [[name] for name in grams], files, dict.fromkeys(grams, 40))
    return directory


def opened(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).double().eval()


def train(model: Any, directory: Path, **settings: Any) -> Any:
    """Saves a LoRA adapter that does something; returns the model with it."""
    trained = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    trained.save_pretrained(str(directory))
    return trained.double().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=[(family, kind) for family in ("llama", "qwen2") for kind in KINDS], ids=str)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Kept]:
    """An original, the model pruned from it at ratio 0.6, and what that kept."""
    family, kind = request.param
    root = tmp_path_factory.mktemp("pruned")
    original = save_model(root / "original", family, **SIZES)
    grams = write_grams(root / "calibration", opened(original)) if kind == "structured" else None
    prune(original, root / "small", kind, 0.6, 0, grams)
    return original, root / "small", Kept.read(root / "small" / "kept.json")


def masked(original: Path, kept: Kept) -> Any:
    """The original with zeros in the columns of o and down that read what is not kept, and in all that dropped layers give."""
    model, layers = opened(original), {layer.layer: layer for layer in kept.layers}
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            out, down = block.self_attn.o_proj.weight, block.mlp.down_proj.weight
            heads = layers[number].heads if number in layers else []
            channels = layers[number].channels if number in layers else []
            gone = [head for head in range(kept.shape.num_heads) if head not in heads]
            out.unflatten(1, (kept.shape.num_heads, -1))[:, gone] = 0
            down[:, [channel for channel in range(kept.shape.num_channels) if channel not in channels]] = 0
    return model


def test_a_pruned_model_is_its_original_with_the_rest_masked(pruned: tuple[Path, Path, Kept]) -> None:
    original, small, kept = pruned
    torch.testing.assert_close(logits(opened(small)), logits(masked(original, kept)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(opened(small)), logits(opened(original)), atol=1e-3)
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (original, small)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_a_run_takes_it_as_its_model(pruned: tuple[Path, Path, Kept], tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(20))
    values = make_values(tmp_path / "run", pruned[1], rows, emulator={"compression_ratio": 1.0})
    layout = prepare(parse_config(values)).layout
    assert not layout.differs
    assert len(layout.adapted) == 7 * len(pruned[2].layers)


def test_it_has_the_parameters_that_it_says_and_no_more_than_asked(pruned: tuple[Path, Path, Kept]) -> None:
    original, small, kept = pruned
    whole, found = (sum(s.num_parameters for s in block_linears(opened(place))) for place in (original, small))
    told = json.loads((small / "kept.json").read_text())
    assert (whole, found) == (told["parameters"], told["kept_parameters"])
    grain = kept.shape.block_parameters if told["kind"] == "layers" else 5 * kept.shape.channel_parameters
    assert 0 <= 0.6 * whole - found < grain


def test_an_adapter_made_whole_does_on_the_masked_original_what_it_did_on_the_pruned_model(
    pruned: tuple[Path, Path, Kept], tmp_path: Path
) -> None:
    original, small, kept = pruned
    trained = train(opened(small), tmp_path / "adapter", r=3, lora_alpha=12, target_modules="all-linear")
    recover_adapter(tmp_path / "adapter", small / "kept.json", tmp_path / "whole")
    whole = PeftModel.from_pretrained(masked(original, kept), tmp_path / "whole").double()
    torch.testing.assert_close(logits(whole), logits(trained), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(trained), logits(opened(small)), atol=1e-2)
    state = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    adapted = {name for name, module in whole.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert {f"base_model.model.{name}.lora_A.weight" for name in adapted} == {n for n in state if "lora_A" in n}
    json_config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert json_config["base_model_name_or_path"] == str(original)


def test_an_adapter_of_peft_itself_with_ranks_of_its_own_is_made_whole(tmp_path: Path) -> None:
    original = save_model(tmp_path / "original", **SIZES)
    prune(original, tmp_path / "small", "layers", 0.6, 0, None)
    settings = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.1\..*up_proj": 2}}
    trained = train(opened(tmp_path / "small"), tmp_path / "adapter", r=4, lora_alpha=6, use_rslora=True, **settings)
    kept_path = tmp_path / "small" / "kept.json"
    recover_adapter(tmp_path / "adapter", kept_path, tmp_path / "whole")
    whole = PeftModel.from_pretrained(masked(original, Kept.read(kept_path)), tmp_path / "whole").double()
    torch.testing.assert_close(logits(whole), logits(trained), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.6, [0, 2, 4]), (0.4, [0, 4]), (0.8, [0, 1, 3, 4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_layers_are_dropped_evenly_between_the_first_and_the_last(
    tmp_path: Path, ratio: float, expected: list[int]
) -> None:
    prune(save_model(tmp_path / "original", **SIZES), tmp_path / "small", "layers", ratio, 0, None)
    assert [layer.layer for layer in Kept.read(tmp_path / "small" / "kept.json").layers] == expected
    assert opened(tmp_path / "small").config.num_hidden_layers == len(expected)


def test_random_parts_follow_the_seed_and_differ_between_layers(tmp_path: Path) -> None:
    original = save_model(tmp_path / "original", **SIZES)
    found = []
    for number, seed in enumerate((0, 0, 1)):
        prune(original, tmp_path / str(number), "random", 0.5, seed, None)
        found.append(Kept.read(tmp_path / str(number) / "kept.json").layers)
    assert found[0] == found[1] != found[2]
    assert len({tuple(layer.channels) for layer in found[0]}) == 5


def test_a_mistral_with_sliding_attention(tmp_path: Path) -> None:
    original = save("Mistral", tmp_path / "original")
    prune(original, tmp_path / "small", "random", 0.5, 0, None)
    kept = Kept.read(tmp_path / "small" / "kept.json")
    torch.testing.assert_close(logits(opened(tmp_path / "small")), logits(masked(original, kept)), rtol=1e-9, atol=1e-9)


def test_the_energies_are_those_of_the_outputs(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 12), (30, 12)))
    found = group_energies(weight, x.T @ x, 4)
    expected = [(x[:, part : part + 3] @ weight[:, part : part + 3].T).square().sum() for part in range(0, 12, 3)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_structured_keeps_the_parts_of_largest_energy(tmp_path: Path) -> None:
    original = save_model(tmp_path / "original", **SIZES)
    model = opened(original)
    with torch.no_grad():  # channels 3 and up, and group 1, give next to nothing
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 3:] *= 1e-3
            block.self_attn.o_proj.weight[:, 16:32] *= 1e-3
    model.float().save_pretrained(original)
    prune(original, tmp_path / "small", "structured", 0.7, 0, write_grams(tmp_path / "calibration", model))
    for layer in Kept.read(tmp_path / "small" / "kept.json").layers:
        assert layer.channels[:3] == [0, 1, 2]
        assert 1 not in layer.groups
        assert layer.heads == [head for group in layer.groups for head in (2 * group, 2 * group + 1)]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.5, (2, 682)), (0.25, (1, 341)), (0.75, (2, 1194)), (1.0, (3, 1536)), (0.1, (1, 34))],
)
def test_groups_and_channels_of_a_real_shape(ratio: float, expected: tuple[int, int]) -> None:
    groups, channels = kept_counts(SMOLLM2, ratio)
    assert (groups, channels) == expected
    spent = groups * SMOLLM2.group_parameters + channels * SMOLLM2.channel_parameters
    assert 0 <= ratio * SMOLLM2.block_parameters - spent < SMOLLM2.channel_parameters


def test_the_heads_of_a_block_divide_its_hidden_size() -> None:
    qwen2 = Shape(num_layers=28, hidden_size=3584, head_dim=128, num_heads=28, num_groups=4, num_channels=18944)
    assert {kept_counts(qwen2, ratio)[0] for ratio in (0.2, 0.5, 0.7, 0.75, 0.8, 1.0)} == {1, 2, 4}


def test_other_families_and_impossible_ratios_are_refused(tmp_path: Path) -> None:
    assert "gpt2" not in FAMILIES
    with pytest.raises(ConfigError, match=r"is a gpt2, and what can be pruned is llama, qwen2, mistral"):
        prune(save_model(tmp_path / "gpt2", "gpt2"), tmp_path / "small", "layers", 0.5, 0, None)
    original = save_model(tmp_path / "llama")
    with pytest.raises(ConfigError, match="leaves 1 of 2 layers"):
        prune(original, tmp_path / "small", "layers", 0.5, 0, None)
    with pytest.raises(ConfigError, match="leaves no block an attention group"):
        prune(original, tmp_path / "small", "random", 0.01, 0, None)
    with pytest.raises(ConfigError, match=r"is 1\.5: give one above 0"):
        prune(original, tmp_path / "small", "random", 1.5, 0, None)
    with pytest.raises(ConfigError, match="weighs by Grams"):
        prune(original, tmp_path / "small", "structured", 0.5, 0, None)
    grams = tmp_path / "calibration"
    write_gram_index(grams, [], {}, {})
    with pytest.raises(ConfigError, match=r"no Gram of model\.layers\.0\.self_attn\.o_proj"):
        prune(original, tmp_path / "small", "structured", 0.5, 0, grams)
    assert not (tmp_path / "small").exists()


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    original = save_model(tmp_path / "original", **SIZES)
    for kind in ("layers", "random"):
        prune(original, tmp_path / kind, kind, 0.6, 0, None)
    of_the_original = tmp_path / "adapter"
    train(opened(original), of_the_original, target_modules="all-linear")
    with pytest.raises(ArtifactError, match=r"but 3 layers are kept"):
        recover_adapter(of_the_original, tmp_path / "layers" / "kept.json", tmp_path / "whole")
    with pytest.raises(ArtifactError, match=r"has 128 features, but \d+ are kept"):
        recover_adapter(of_the_original, tmp_path / "random" / "kept.json", tmp_path / "whole")
    with pytest.raises(ArtifactError, match=r"is no kept.json"):
        recover_adapter(of_the_original, tmp_path / "kept.json", tmp_path / "whole")
    config = json.loads((of_the_original / "adapter_config.json").read_text())
    (of_the_original / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ConfigError, match="neither LoRA nor rsLoRA"):
        recover_adapter(of_the_original, tmp_path / "random" / "kept.json", tmp_path / "whole")
