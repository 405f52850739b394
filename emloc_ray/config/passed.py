"""Checks the keys that a config's sections pass on to transformers, PEFT and Ray against what these take.

Not by pydantic's validators, which are skipped in a section that has another error: all errors come at once.
"""

import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Iterable
from enum import Enum
from typing import Any

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from emloc_ray.config.adapter import LORA_METHODS, PROMPT_METHODS, AdapterConfig
from emloc_ray.config.base import Section, section_of
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.peers import peer_key
from emloc_ray.config.schema import RayConfig, RunConfig
from emloc_ray.io.runs.secret_values import HIDDEN, is_secret, is_variable, leaves
from emloc_ray.text import listed, shown

_MANY = 30  # keys that are too many to be listed in a sentence
NO_KEY = " is not a key: "
_OWN = "is set by emloc_ray itself: remove it."
_LOADING = "is not read: batches are streamed from token shards in an order of their own: remove it."
_SCORING = "is not read: scores while training are the loss alone, from passes of our own: remove it."
_SCATTERING = (
    "is not supported, as transformers' Trainer left FSDP2 out in silence where that was tried (two CPU workers):"
    " finetune.deepspeed is what scatters a model over workers."
)
_NEWER = "is transformers' newer name of finetune.{}: write that."
_PUSHING = (
    "would push the adapter as trained on the emulator, not the corrected one: remove it, and give emloc-ray push RUN_DIR"
    " OWNER/NAME after the run, which says what it pushes."
)
# TrainingArguments that finetune does not take, and why.
_REFUSED = {
    **dict.fromkeys(("output_dir", "remove_unused_columns", "seed", "data_seed", "resume_from_checkpoint"), _OWN),
    **dict.fromkeys(("ignore_data_skip", "average_tokens_across_devices", "auto_find_batch_size"), _OWN),
    **dict.fromkeys(("greater_is_better", "ddp_backend"), _OWN),
    "label_smoothing_factor": "is not supported, as the loss is the labels' cross-entropy: remove it.",
    "activation_checkpointing": _NEWER.format("gradient_checkpointing"),
    "activation_checkpointing_kwargs": _NEWER.format("gradient_checkpointing_kwargs"),
    # Of the Trainer's own data loader.
    **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"), _LOADING),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_drop_last", "train_sampling_strategy"), _LOADING),
    **dict.fromkeys(("group_by_length", "length_column_name"), _LOADING),
    **dict.fromkeys(("dataloader_multiprocessing_context", "dataloader_in_order"), _LOADING),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "enable_jit_checkpoint"), _OWN),
    "save_only_model": (
        "would save no optimizer and no schedule, from which a training goes on whose worker is lost: remove it."
    ),
    **dict.fromkeys(("prediction_loss_only", "batch_eval_metrics", "include_for_metrics", "label_names"), _SCORING),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), _SCORING),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _SCORING),
    **dict.fromkeys(("fsdp", "fsdp_config", "parallelism_config"), _SCATTERING),
}
# What transformers takes out for itself, and torch's ``checkpoint`` takes.
_CHECKPOINTING = (
    "every_n_layers",
    "offload",
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
)
# Of TrainingArguments that have bounds which transformers leaves unsaid. Gradients of LoRA's A are 0 at the first step, where
# no epsilon gives 0 / 0.
_BOUNDS = {
    **dict.fromkeys(("neftune_noise_alpha", "weight_decay"), Field(ge=0)),
    "per_device_eval_batch_size": Field(ge=1),
    "adam_epsilon": Field(gt=0),
    "max_grad_norm": Field(allow_inf_nan=True, ge=-math.inf),  # infinite: gradients' norms are logged, none is clipped
}
_TRUTHS_OF_YAML_1_1 = {"yes", "no", "on", "off"}


