"""Adapters of experts as PEFT stores them, and apart.

An unfused model (``experts.py``) has a LoRA layer on each expert's linears. The original has fused parameters, which PEFT
adapts as a whole (``target_parameters``): of E experts at rank r ``lora_A (r E, in)``, expert by expert, and
``lora_B (out, r E)``, whose columns go through the experts fastest; of two parameters of a module the first is the inner
one, under ``base_layer`` (``peft.tuners.lora.layer.ParamWrapper``). On disk an adapter is as PEFT has it.
"""

import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import TensorEntry, read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.modeling.experts import PARTS, experts_of, owner_of
from emloc_ray.modeling.matching import lookup, matches, order_free

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every module's name
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TABLES = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))  # by pattern, and for all others


@dataclass(frozen=True)
class ExpertEntry:
    """Expert ``index``'s part of a stored tensor ``whole``, read as :class:`TensorEntry` is."""

    whole: TensorEntry
    index: int
    num_experts: int

    def read_rows(self) -> Tensor:
        """``(r, in)`` of a ``lora_A``, ``(out, r)`` of a ``lora_B``."""
        whole = self.whole
        if whole.name.endswith(_A):
            r = whole.shape[0] // self.num_experts
            return whole.read_rows(self.index * r, (self.index + 1) * r)
        look: tuple[int, ...] = ()
        if whole.version is None:  # another adapter may lie at the same place of a file system by now
            status = whole.file.stat()
            look = status.st_ino, status.st_mtime_ns
        return _read(whole, *look)[:, self.index :: self.num_experts].contiguous()


@functools.lru_cache(maxsize=2)  # a layer's experts are read one after the other
def _read(entry: TensorEntry, *look: int) -> Tensor:
    return entry.read_rows()


def split_experts(
    config: Mapping[str, Any], entries: Mapping[str, TensorEntry], where: Path
) -> dict[str, TensorEntry | ExpertEntry]:
    """The stored tensors of the adapter in ``where``, by the names that an unfused model's has; ``config`` is its
    ``adapter_config.json``. Raises ConfigError where ``target_parameters`` names what is no expert's and no linear's weight."""
    _check_parameters(config, where)
    apart: dict[str, TensorEntry | ExpertEntry] = {}
    for key, entry in entries.items():
        suffix = _A if key.endswith(_A) else _B
        module = key.removeprefix(PREFIX).removesuffix(suffix)
        container = module
        while container.endswith(".base_layer"):
            container = container.removesuffix(".base_layer")
        targeted = _targeted(config, container)
        if not targeted:
            apart[key] = entry
            continue
        part = targeted[-1 - module.removeprefix(container).count(".base_layer")]
        r = lookup(_parameter(container, part), config.get("rank_pattern") or {}, config["r"])
        num_experts = entry.shape[0 if suffix == _A else 1] // r
        for index in range(num_experts):
            apart[f"{PREFIX}{container}.{index}.{part}{suffix}"] = ExpertEntry(entry, index, num_experts)
    return apart


