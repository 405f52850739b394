"""The adapter methods by PEFT's own configs: which fields each takes, and its config for one model.

Bottleneck adapters (Houlsby, Pfeiffer) are not in PEFT, and not here.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.matching import Patterns, lookup, matches, select
from emloc_ray.text import one_line

if TYPE_CHECKING:  # PEFT takes seconds to import, and what reads an adapter's files does not need it
    from peft import PeftConfig

# The method's name in a config, and PEFT's config class: of all but LoRA and its variants.
CONFIGS = {
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "vera": "VeraConfig",
    "ia3": "IA3Config",
    "prefix_tuning": "PrefixTuningConfig",
    "prompt_tuning": "PromptTuningConfig",
}

# Fields that follow from the model or the run, or that this pipeline has another way to say: these and PeftConfig's own.
_SET_HERE = {
    *("fan_in_fan_out", "num_transformer_submodules", "save_projection", "use_effective_conv2d"),
    *("token_dim", "num_layers", "num_attention_heads"),
}
_OF_THE_EMULATOR = "it trains weights of the emulator that the adapter's files would carry to the original"
_ELSEWHERE = {
    "use_dora": "adapter.method dora does that",
    "target_parameters": "name experts' linears in adapter.target_modules",
    "layers_to_transform": "name the layers in adapter.target_modules",
    "layers_pattern": "name the layers in adapter.target_modules",
    "modules_to_save": _OF_THE_EMULATOR,
    "trainable_token_indices": _OF_THE_EMULATOR,
    "bias": "biases are the original's own",
    "lora_bias": "biases are the original's own",
    "prefix_projection": "PEFT saves the projection's output alone, from which no training could continue",
    "encoder_hidden_size": "it belongs to prefix_projection, which is not supported",
    "tokenizer_name_or_path": "the tokenizer is the model's",
    "tokenizer_kwargs": "the tokenizer is the model's",
}

# What PEFT leaves unsaid of its fields, or says in the middle of a run.
_BOUNDS: dict[str, dict[str, Any]] = {
    "alpha": {"gt": 0},
    "rank_dropout": {"ge": 0, "lt": 1},
    "module_dropout": {"ge": 0, "lt": 1},
    "vera_dropout": {"ge": 0, "lt": 1},
    "d_initial": {"gt": 0},
    "projection_prng_key": {"ge": 0, "lt": 2**63},
    "num_virtual_tokens": {"ge": 1},
}


def _config_class(method: str) -> type[PeftConfig]:
    import peft

    return getattr(peft, CONFIGS.get(method, "LoraConfig"))


def _field_names(kind: type[PeftConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def refused_field(method: str, key: str) -> str | None:
    """Why a field that PEFT's config has, of this method or another, is not to be given; None where it may be."""
    from peft import PeftConfig

    if key in _SET_HERE.union(_field_names(PeftConfig)) and key in _field_names(_config_class(method)):
        return "it is set by emloc_ray itself"
    return _ELSEWHERE.get(key)


def says_what_holds(method: str, key: str, value: Any) -> bool:
    """Whether a field that is not to be given has the value that it has anyway: what PEFT's examples and saved configs write."""
    fields = {field.name: field for field in dataclasses.fields(_config_class(method))}
    if key not in fields or (method in CONFIGS and refused_field(method, key) is None):
        return False
    if key == "task_type":
        return value in ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # as the model is
    made, default = fields[key].default_factory, fields[key].default
    held = {"peft_type": method.upper() if method in CONFIGS else "LORA", "use_dora": method == "dora"}
    return bool(value == held.get(key, default if made is dataclasses.MISSING else made()))


@functools.cache
def method_fields(method: str) -> dict[str, Any]:
    """The fields that a method takes, with types and bounds; an enum's values alone where PEFT also takes any text."""
    hints, names = typing.get_type_hints(_config_class(method)), _field_names(_config_class(method))
    fields = {name: _narrowed(name, hints[name]) for name in names if refused_field(method, name) is None}
    # Names are resolved here, so that every method can leave some out.
    return fields | ({"exclude_modules": list[str] | str | None} if "target_modules" in fields else {})


def _narrowed(name: str, hint: Any) -> Any:
    if name in _BOUNDS:
        from pydantic import Field  # what trains an adapter needs no config

        return typing.Annotated[hint, Field(**_BOUNDS[name])]
    options = typing.get_args(hint)
    named = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
    return named[0] if named and str in options else hint


