"""A YAML file and dotted overrides as a :class:`RunConfig`, every error told at once, each as a sentence.

Unknown keys are told with the nearest right one; keys that sections pass on to other libraries are held against those.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from emloc_ray.config import LORA_METHODS, AdapterConfig, FinetuneConfig, RayConfig, RunConfig, Section
from emloc_ray.errors import ConfigError
from emloc_ray.io.secret_values import HIDDEN, is_secret, is_variable, leaves

Keys = tuple[Any, ...]  # the parts of a dotted key
Checked = TypeVar("Checked", bound=BaseModel)
_OWN_TRAINING_ARGUMENTS = {"output_dir", "remove_unused_columns", "seed", "data_seed", "resume_from_checkpoint"}


def _passed_through_errors(values: dict[str, Any]) -> list[str]:
    """What is wrong with the keys that sections pass on to transformers and to ray, each as a sentence.

    Apart from pydantic's own validators, which stay silent on a section that has another error: all are told at once.
    """
    lines = []
    for key in _extra_keys(values, "finetune", FinetuneConfig):
        if secrets := _secret_errors(f"finetune.{key}", values["finetune"][key]):
            lines += secrets
        elif key in _OWN_TRAINING_ARGUMENTS:
            lines.append(f"finetune.{key} is set by emloc_ray itself: remove it.")
        elif key not in (types := _training_argument_types()):
            lines.append(f"{no_such_key(f'finetune.{key}', key, {*types, *FinetuneConfig.model_fields})}.")
        else:
            lines += _type_errors(f"finetune.{key}", values["finetune"][key], _training_argument_type(key))
    for key in _extra_keys(values, "ray", RayConfig):
        if secrets := _secret_errors(f"ray.{key}", values["ray"][key]):
            lines += secrets
        elif key not in (known := _ray_init_names()):
            lines.append(f"{no_such_key(f'ray.{key}', key, known | set(RayConfig.model_fields))}.")
    return lines + _adapter_errors(values.get("adapter"))


def _adapter_errors(given: Any) -> list[str]:
    """What is wrong with the keys of the adapter's method: LoRA's are the section's own, the others' are PEFT's fields."""
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
        elif key not in ours:  # which are checked as the section's
            lines += _type_errors(f"adapter.{key}", given[key], _adapter_field_type(method, key), strict=True)
    return lines


def _prompt_errors(method: str, given: dict[str, Any]) -> list[str]:
    """Where a prompt lacks what it cannot be made without, or has what would go unread."""
    lines = []
    if method in ("prefix_tuning", "prompt_tuning") and "num_virtual_tokens" not in given:
        lines.append(f"adapter.num_virtual_tokens is missing: set it, for adapter.method {method}.")
    if method == "prompt_tuning":
        from_text = given.get("prompt_tuning_init") == "TEXT"
        if from_text and not str(given.get("prompt_tuning_init_text") or "").strip():
            lines.append("adapter.prompt_tuning_init_text is missing: set it, for adapter.prompt_tuning_init TEXT.")
        if not from_text and "prompt_tuning_init_text" in given:
            lines.append("adapter.prompt_tuning_init_text is not read: set adapter.prompt_tuning_init to TEXT.")
    return lines


@functools.cache
def _adapter_field_type(method: str, name: str) -> TypeAdapter[Any] | None:
    from emloc_ray.modeling.adapter_methods import method_fields

    return _checker(method_fields(method)[name])


def _secret_errors(key: str, value: Any) -> list[str]:
    """Where a value would show a secret in the run's files, or is what such a file shows for one."""
    lines = []
    for path, leaf in leaves(value, tuple(key.split("."))):
        if leaf == HIDDEN:
            lines.append(f"{'.'.join(path)} was hidden where this config was written down: give its value again.")
        elif is_secret(path, leaf) and not is_variable(path):
            lines.append(
                f"{'.'.join(path)} is a secret, and a run writes its config down: remove it, and give it to the nodes as"
                " their environment (such as HF_TOKEN)."
            )
    return lines


def _extra_keys(values: dict[str, Any], section: str, model: type[Section]) -> list[str]:
    given = values.get(section)
    known = model.model_fields
    return [key for key in given if isinstance(key, str) and key not in known] if isinstance(given, dict) else []


