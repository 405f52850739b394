"""Adapters on disk, in PEFT's format, under the original model's module names: opened by their headers, read, written."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from emloc_ray.core.updates import HadamardUpdate, KroneckerUpdate, LowRankUpdate, Update
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.formats.checkpoint import read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.io.store.atomic import atomic_directory, copy_file
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.expert_adapters import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    join_experts,
    name_in_patterns,
    split_experts,
)
from emloc_ray.modeling.matching import lookup

_MAGNITUDE = "lora_magnitude_vector"

# What an adapter is to a weight: added to it; added, then its rows scaled to magnitudes (DoRA); a scale of its rows or
# columns (IA³); nothing, as it changes what the model reads (prefix and prompt tuning).
Kind = Literal["additive", "decomposed", "scaling", "prompt"]

# By PEFT's name of the method: its kind, and how the tensors are called of which each module has one.
_METHODS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "LORA": ("additive", (".lora_A.weight",)),
    "LOHA": ("additive", (".hada_w1_a",)),
    "LOKR": ("additive", (".lokr_w1", ".lokr_w1_a")),
    "VERA": ("additive", (".vera_lambda_b",)),
    "IA3": ("scaling", (".ia3_l",)),
    "PREFIX_TUNING": ("prompt", ()),
    "PROMPT_TUNING": ("prompt", ()),
}

# What would change the update's formula, or the base weights themselves.
_REFUSED = ("use_qalora", "modules_to_save", "trainable_token_indices", "lora_bias")


@dataclass(frozen=True)
class LoraModule:
    """One module's update ``s B A``: ``lora_a (r, in)``, ``lora_b (out, r)``, ``scale`` s."""

    name: str
    lora_a: Tensor
    lora_b: Tensor
    scale: float