def without_what_holds(adapter: Any) -> Any:
    """The adapter's section without PEFT's fields that say what holds anyway, as ``bias: none`` does."""
    method = adapter.get("method", "lora") if isinstance(adapter, dict) else None
    ours = {*AdapterConfig.model_fields}
    if method is None or ours.issuperset(adapter):
        return adapter
    from emloc_ray.modeling.adapter_methods import CONFIGS, says_what_holds

    if method not in (*LORA_METHODS, *CONFIGS):
        return adapter
    return {key: value for key, value in adapter.items() if key in ours or not says_what_holds(method, key, value)}


def passed_through_errors(values: dict[str, Any]) -> list[str]:
    """The errors in the keys that sections pass on, each a sentence."""
    lines = []
    for key in _extra_keys(values, "finetune", FinetuneConfig):
        lines += _training_errors(key, values["finetune"][key])
    for key in _extra_keys(values, "ray", RayConfig):
        if secrets := _secret_errors(f"ray.{key}", values["ray"][key]):
            lines += secrets
        elif key not in (types := _ray_init_types()):
            lines.append(f"{no_such_key(f'ray.{key}', key, {*types, *RayConfig.model_fields})}.")
        else:
            lines += _type_errors(f"ray.{key}", values["ray"][key], types[key])
    return lines + _adapter_errors(values.get("adapter"))


def _training_errors(key: str, value: Any) -> list[str]:
    """The errors in a key of the finetune section that is to be a field of TrainingArguments."""
    if secrets := _secret_errors(f"finetune.{key}", value):
        return secrets
    if key in _REFUSED:
        return [f"finetune.{key} {_REFUSED[key]}"]
    if key.startswith(("push_to_hub", "hub_")):
        return [f"finetune.{key} {_PUSHING}"]
    if key == "gradient_checkpointing_kwargs" and (lines := _checkpointing_errors(value)):
        return lines
    if key == "save_strategy" and value == "best":
        return [
            "finetune.save_strategy: best would keep no checkpoint to go on from: leave it out, and set"
            " finetune.load_best_model_at_end for the adapter of the lowest validation loss."
        ]
    if key in ("save_strategy", "logging_strategy") and value == "epoch":
        return [
            f"finetune.{key}: epoch would come once, after the last step, as rows are a stream: leave it out, and set"
            f" finetune.{key.replace('strategy', 'steps')}."
        ]
    if key == "accelerator_config" and "num_steps" in _inside(value, "gradient_accumulation_kwargs"):
        return [
            "finetune.accelerator_config.gradient_accumulation_kwargs.num_steps is what finetune.gradient_accumulation_steps"
            " says: write that."
        ]
    if key not in (types := _training_argument_types()):
        return [f"{no_such_key(f'finetune.{key}', key, _trainable_keys())}."]
    if isinstance(value, str) and (values := _choices(key, types[key])) and value not in values:
        near = difflib.get_close_matches(value, values, n=1)
        right = f"the nearest is {near[0]}" if near else f"give one of {listed(values, 8)}"
        return [f"finetune.{key} is {value!r}: {right}."]
    bounded = typing.Annotated[types[key], _BOUNDS[key]] if key in _BOUNDS else types[key]
    return _type_errors(f"finetune.{key}", value, bounded)


def _choices(key: str, hint: Any) -> list[str]:
    """The values of the enums in a TrainingArgument's type, or those that its field names."""
    from transformers import TrainingArguments

    if named := TrainingArguments.__dataclass_fields__[key].metadata.get("choices"):
        return [*named]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [str(member.value) for kind in kinds for member in kind]


def _checkpointing_errors(value: Any) -> list[str]:
    """The errors in what is passed on to torch's ``checkpoint``, which would tell them in the first step."""
    key = "finetune.gradient_checkpointing_kwargs"
    if not isinstance(value, dict):
        return (
            [] if value is None else [f"{key} is {shown(value)}: give keys of torch's checkpoint, each with its value."]
        )
    if value.get("use_reentrant") is True:
        return [
            f"{key}.use_reentrant: true gives no gradients where a block's inputs need none, as below adapters on frozen"
            " weights: remove it."
        ]
    unknown = [name for name in value if name not in _CHECKPOINTING]
    return [f"{no_such_key(f'{key}.{unknown[0]}', str(unknown[0]), _CHECKPOINTING)}."] if unknown else []


