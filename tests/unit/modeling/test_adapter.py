"""LoRA through PEFT: attached to factors, saved under the original's names, read back with PEFT's own scales."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import IDS, TARGETS, logits, train
from dense_weights import dense_weight
from faulting.s3 import uri
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import FAMILIES
from transformers import AutoModelForCausalLM

from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.modeling.adapter import attach_adapter, load_adapter, read_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    LoraModule,
    write_adapter,
)
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.expert_adapters import order_free_tables
from emloc_ray.modeling.loading import load_model


def trained(directory: Path, emulator: Path, family: str = "llama", **options: Any) -> tuple[Any, Path]:
    """An adapter trained on an emulator, and where it is saved."""
    torch.manual_seed(0)
    options = {
        "target_modules": TARGETS[family],
        "r": 4,
        "lora_alpha": 16,
        "fan_in_fan_out": family == "gpt2",
        **options,
    }
    model = attach_adapter(load_model(emulator), adapter_config(**options))
    train(model)
    save_trained_adapter(model, directory, targets=options["target_modules"], base_model="the/original")
    return model.eval(), directory


def by_hand(model_dir: Path, adapter_dir: Path) -> torch.Tensor:
    """The original's logits with ``W + s B A`` in place of ``W``, from the files alone."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    config = json.loads((adapter_dir / CONFIG_NAME).read_text())
    tensors = load_file(adapter_dir / WEIGHTS_NAME)
    linears = {spec.name: spec for spec in block_linears(model)}
    for name, spec in linears.items():
        key = f"base_model.model.{name}.lora_A.weight"
        if key in tensors:
            update = config["lora_alpha"] / config["r"] * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            model.get_submodule(name).weight.data += update.T if spec.transposed else update
    return logits(model)


# Attaching.


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_to_factors_only_lora_learns(emulator_dir: Callable[[str], Path], family: str) -> None:
    model = load_model(emulator_dir(family))
    before = logits(model)
    factors = {name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    model = attach_adapter(
        model, adapter_config(target_modules=TARGETS[family], r=4, lora_alpha=8, fan_in_fan_out=family == "gpt2")
    )
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and n}
    assert {name.rsplit(".", 1)[-1] for name in layers} == set(TARGETS[family])
    assert all(isinstance(m.base_layer, FactorizedLinear) == (n in factors) for n, m in layers.items())
    assert any(n not in factors for n in layers)  # the layer that stayed dense
    model.eval()
    assert torch.equal(logits(model), before)  # B = 0
    model(input_ids=IDS, labels=IDS).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert len(learning) == 2 * len(layers)


@torch.no_grad()
def test_the_layer_s_update_is_s_b_a(emulator_dir: Callable[[str], Path]) -> None:
    model = attach_adapter(
        load_model(emulator_dir("llama")), adapter_config(target_modules=["q_proj"], r=4, lora_alpha=6)
    ).eval()
    layer = next(m for m in model.modules() if isinstance(getattr(m, "base_layer", None), FactorizedLinear))
    layer.lora_B["default"].weight.normal_()
    x = torch.randn(3, 64)
    update = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = x @ (dense_weight(layer.base_layer) + update).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# Saving and loading.