def join_experts(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an unfused model's adapter as PEFT stores them, where ``config`` names fused parameters."""
    stored: dict[str, Tensor] = {}
    by_parameter: dict[tuple[str, str, str], dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = _A if key.endswith(_A) else _B
        owner = owner_of(key.removeprefix(PREFIX).removesuffix(suffix))
        if owner is None or owner[2] not in _targeted(config, owner[0]):
            stored[key] = tensor
        else:
            by_parameter.setdefault((owner[0], owner[2], suffix), {})[owner[1]] = tensor
    for (container, part, suffix), experts in by_parameter.items():
        targeted = _targeted(config, container)
        inner = ".base_layer" * (len(targeted) - 1 - targeted.index(part))
        ordered = [experts[index] for index in range(len(experts))]
        joined = torch.cat(ordered) if suffix == _A else torch.stack(ordered, dim=2).flatten(1)
        stored[f"{PREFIX}{container}{inner}{suffix}"] = joined
    return stored


def name_in_patterns(config: Mapping[str, Any], module: str) -> str:
    """The name by which ``rank_pattern`` and ``alpha_pattern`` of a saved adapter know a module: its own, or, of an expert's
    linear, that of the fused parameter that the adapter targets."""
    owner = owner_of(module)
    if owner is None or owner[2] not in _targeted(config, owner[0]):
        return module
    return _parameter(owner[0], owner[2])


def _parameter(container: str, part: str) -> str:
    return f"{container}.{PARTS[part]}"


def _targeted(config: Mapping[str, Any], container: str) -> list[str]:
    """The parts of a module's experts whose fused parameters the adapter targets, in the order that they are nested."""
    targets = list(config.get("target_parameters") or ())
    return [part for part in PARTS if targets and matches(_parameter(container, part), targets)]


def _check_parameters(config: Mapping[str, Any], where: Path) -> None:
    for target in config.get("target_parameters") or ():
        if target.rpartition(".")[2] not in (*PARTS.values(), "weight"):
            raise ConfigError(f"{where} targets the parameter {target}, which is no expert's: train without it.")


def store_as_peft_does(directory: Path, model: nn.Module) -> None:
    """Rewrites an adapter of an unfused ``model``, as just saved, for the original; one that adapts no expert stays."""
    config = json.loads((directory / CONFIG_NAME).read_text())
    tensors = load_file(directory / WEIGHTS_NAME)  # still on this node alone
    names = sorted(key.removeprefix(PREFIX).removesuffix(_A) for key in tensors if key.endswith(_A))
    experts = {name.removeprefix(PREFIX): module for name, module in experts_of(model).items()}
    owners = [owner for name in names if (owner := owner_of(name)) is not None and owner[0] in experts]
    adapted = sorted({(module, part) for module, _, part in owners})
    for module, part in adapted:
        _add_the_rest(tensors, module, part, experts[module].num_experts)
    parameters = {_parameter(module, part): f"{module}.0.{part}" for module, part in adapted}
    plain = [name for name in names if (owner_of(name) or ("",))[0] not in experts]
    model_type: Any = getattr(model.config, "model_type", None)
    parameters |= {f"{name}.weight": name for name in taken_for_experts(model_type, plain)}
    if not parameters:
        return
    _add_patterns(config, parameters, plain)
    config["target_parameters"] = sorted(parameters)
    linears = [name for name in plain if f"{name}.weight" not in parameters]
    if isinstance(config["target_modules"], str) or len(linears) < len(plain):
        config["target_modules"] = linears
    config["lora_dropout"] = 0.0  # which PEFT refuses on parameters; it is for training alone
    write_tensors(directory / WEIGHTS_NAME, join_experts(config, tensors))
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _add_the_rest(tensors: dict[str, Tensor], module: str, part: str, num_experts: int) -> None:
    """Zeros for the experts that are not adapted: PEFT has one rank for all of a parameter."""
    for suffix in (_A, _B):
        keys = [f"{PREFIX}{module}.{index}.{part}{suffix}" for index in range(num_experts)]
        shape = next(tensors[key] for key in keys if key in tensors)
        tensors.update({key: torch.zeros_like(shape) for key in keys if key not in tensors})


def _add_patterns(config: dict[str, Any], parameters: Mapping[str, str], plain: Sequence[str]) -> None:
    """Makes ``rank_pattern`` and ``alpha_pattern`` hold for the fused ``parameters`` too: the values of the linears that each
    stands for.

    A pattern for other linears may match a parameter as well, as one for shared experts' ``down_proj`` does. The full names of
    those linears replace it: PEFT takes the first pattern that matches, and sorts them when it saves. One that fits no linear
    goes, as those for single experts (:func:`readable`): of such PEFT warns at each load.
    """
    for table, default in _TABLES:
        patterns, usual = config.get(table) or {}, config[default]
        mistaken = {key: value for key, value in patterns.items() if _fits_any(parameters, key)}
        named = {name: lookup(name, patterns, usual) for name in plain if _fits(name, mistaken)}
        values = {name: lookup(linear, patterns, usual) for name, linear in parameters.items()}
        config[table] = {
            **{key: value for key, value in patterns.items() if key not in mistaken and _fits_any(plain, key)},
            **named,
            **{name: value for name, value in values.items() if value != usual},
        }


def order_free_tables(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The tables of ranks and alphas in an adapter's ``settings``, so written that they mean the same for ``names`` after PEFT
    has sorted their keys, as it does when it saves."""
    tables = {key: settings[key] for key, _ in _TABLES if settings.get(key)}
    return {key: order_free(table, names, exact_pattern) for key, table in tables.items()}


def exact_pattern(name: str) -> str:
    """A pattern that fits a module alone, or, of an expert's linear, the same linear of all experts beside it."""
    owner = owner_of(name)
    return f"^{re.escape(name)}" if owner is None else rf"^{re.escape(owner[0])}\.\d+\.{owner[2]}"


def _fits(name: str, patterns: Mapping[str, Any]) -> bool:
    return lookup(name, patterns, None) is not None


def _fits_any(names: Iterable[str], pattern: str) -> bool:
    return any(_fits(name, {pattern: 1}) for name in names)


def taken_for_experts(model_type: str, names: Sequence[str]) -> list[str]:
    """The linears that PEFT takes for experts, because they are called as experts' once were: it does so in all models
    whose experts transformers fuses, for dense layers and shared experts too (``_convert_peft_config_moe``)."""
    from peft.utils import transformers_weight_conversion as conversion

    kind: Any = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    mistaken = list(conversion._MOE_TARGET_MODULE_MAPPING.get(kind, ()))
    return [name for name in names if mistaken and matches(name, mistaken)]


def renamed_by_peft(model: Any, names: Sequence[str]) -> list[str]:
    """The linears whose LoRA factors PEFT looks for under another name when it loads them: it takes their keys for those of a
    checkpoint, and renames them as transformers does these. Names that differ in numbers alone share what is done to the first.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    if get_checkpoint_conversion_mapping(model.config.model_type) is None or not kinds:
        return []
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    keys = {f"{PREFIX}{kind[0]}{_A}": kind for kind in kinds.values()}
    config, factors = LoraConfig(r=1, target_modules=["-"]), {key: torch.zeros(1) for key in keys}
    kept = conversion.convert_peft_adapter_state_dict_for_transformers(model, config, factors)
    return [name for key, kind in keys.items() if key not in kept for name in kind]


@contextlib.contextmanager
def as_linears() -> Iterator[None]:
    """While it lasts, PEFT takes no linear for an expert by its name: in an unfused model all are what they seem."""
    from peft.utils import transformers_weight_conversion as conversion

    mapping = conversion._MOE_TARGET_MODULE_MAPPING
    conversion._MOE_TARGET_MODULE_MAPPING = {}
    try:
        yield
    finally:
        conversion._MOE_TARGET_MODULE_MAPPING = mapping


@contextlib.contextmanager
def readable(directory: Path, model: nn.Module) -> Iterator[Path]:
    """The adapter in ``directory`` as ``model``, unfused, can load it: itself, or a copy in which experts are apart."""
    config = json.loads((directory / CONFIG_NAME).read_text())
    if not config.get("target_parameters") or not experts_of(model):
        yield directory
        return
    stored = {entry.name: entry for entry in read_shard(directory / WEIGHTS_NAME).entries}
    entries = split_experts(config, stored, directory)
    names = [key.removeprefix(PREFIX).removesuffix(_A) for key in entries if key.endswith(_A)]
    stored_as = {exact_pattern(name): known for name in names if (known := name_in_patterns(config, name)) != name}
    for table, default in _TABLES:  # the experts' first: of several patterns that fit the first counts
        patterns = config.get(table) or {}
        experts = {pattern: lookup(parameter, patterns, config[default]) for pattern, parameter in stored_as.items()}
        config[table] = {**experts, **patterns} if patterns else {}
    config["target_modules"], config["target_parameters"] = names, None
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder) / WEIGHTS_NAME, {key: entry.read_rows() for key, entry in entries.items()})
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config))
        yield Path(folder)