def _inside(value: Any, key: str) -> dict[str, Any]:
    """The mapping that a mapping has there; an empty one where there is none."""
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _adapter_errors(given: Any) -> list[str]:
    """The errors in the keys of the adapter's method: LoRA's keys are the section's own, the others' are PEFT's fields."""
    if not isinstance(given, dict):
        return []
    method, keys = given.get("method", "lora"), [key for key in given if isinstance(key, str) and key != "method"]
    ours = set(AdapterConfig.model_fields)
    if method in LORA_METHODS and ours.issuperset(keys):
        return []
    from emloc_ray.modeling.adapter_methods import CONFIGS, method_fields, refused_field

    if method not in (*LORA_METHODS, *CONFIGS):
        return []
    types = dict.fromkeys(ours) if method in LORA_METHODS else method_fields(method)
    lines = _prompt_errors(method, given)
    for key in keys:
        why_not = refused_field(method, key)
        if secrets := _secret_errors(f"adapter.{key}", given[key]):
            lines += secrets
        elif why_not is not None:
            lines.append(f"adapter.{key} is not to be set ({why_not}): remove it.")
        elif key not in types:
            of_method = "" if method in LORA_METHODS else f", for adapter.method {method}"
            whose = f", and {key} is LoRA's" if key in ours else ""
            lines.append(f"{no_such_key(f'adapter.{key}', key, types)}{of_method}{whose}.")
        elif key not in ours:  # the section's own are checked with it
            lines += _type_errors(f"adapter.{key}", given[key], types[key], strict=True)
    return lines


def _prompt_errors(method: str, given: dict[str, Any]) -> list[str]:
    """The errors of a prompt: a missing key that it needs, or one that is not read."""
    lines = []
    if method in PROMPT_METHODS and "num_virtual_tokens" not in given:
        lines.append(f"adapter.num_virtual_tokens is missing: set it, for adapter.method {method}.")
    if method == "prompt_tuning":
        from_text = given.get("prompt_tuning_init") == "TEXT"
        if from_text and not str(given.get("prompt_tuning_init_text") or "").strip():
            lines.append("adapter.prompt_tuning_init_text is missing: set it, for adapter.prompt_tuning_init TEXT.")
        if not from_text and "prompt_tuning_init_text" in given:
            lines.append("adapter.prompt_tuning_init_text is not read: set adapter.prompt_tuning_init to TEXT.")
    return lines


def _secret_errors(key: str, value: Any) -> list[str]:
    """The errors of values that are secrets, which the run's files would show, or that stand in such a file for one."""
    lines = []
    for path, leaf in leaves(value, tuple(key.split("."))):
        if leaf == HIDDEN:
            lines.append(f"{'.'.join(path)} was hidden when this config was written: give its value again.")
        elif is_secret(path, leaf) and not is_variable(path):
            lines.append(
                f"{'.'.join(path)} is a secret, and a run writes its config to a file: remove it, and set it in the nodes'"
                " environment (such as HF_TOKEN)."
            )
    return lines


def _extra_keys(values: dict[str, Any], section: str, model: type[Section]) -> list[str]:
    given = values.get(section)
    known = model.model_fields
    return [key for key in given if isinstance(key, str) and key not in known] if isinstance(given, dict) else []


def _type_errors(key: str, value: Any, hint: Any, strict: bool = False) -> list[str]:
    """The error of a value that is not of the type that another library declares; ``strict``: without conversion, for a
    library that converts nothing."""
    if lines := _truth_errors(key, value, hint):
        return lines
    try:
        taken = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        declared: TypeAdapter[Any] = TypeAdapter(hint, config=taken)
        if strict:  # in JSON, a text passes for an enum's value
            declared.validate_json(json.dumps(value, default=str), strict=True)
        else:
            declared.validate_python(value)
    except PydanticUserError:  # a type that pydantic cannot check
        return []
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return [f"{key} is {shown(value)}: {message[0].lower()}{message[1:]}."]
    return []


