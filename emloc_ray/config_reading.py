"""A YAML file and dotted overrides as a :class:`RunConfig`, every error told at once, each as a sentence.

Unknown keys are told with the nearest right one; keys that sections pass on to other libraries are held against those.
"""

from __future__ import annotations

import difflib
import functools
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from emloc_ray.config import FinetuneConfig, RayConfig, RunConfig, Section
from emloc_ray.errors import ConfigError
from emloc_ray.io.secret_values import HIDDEN, is_secret, is_variable, leaves

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
            lines.append(f"{_unknown_key(f'finetune.{key}', key, {*types, *FinetuneConfig.model_fields})}.")
        else:
            lines += _type_errors(f"finetune.{key}", values["finetune"][key], types[key])
    for key in _extra_keys(values, "ray", RayConfig):
        if secrets := _secret_errors(f"ray.{key}", values["ray"][key]):
            lines += secrets
        elif key not in (known := _ray_init_names()):
            lines.append(f"{_unknown_key(f'ray.{key}', key, known | set(RayConfig.model_fields))}.")
    return lines


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


def _type_errors(key: str, value: Any, wanted: Any) -> list[str]:
    """Where a value does not fit the type that another library declares for it."""
    try:
        TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        return [f"{key} is {value!r}: {message[0].lower()}{message[1:]}."]
    except PydanticUserError:  # a type that pydantic cannot check
        return []
    return []


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


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config and applies ``key.path=value`` overrides (values are YAML too).

    Raises:
        ConfigError: with every error at once, one sentence a line.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"Config {path} is a directory: give the path of a YAML file in it.")
    if not path.is_file():
        raise ConfigError(
            f"Config {path} does not exist: give the path of a YAML file, such as configs/quickstart.yaml."
        )
    try:
        values = yaml.load(path.read_text("utf-8"), _Yaml)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Config {path} is not UTF-8 text ({error.reason} at byte {error.start}): save it so."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"Config {path} is not YAML ({_one_line(error)}): mend it there.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Config {path} holds no keys: it needs at least run_dir, model and data.")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, f"{path} and its overrides" if overrides else str(path))


def parse_config(values: dict[str, Any], where: str = "the config") -> RunConfig:
    """Validates a nested dict into a :class:`RunConfig`; raises ConfigError with every error at once."""
    # A section left empty, all its keys commented out, is its defaults.
    values = {key: value for key, value in values.items() if value is not None}
    lines = _passed_through_errors(values)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_sentence(detail) for detail in error.errors()] + lines
    if lines:
        raise ConfigError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines)))
    return config


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"Override {override!r} is not key.path=value: write it like finetune.max_steps=20.")
    *parents, last = key.strip().split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            prefix = ".".join(parents[: depth + 1])
            raise ConfigError(f"Override {override!r} reaches into {prefix}, which is a value: override that instead.")
        node = child
    try:
        node[last] = yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r} has a value that is not YAML ({_one_line(error)}).") from error


# How pydantic names the members of a union inside an error's location.
_UNION_MEMBER = re.compile(r"str|bool|float|list\[.*|literal\[.*|function-.*")


def _sentence(detail: Any) -> str:
    """One pydantic error as a sentence: which key, what is wrong, what would be right."""
    location = [str(part) for part in detail["loc"] if not _UNION_MEMBER.fullmatch(str(part))]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"{_unknown_key(key, location[-1], _field_names(location[:-1]))}."
    if detail["type"] == "missing":
        return f"{key} is missing: set it."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}." if key and key not in message else f"{message}."
    given = detail["input"]
    return f"{key} is {given!r}: {message[0].lower()}{message[1:]}."


def _unknown_key(key: str, last: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(last, sorted(known), n=1, cutoff=0.6)
    hint = f"the nearest is {near[0]}" if near else f"known are {', '.join(sorted(known)[:30])}"
    return f"{key} is not a key: {hint}"


def _field_names(location: list[str]) -> set[str]:
    model: Any = RunConfig
    for part in location:
        annotation = model.model_fields[part].annotation
        options = [annotation, *typing.get_args(annotation)]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    names: set[str] = set(model.model_fields)
    return names


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
