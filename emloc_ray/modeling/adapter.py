"""LoRA through PEFT: attached to factorized layers explicitly, saved under the original model's module names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.atomic import atomic_directory
from emloc_ray.io.checkpoint import read_shard
from emloc_ray.io.node_cache import ensure
from emloc_ray.io.shard_writing import write_tensors
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.expert_adapters import as_linears, join_experts, readable, split_experts, store_as_peft_does
from emloc_ray.modeling.matching import Patterns, lookup, matches, suffixes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What would change the update's formula from s B A, or the base weights themselves.
_REFUSED = ("use_dora", "use_qalora", "modules_to_save", "trainable_token_indices", "lora_bias")


class FactorizedLoraLinear(LoraLinear):
    """PEFT's LoRA layer around a :class:`FactorizedLinear`: the update reads and writes the whole layer."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        weight = base_layer.up.weight
        return weight.device, getattr(base_layer.up, "compute_dtype", weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises: an adapter trained on an emulator is merged into the original (``emloc-ray merge``)."""
        raise TypeError("An emulator's layer cannot take a merge: merge the corrected adapter into the original model.")


def lora_config(
    *,
    target_modules: Patterns,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    init_lora_weights: bool | str = True,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str = "CAUSAL_LM",
) -> LoraConfig:
    """PEFT's config, with factorized layers registered."""
    config = LoraConfig(
        task_type=task_type,
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        init_lora_weights=init_lora_weights,  # type: ignore[arg-type]
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=base_model,
    )
    return register_factorized(config)


def register_factorized(config: LoraConfig) -> LoraConfig:
    """Tells PEFT how to attach to factorized layers; returns the same config."""
    config._register_custom_module({FactorizedLinear: FactorizedLoraLinear})
    return config


def attach_adapter(model: Any, config: LoraConfig) -> PeftModel:
    """A fresh adapter on an emulator or an original."""
    with as_linears():
        return get_peft_model(model, config, low_cpu_mem_usage=False)


def load_adapter(model: Any, directory: Path, name: str = "default") -> PeftModel:
    """A saved adapter, frozen, on an emulator or on its original."""
    ensure(Path(directory))
    with readable(Path(directory), model) as folder, as_linears():
        config = register_factorized(LoraConfig.from_pretrained(str(folder)))
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name, peft_config=config)
            return model
        return PeftModel.from_pretrained(model, folder, adapter_name=name, config=config)


def portable_targets(chosen: Sequence[str], every_linear: Sequence[str]) -> list[str]:
    """The shortest ``target_modules`` that names just ``chosen`` among all the model's linears.

    Suffixes (``q_proj``) where they suffice, as servers expect; else full names.
    """
    short = suffixes(chosen)
    reached = [name for name in every_linear if matches(name, short)]
    return short if set(reached) == set(chosen) else list(chosen)


@dataclass(frozen=True)
class LoraModule:
    """One module's update ``s B A``: ``lora_a (r, in)``, ``lora_b (out, r)``, ``scale`` s."""

    name: str
    lora_a: Tensor
    lora_b: Tensor
    scale: float


class Adapter:
    """A LoRA adapter on disk: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them.

    Opened by its header; a module's tensors are read when they are asked for.

    Raises:
        ArtifactError: where a file is missing or no adapter.
        ConfigError: where the adapter is of a kind whose update is not ``s B A`` on a linear's weight.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        ensure(self.directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (self.directory / name).is_file():
                raise ArtifactError(f"{self.directory} holds no {name}: run the finetune stage again.")
        self.config: dict[str, Any] = json.loads((self.directory / CONFIG_NAME).read_text())
        _refuse_variants(self.config, self.directory)
        shard = read_shard(self.directory / WEIGHTS_NAME)
        self.entries = split_experts(self.config, {entry.name: entry for entry in shard.entries}, self.directory)
        self.names = [_module_name(key) for key in self.entries if key.endswith(".lora_A.weight")]

    def module(self, name: str) -> LoraModule:
        """The update of one module, in float32."""
        lora_a = self.entries[f"{_PREFIX}{name}.lora_A.weight"].read_rows().to(torch.float32)
        lora_b = self.entries[f"{_PREFIX}{name}.lora_B.weight"].read_rows().to(torch.float32)
        return LoraModule(name, lora_a, lora_b, adapter_scale(self.config, name))


def adapter_scale(config: dict[str, Any], name: str) -> float:
    """``s = lora_alpha / r``, or ``lora_alpha / √r`` for rsLoRA, with the module's own r and alpha where patterns say."""
    r = lookup(name, config.get("rank_pattern") or {}, config["r"])
    alpha = lookup(name, config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def write_adapter(directory: Path, config: dict[str, Any], modules: Sequence[LoraModule]) -> None:
    """Writes an adapter in PEFT's format, atomically; ``config`` is an ``adapter_config.json`` whose scales hold."""
    tensors = {}
    for module in modules:
        tensors[f"{_PREFIX}{module.name}.lora_A.weight"] = module.lora_a.to(torch.float32)
        tensors[f"{_PREFIX}{module.name}.lora_B.weight"] = module.lora_b.to(torch.float32)
    with atomic_directory(directory) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, join_experts(config, tensors))
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_trained_adapter(
    model: PeftModel,
    directory: Path,
    *,
    targets: Patterns,
    base_model: str,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Saves the adapter as trained, under the original's module names and with portable ``target_modules``.

    ``state`` are its parameters by name, where those of ``model`` itself are scattered over processes.
    """
    with atomic_directory(directory) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False, state_dict=state)
        path = temporary / CONFIG_NAME
        config = json.loads(path.read_text())
        config["target_modules"] = targets if isinstance(targets, str) else list(targets)
        config["base_model_name_or_path"] = base_model
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (temporary / "README.md").unlink(missing_ok=True)
        store_as_peft_does(temporary, model)


def _module_name(key: str) -> str:
    return key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")


def _refuse_variants(config: dict[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where} is a {config.get('peft_type')} adapter: only LoRA's update s B A can be corrected.")
    for key in _REFUSED:
        if config.get(key):
            raise ConfigError(f"{where} uses {key}, whose update is not s B A on a linear: train without it.")
    if str(config.get("init_lora_weights", True)).lower().startswith(("pissa", "olora", "corda", "loftq", "eva")):
        kind = config["init_lora_weights"]
        raise ConfigError(
            f"{where} was initialised by {kind}, which changes the base weights: convert it to LoRA first."
        )