def _truth_errors(key: str, value: Any, hint: Any) -> list[str]:
    """The errors of texts that would pass for true, whatever they say: ``no`` is a text in YAML 1.2, false in YAML 1.1."""
    is_truth = bool in (options := typing.get_args(hint) or (hint,)) and {*options} <= {bool, type(None)}
    above = tuple(key.split("."))
    return [
        f"{'.'.join(path)} is the text {leaf!r}: write true or false."
        for path, leaf in leaves(value, above)
        if isinstance(leaf, str)
        and (is_truth if path == above else leaf.lower() in _TRUTHS_OF_YAML_1_1 and not is_variable(path))
    ]


def passed_on(section: str, key: str) -> tuple[str, str] | None:
    """The type of a key that a section passes on, as people read it, and whose key it is; None where it takes no such key."""
    if section == "finetune" and key in _trainable_keys():
        return _type_name(_training_argument_types()[key]), "a field of transformers' TrainingArguments"
    if section == "ray" and key in (arguments := _ray_init_types()):
        return _type_name(arguments[key]), "an argument of ray.init"
    if section == "adapter":
        from emloc_ray.modeling.adapter_methods import CONFIGS, method_fields

        if types := {method: fields[key] for method in CONFIGS if key in (fields := method_fields(method))}:
            return _type_name(
                next(iter(types.values()))
            ), f"a field of PEFT's config for adapter.method {', '.join(types)}"
    return None


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    name = hint.__name__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
    return re.sub(r"(\w+\.)+", "", name).replace("NoneType", "None")


def _elsewhere(name: str) -> str | None:
    """The only section's key of that name; None where none or several have one."""
    sections = {key: section_of(field.annotation) for key, field in RunConfig.model_fields.items()}
    named = {key: set(section.model_fields) for key, section in sections.items() if section is not None}
    named["finetune"] |= _trainable_keys()
    matches = [f"{section}.{name}" for section, keys in named.items() if name in keys]
    return matches[0] if len(matches) == 1 else None


def _trainable_keys() -> set[str]:
    """The keys that ``finetune`` takes."""
    passed = {key for key in _training_argument_types() if not key.startswith(("push_to_hub", "hub_"))}
    return {*FinetuneConfig.model_fields, *(passed - _REFUSED.keys())}


@functools.cache
def _training_argument_types() -> dict[str, Any]:
    """The fields of the installed transformers' TrainingArguments, with their types."""
    import dataclasses

    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments)}


@functools.cache
def _ray_init_types() -> dict[str, Any]:
    """The parameters of the installed ``ray.init``, with their types."""
    import inspect

    # From the module that defines it: after a training in the same process, ray.init may be a wrapper without them.
    from ray._private.worker import init

    return {name: p.annotation for name, p in inspect.signature(init).parameters.items() if p.kind is not p.VAR_KEYWORD}


def trained_with(name: str) -> str | None:
    """The key of ``finetune`` with this name; None where there is none."""
    return f"finetune.{name}" if name in _trainable_keys() else None


def no_such_key(key: str, last: str, known: Iterable[str]) -> str:
    """Says that there is no such key, and names the likeliest: ours for what other tools call so, the same key in another
    section, or the nearest of ``known``."""
    known, meant = set(known), peer_key(key)
    near = difflib.get_close_matches(last, sorted(known), n=1, cutoff=0.6)
    peer = meant or ("" if near else _elsewhere(last)) or ""
    above, _, name = peer.rpartition(".")
    is_beside = above == key.rpartition(".")[0]
    if peer and not is_beside and name not in known:
        return f"{key}{NO_KEY}write {peer}"
    near = [name] if name in known else near
    section = key.rpartition(".")[0]
    rest = f"emloc-ray keys {section} lists them" if len(known) > _MANY else f"known are {', '.join(sorted(known))}"
    return f"{key}{NO_KEY}{f'the nearest is {near[0]}' if near else rest}"