def fields_of_all() -> set[str]:
    """Every field that some method takes."""
    return {name for method in CONFIGS for name in method_fields(method)}


def adapter_config(method: str = "lora", **settings: Any) -> PeftConfig:
    """PEFT's config of a method, LoRA's of its variants too, from PEFT's own fields; others among ``settings`` are left out.
    Raises ConfigError where PEFT refuses them."""
    kind = _config_class(method)
    known = _field_names(kind)
    given = {key: value for key, value in settings.items() if key in known and value is not None}
    try:
        return kind(**{"task_type": "CAUSAL_LM", **given})
    except (ValueError, TypeError) as error:
        raise ConfigError(_refusal(method, error)) from error


_NARROW = 8  # times narrower than hidden states


def default_targets(method: str, model_type: str, names: Sequence[str]) -> list[str] | None:
    """The linears that a method adapts where the config names none: IA³'s by PEFT's table, those that the model's ``names``
    have (experts' are fused now); None: every linear. Raises ConfigError for IA³ on a model that PEFT's table does not know."""
    if method != "ia3":
        return None
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING

    if model_type not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise ConfigError(
            f"adapter.target_modules: PEFT has no default of ia3 for models of type {model_type}: set it, and"
            " adapter.feedforward_modules."
        )
    table = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[model_type]
    return [target for target in table if any(matches(name, [target]) for name in names)]


def narrow_helpers(specs: Sequence[LinearSpec], hidden_size: int, r: int, rank_pattern: Mapping[str, int]) -> set[str]:
    """The linears that a default leaves out: their smaller side is below the rank that they would get, and at most an eighth
    of the hidden size. One number for each head, or for each of a few streams, comes out of them or goes in."""
    sides = {spec.name: min(spec.out_features, spec.in_features) for spec in specs}
    narrow = {name: side for name, side in sides.items() if side * _NARROW <= hidden_size}
    return {name for name, side in narrow.items() if side < lookup(name, rank_pattern, r)}


def feedforward_names(patterns: Patterns | None, model_type: str, adapted: Sequence[str]) -> list[str]:
    """The adapted linears whose input IA³ scales: by ``patterns``, else by PEFT's table for the model's type. Raises
    ConfigError where there is no default, or a pattern names none of ``adapted``."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING

    table = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    if patterns is None:
        if model_type not in table:
            raise ConfigError(
                f"adapter.feedforward_modules: PEFT has no default of ia3 for models of type {model_type}: name those of"
                " the targets whose input is to be scaled, or give [] for none."
            )
        return [name for name in adapted if matches(name, table[model_type])]
    return select(adapted, patterns, None, "adapter.feedforward_modules")


def count_parameters(model: Any, method: str, settings: dict[str, Any]) -> int:
    """How many parameters the method trains on ``model``, the original on the meta device: by attaching it there. Raises
    ConfigError where the method's config does not fit the model."""
    from peft import PromptTuningConfig, get_peft_model

    if settings.get("prompt_tuning_init") == "TEXT":
        settings = {**settings, "tokenizer_name_or_path": "the model's"}
    config = adapter_config(method, **settings)
    if isinstance(config, PromptTuningConfig):  # whatever it begins with: a model on the meta device has no embeddings
        config = adapter_config(method, num_virtual_tokens=config.num_virtual_tokens)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise ConfigError(_refusal(method, error)) from error
    return int(trainable)


def update_rank(method: str, settings: dict[str, Any], spec: LinearSpec) -> int:
    """The highest rank of what an additive method adds to a linear: at most its smaller side; 0 of other methods."""
    smaller = min(spec.out_features, spec.in_features)
    if method in CONFIGS and "r" not in method_fields(method):
        return 0
    default: Any = settings["r"] if "r" in settings else _config_class(method).__dataclass_fields__["r"].default
    r = int(lookup(spec.name, settings.get("rank_pattern") or {}, default))
    if method == "loha":
        r = r * r
    elif method == "lokr":  # rank of W1 times rank of W2
        from peft.tuners.lokr.layer import factorization

        factor = settings.get("decompose_factor", -1)
        (a, b), (c, d) = factorization(spec.out_features, factor), factorization(spec.in_features, factor)
        r = min(a, c) * min(b, d, r if r < max(b, d) / 2 else b)
    return min(smaller, r)


def _refusal(method: str, error: Exception) -> str:
    detail = one_line(error)
    return f"adapter: {method} with these settings does not fit the model ({detail}): change them, or adapter.method."