def test_it_is_loaded_onto_its_model_s_device(
    tmp_path: Path, emulator_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = trained(tmp_path / "a", emulator_dir("llama"))
    # PEFT's own choice is the first of a machine's GPUs, whichever one a rank has.
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("PEFT chose a device"))
    assert load_adapter(load_model(emulator_dir("llama")), directory).device.type == "cpu"


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_names_are_the_original_s(
    tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path], family: str
) -> None:
    _, directory = trained(tmp_path / "a", emulator_dir(family), family)
    assert {file.name for file in directory.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    names = [s.name for s in block_linears(load_model(tiny_model_dir(family)))]
    expected = {name for name in names if name.rsplit(".", 1)[-1] in TARGETS[family]}
    assert set(Adapter(directory).names) == expected
    assert set(load_file(directory / WEIGHTS_NAME)) == {
        f"base_model.model.{name}.{part}.weight" for name in expected for part in ("lora_A", "lora_B")
    }
    config = json.loads((directory / CONFIG_NAME).read_text())
    assert config["target_modules"] == TARGETS[family]
    assert config["base_model_name_or_path"] == "the/original"
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"


PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for model_dir, adapter_dir, out in json.loads(sys.argv[1]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir).eval()
    with torch.no_grad():
        torch.save(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits, out)
print("emloc_ray" in sys.modules)
"""


@pytest.mark.deep  # a process of its own, in which PEFT is imported once more
def test_on_the_original_with_plain_peft_it_is_w_plus_s_b_a(
    tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    jobs = []
    for family in FAMILIES:
        _, adapter = trained(tmp_path / family, emulator_dir(family), family)
        jobs.append((str(tiny_model_dir(family)), str(adapter), str(tmp_path / f"{family}.pt")))
    command = [sys.executable, "-c", PLAIN_PEFT, json.dumps(jobs), json.dumps(IDS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    for model_dir, adapter_dir, out in jobs:
        got, expected = torch.load(out), by_hand(Path(model_dir), Path(adapter_dir))
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        plain = logits(AutoModelForCausalLM.from_pretrained(model_dir))
        assert float((got - plain).abs().max()) > 1e-2 * float(plain.abs().max())  # the update shows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 5},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 3}, "alpha_pattern": {"down_proj": 1}},
        {"use_rslora": True, "rank_pattern": {r"layers\.0\..*": 8}, "alpha_pattern": {"q_proj": 32}},
        {"rank_pattern": {"q_proj": 2, r".*layers\.0.*": 3}, "alpha_pattern": {"q_proj": 32, r"layers\.0\..*": 8}},
    ],
    ids=str,
)
def test_scales_are_peft_s_own(
    tmp_path: Path,
    emulator_dir: Callable[[str], Path],
    tiny_model_dir: Callable[..., Path],
    options: dict[str, Any],
) -> None:
    tables = order_free_tables(options, [spec.name for spec in block_linears(load_model(tiny_model_dir("llama")))])
    model, directory = trained(tmp_path / "a", emulator_dir("llama"), **{**options, **tables})
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama")), directory)
    adapter = Adapter(directory)
    assert adapter.names
    for name in adapter.names:
        layer = plain.base_model.model.get_submodule(name)
        assert layer.scaling == model.base_model.model.get_submodule(name).scaling
        module = adapter.module(name)
        assert module.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert torch.equal(module.lora_a, layer.lora_A["default"].weight)
        assert torch.equal(module.lora_b, layer.lora_B["default"].weight)
        assert module.lora_a.shape[0] == layer.r["default"]


def test_an_adapter_of_which_peft_leaves_a_part_is_not_taken_for_whole(
    emulator_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT warns, and has that part at its start."""
    model, directory = trained(tmp_path / "adapter", emulator_dir("llama"))
    tensors = load_file(directory / WEIGHTS_NAME)
    left = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != left}, directory / WEIGHTS_NAME)
    said = f"{re.escape(str(directory))}: PEFT .* does not load all of this adapter .*{re.escape(left.partition('.lora_')[0])}"
    with pytest.raises(ArtifactError, match=said):
        load_adapter(load_model(emulator_dir("llama")), directory)
    with pytest.raises(ArtifactError, match=said):
        read_adapter(model, directory)


def test_every_node_loads_the_newest_adapter(
    s3_port: int, node_cache: Path, tmp_path: Path, emulator_dir: Callable[[str], Path]
) -> None:
    root = mirror(uri(s3_port, "newest/adapter"))
    other = tmp_path / "other" / root.name
    found = []
    for alpha in (16, 64):
        model, _ = trained(root / "adapter", emulator_dir("llama"), lora_alpha=alpha)
        found.append(logits(load_adapter(load_model(emulator_dir("llama")), other / "adapter").eval()))
        torch.testing.assert_close(found[-1], logits(model.eval()))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {"q_proj": 64}},
        {"rank_pattern": {"down_proj": 9, "q_proj": 2}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 6}},
    ],
    ids=str,
)
def test_what_is_written_has_one_rank_and_one_scale(
    tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path], options: dict[str, Any]
) -> None:
    """As vLLM takes it, which knows ``r`` and ``lora_alpha`` alone."""
    _, directory = trained(tmp_path / "a", emulator_dir("llama"), **options)
    adapter = Adapter(directory)
    write_adapter(tmp_path / "b", adapter.config, [adapter.module(name) for name in adapter.names])
    config = json.loads((tmp_path / "b" / CONFIG_NAME).read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    written = load_file(tmp_path / "b" / WEIGHTS_NAME)
    for name in adapter.names:
        before = adapter.module(name)
        lora_a, lora_b = (written[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert lora_a.shape[0] == lora_b.shape[1] == config["r"]
        update = config["lora_alpha"] / config["r"] * lora_b @ lora_a
        torch.testing.assert_close(update, before.scale * before.lora_b @ before.lora_a, rtol=1e-5, atol=1e-6)
    models = (AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama")) for _ in range(2))
    first, second = (
        logits(PeftModel.from_pretrained(model, tmp_path / part)) for model, part in zip(models, "ab", strict=True)
    )
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_write_adapter_writes_plain_peft_reads(
    tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path], family: str
) -> None:
    _, directory = trained(tmp_path / "a", emulator_dir(family), family)
    adapter = Adapter(directory)
    halved = [LoraModule(m.name, m.lora_a, m.lora_b / 2, m.scale) for m in map(adapter.module, adapter.names)]
    write_adapter(tmp_path / "b", adapter.config, halved)
    assert {file.name for file in (tmp_path / "b").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)), tmp_path / "b")
    expected = by_hand(tiny_model_dir(family), tmp_path / "b")
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, by_hand(tiny_model_dir(family), directory))