def _type_errors(key: str, value: Any, wanted: TypeAdapter[Any] | None, strict: bool = False) -> list[str]:
    """Where a value does not fit the type that another library declares for it; ``strict``: as it is, not as it could be
    read, where that library takes it as it is."""
    try:
        if wanted is not None and strict:
            wanted.validate_json(
                json.dumps(value, default=str), strict=True
            )  # of JSON's, texts pass for an enum's values
        elif wanted is not None:
            wanted.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return [f"{key} is {value!r}: {message[0].lower()}{message[1:]}."]
    return []


@functools.cache
def _training_argument_type(name: str) -> TypeAdapter[Any] | None:
    """What checks a field of TrainingArguments; None for a type that pydantic cannot check."""
    return _checker(_training_argument_types()[name])


def _checker(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return None


@functools.cache
def _training_argument_types() -> dict[str, Any]:
    """The fields of the installed transformers' TrainingArguments, with their types."""
    import dataclasses

    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments)}


@functools.cache
def _ray_init_names() -> set[str]:
    """What the installed ``ray.init`` takes."""
    import inspect

    # Where it is defined: after a training in the same process, ray.init can be a wrapper that hides them.
    from ray._private.worker import init

    return {name for name, p in inspect.signature(init).parameters.items() if p.kind is not p.VAR_KEYWORD}


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; people mean the number."""


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
    if repeated is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key {repeated} is there twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Yaml.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config and applies ``key.path=value`` overrides (values are YAML too).

    A config may name another as its ``base``, by a path from its own directory on: its keys lie over that one's.

    Raises:
        ConfigError: with every error at once, one sentence a line.
    """
    path = Path(path)
    values = read_values(path)
    for override in overrides:
        put(values, *read_override(override), f"Override {override!r}")
    return parse_config(values, f"{path} and its overrides" if overrides else str(path))