class Adapter:
    """An adapter on disk: ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT writes them.

    Opened by its header, as which it can be sent to others; a module's tensors are read when they are asked for. Raises
    ArtifactError where a file is missing or no adapter, ConfigError where the adapter's kind is not known here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        ensure(self.directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (self.directory / name).is_file():
                raise ArtifactError(f"{self.directory} holds no {name}: run the finetune stage again.")
        self.config: dict[str, Any] = json.loads((self.directory / CONFIG_NAME).read_text())
        _refuse_variants(self.config, self.directory)
        self.peft_type: str = self.config["peft_type"]
        kind, endings = _METHODS[self.peft_type]
        self.kind: Kind = "decomposed" if self.config.get("use_dora") else kind
        shard = read_shard(self.directory / WEIGHTS_NAME)
        self.entries = split_experts(self.config, {entry.name: entry for entry in shard.entries}, self.directory)
        self.names = [
            key.removeprefix(PREFIX).removesuffix(end) for key in self.entries for end in endings if key.endswith(end)
        ]

    @property
    def is_lora(self) -> bool:
        """Whether its files hold ``A`` and ``B`` of LoRA or of a variant."""
        return self.peft_type == "LORA"

    def module(self, name: str) -> LoraModule:
        """The update of one module of LoRA or a variant, in float32; of DoRA before its rows are scaled."""
        lora_a, lora_b = self._read(name, "lora_A.weight"), self._read(name, "lora_B.weight")
        return LoraModule(name, lora_a, lora_b, adapter_scale(self.config, name))

    def update(self, spec: LinearSpec) -> Update:
        """What one module adds to its weight, by the method's formula in PEFT; of DoRA before its rows are scaled."""
        name = spec.name
        if self.peft_type == "LOHA":
            factors = {part: self._read(name, f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
            return HadamardUpdate(**factors, scale=self._scale("alpha", name))
        if self.peft_type == "LOKR":
            return KroneckerUpdate(
                self._kronecker(name, "lokr_w1"), self._kronecker(name, "lokr_w2"), self._scale("alpha", name)
            )
        if self.peft_type == "VERA":
            b, d = self._read(name, "vera_lambda_b"), self._read(name, "vera_lambda_d")
            # One A and one B for all modules, as large as the largest: each reads the beginning of either.
            shared_a = self.entries["base_model.vera_A"].read_rows().float()[:, : spec.in_features]
            shared_b = self.entries["base_model.vera_B"].read_rows().float()[: spec.out_features]
            return LowRankUpdate(d.unsqueeze(1) * shared_a, b.unsqueeze(1) * shared_b)
        module = self.module(name)
        return LowRankUpdate(module.lora_a, module.lora_b, module.scale)

    def magnitude(self, name: str) -> Tensor:
        """DoRA's ``m (out,)`` of one module, in float32."""
        return self._read(name, _MAGNITUDE)

    def scaling(self, name: str) -> tuple[Tensor, bool]:
        """IA³'s vector of one module, in float32, and whether it scales what the linear reads, not what it gives."""
        vector = self._read(name, "ia3_l")
        return vector.flatten(), vector.shape[0] == 1

    def _read(self, name: str, part: str) -> Tensor:
        return self.entries[f"{PREFIX}{name}.{part}"].read_rows().to(torch.float32)

    def _scale(self, alpha: str, name: str) -> float:
        return adapter_scale({**self.config, "lora_alpha": self.config[alpha]}, name)

    def _kronecker(self, name: str, part: str) -> Tensor:
        if f"{PREFIX}{name}.{part}" in self.entries:
            return self._read(name, part)
        return self._read(name, f"{part}_a") @ self._read(name, f"{part}_b")


def adapter_scale(config: dict[str, Any], name: str) -> float:
    """``s = lora_alpha / r``, or ``lora_alpha / √r`` for rsLoRA, with the module's own r and alpha where patterns say."""
    name = name_in_patterns(config, name)
    r = lookup(name, config.get("rank_pattern") or {}, config["r"])
    alpha = lookup(name, config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def write_adapter(
    directory: Path,
    config: dict[str, Any],
    modules: Sequence[LoraModule],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes LoRA or a variant in PEFT's format, atomically, in :func:`portable_form`; ``config`` is an
    ``adapter_config.json`` of such an adapter. ``magnitudes`` are DoRA's, by module."""
    config, modules = portable_form(config, modules)
    tensors = {f"{PREFIX}{name}.{_MAGNITUDE}": m.to(torch.float32) for name, m in (magnitudes or {}).items()}
    for module in modules:
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = module.lora_a.to(torch.float32)
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = module.lora_b.to(torch.float32)
    with atomic_directory(directory) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, join_experts(config, tensors))
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def portable_form(config: dict[str, Any], modules: Sequence[LoraModule]) -> tuple[dict[str, Any], Sequence[LoraModule]]:
    """The same updates at one rank and one scale ``lora_alpha / r``. vLLM reads no patterns, nor does llama.cpp, which takes
    rsLoRA for LoRA: either would scale other adapters wrongly, without a word.

    The rank is the largest, to which the others are padded with zeros; the scale is that of the modules that no pattern names.
    """
    r = max(module.lora_a.shape[0] for module in modules)
    alpha = config["lora_alpha"] * r / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    one = {"r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
    # How it was begun: PEFT begins it so again before it loads it, which "orthogonal" cannot on a base in 4 or 8 bits.
    one["init_lora_weights"] = True
    form = {**config, **one, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return form, [_at_scale(module, r, alpha / r) for module in modules]


def _at_scale(module: LoraModule, r: int, scale: float) -> LoraModule:
    missing = r - module.lora_a.shape[0]
    lora_b = module.lora_b * (module.scale / scale)
    return LoraModule(module.name, F.pad(module.lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing)), scale)


def copy_adapter(source: Path, directory: Path) -> None:
    """The same files at another place, atomically."""
    with atomic_directory(directory) as temporary:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            copy_file(source / name, temporary / name)


def lora_settings(modules: Sequence[LoraModule]) -> dict[str, Any]:
    """The settings of a LoRA adapter whose modules are these, each of its own rank and of scale 1."""
    ranks = {module.name: module.lora_a.shape[0] for module in modules}
    r = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return {"target_modules": list(ranks), "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern}


def lora_config(config: dict[str, Any], modules: Sequence[LoraModule]) -> dict[str, Any]:
    """The ``adapter_config.json`` of a LoRA adapter of ``modules``, on the linears of the adapter that ``config`` is of."""
    form = adapter_config("lora", **lora_settings(modules)).to_dict()
    kept = (
        "target_modules",
        "exclude_modules",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "fan_in_fan_out",
    )
    return {
        **json.loads(json.dumps(form, default=list)),
        **{key: config[key] for key in kept if key in config},
        "inference_mode": True,
    }


def _refuse_variants(config: dict[str, Any], where: Path) -> None:
    if config.get("peft_type") not in _METHODS:
        known = ", ".join(_METHODS)
        raise ConfigError(f"{where} is a {config.get('peft_type')} adapter: what can be used is {known}.")
    for key in _REFUSED:
        if config.get(key):
            raise ConfigError(
                f"{where} uses {key}, whose update is not that of its method on a linear: train without it."
            )
    if str(config.get("init_lora_weights", True)).lower().startswith(("pissa", "olora", "corda", "loftq")):
        kind = config["init_lora_weights"]
        raise ConfigError(
            f"{where} was initialised by {kind}, which changes the base weights: convert it to LoRA first."
        )