def read_values(path: Path, named_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config's keys over those of its base and its base's base, unchecked: sections are merged, all else is replaced.

    Raises:
        ConfigError: where one of them cannot be read or is its own base; shows the chain from ``named_by`` on.
    """
    chain = " → ".join(map(str, (*named_by, path)))
    if named_by and path.resolve() in [other.resolve() for other in named_by]:
        raise ConfigError(f"Config {path} is its own base ({chain}): take one of these out.")
    if named_by:
        values = read_mapping(path, f"Base {path} ({chain})", "write some, or name another base")
    else:
        values = read_mapping(path, f"Config {path}", "it needs at least run_dir, model and data")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(f"Config {path} has {base!r} as its base: give the path of a YAML file, from its own on.")
    below = read_values(path.parent / os.path.expanduser(base), (*named_by, path))
    for keys, value in settings(values):
        put(below, keys, value, f"{path}: {'.'.join(map(str, keys))}")
    return below


def read_mapping(path: Path, name: str, needs: str) -> dict[str, Any]:
    """What a YAML file holds; raises ConfigError, with its ``name`` and what it ``needs``, where that is no mapping."""
    if path.is_dir():
        raise ConfigError(f"{name} is a directory: give the path of a YAML file in it.")
    if not path.is_file():
        raise ConfigError(f"{name} does not exist: give the path of a YAML file, such as configs/quickstart.yaml.")
    try:
        values = yaml.load(path.read_text("utf-8"), _Yaml)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}): give one that can.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): save it so.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML ({_one_line(error)}): mend it there.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} holds no keys: {needs}.")
    return values


def parse_config(values: dict[str, Any], where: str = "the config") -> RunConfig:
    """Validates a nested dict into a :class:`RunConfig`; raises ConfigError with every error at once."""
    config, lines = check_config(values)
    if config is None:
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines))
    return config


def check_config(values: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """A nested dict as a config, or None and what is wrong with it, each a sentence."""
    # A section left empty, all its keys commented out, is its defaults.
    values = {key: value for key, value in values.items() if value is not None}
    config, lines = check(RunConfig, values)
    lines = list(dict.fromkeys(lines + _passed_through_errors(values)))
    return None if lines else config, lines


def check(model: type[Checked], values: dict[str, Any]) -> tuple[Checked | None, list[str]]:
    """A nested dict as a model of pydantic, or None and what is wrong with it, each a sentence."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        return None, [_sentence(detail, model) for detail in error.errors()]


def unknown_key(key: str) -> str | None:
    """Says that no config has a dotted key, and which is nearest; None where one has it."""
    values: dict[str, Any] = {}
    put(values, tuple(key.split(".")), 0, key)
    if key.startswith("adapter.") and _a_method_takes(key.removeprefix("adapter.").split(".")[0]):
        return None
    return next((line for line in check_config(values)[1] if _NO_KEY in line), None)


def _a_method_takes(name: str) -> bool:
    if name in AdapterConfig.model_fields:
        return False  # what is below it is still to be looked at
    from emloc_ray.modeling.adapter_methods import fields_of_all

    return name in fields_of_all()


def settings(keys: Mapping[Any, Any], *, dotted: bool = False, above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The single settings of a nested dict, each by the parts of its key; ``dotted``: with keys such as ``data.format``.

    A value that is no section, such as a table of patterns, stays whole. A section left empty says nothing.
    """
    for key, value in keys.items():
        parts = (*above, *(key.split(".") if dotted and isinstance(key, str) else [key]))
        is_section = _section(parts) is not None
        if is_section and isinstance(value, Mapping):
            yield from settings(value, dotted=dotted, above=parts)
        elif not (is_section and value is None and len(parts) == 1):
            yield parts, value


def put(values: dict[str, Any], keys: Keys, value: Any, what: str) -> None:
    """Sets one setting; the dicts inside ``values`` are replaced, not changed: YAML's aliases and others may share them.

    Raises:
        ConfigError: that ``what`` reaches into a value.
    """
    node = values
    for depth, parent in enumerate(keys[:-1], 1):
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            prefix = ".".join(map(str, keys[:depth]))
            raise ConfigError(f"{what} reaches into {prefix}, which is a value: override that instead.")
        node[parent] = dict(child or {})
        node = node[parent]
    node[keys[-1]] = value


def read_override(override: str) -> tuple[Keys, Any]:
    """The parts of the key and the value of ``key.path=value``; raises ConfigError where it is no such thing."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"Override {override!r} is not key.path=value: write it like finetune.max_steps=20.")
    try:
        return tuple(key.strip().split(".")), read_text(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r} has a value that is not YAML ({_one_line(error)}).") from error


def read_text(text: str) -> Any:
    """A value as YAML has it; raises yaml.YAMLError."""
    return yaml.load(text, _Yaml)


_NO_KEY = " is not a key: "
# How pydantic names the members of a union inside an error's location.
_UNION_MEMBER = re.compile(r"str|bool|float|list\[.*|literal\[.*|function-.*")


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    """One pydantic error as a sentence: which key, what is wrong, what would be right."""
    location = [str(part) for part in detail["loc"] if not _UNION_MEMBER.fullmatch(str(part))]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"{no_such_key(key, location[-1], _field_names(location[:-1], model))}."
    if detail["type"] == "missing":
        return f"{key} is missing: set it."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}." if key and key not in message else f"{message}."
    given = detail["input"]
    return f"{key} is {given!r}: {message[0].lower()}{message[1:]}."


def no_such_key(key: str, last: str, known: typing.Iterable[str]) -> str:
    """Says that a key is none, and which of ``known`` is nearest to its last part."""
    near = difflib.get_close_matches(last, sorted(known), n=1, cutoff=0.6)
    hint = f"the nearest is {near[0]}" if near else f"known are {', '.join(sorted(known)[:30])}"
    return f"{key}{_NO_KEY}{hint}"


def _field_names(location: list[str], model: type[BaseModel]) -> set[str]:
    section = _section(location, model)
    return set(section.model_fields) if section else set()


def _section(keys: Sequence[Any], model: type[BaseModel] = RunConfig) -> type[BaseModel] | None:
    """The section that a key names; None for a single value, a table or no key at all."""
    for key in keys:
        field = model.model_fields.get(key)
        options = (field.annotation, *typing.get_args(field.annotation)) if field else ()
        # list[str] passes for a type in Python 3.10.
        types = [o for o in options if isinstance(o, type) and typing.get_origin(o) is None]
        found = next((option for option in types if issubclass(option, BaseModel)), None)
        if found is None:
            return None
        model = found
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
