"""Reads a YAML file and dotted overrides as a :class:`RunConfig`; raises all errors at once, each a sentence.

An unknown key's error names the nearest known one. ``passed.py`` checks the keys that are passed on to other libraries.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.config.base import Section, section_of
from emloc_ray.config.passed import NO_KEY, no_such_key, passed_through_errors, trained_with, without_what_holds
from emloc_ray.config.peers import config_of_peer
from emloc_ray.config.schema import RunConfig
from emloc_ray.data.text_rows import other_encoding
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import read_yaml, read_yaml_value
from emloc_ray.io.runs.secret_values import without_secret, without_secrets
from emloc_ray.io.store.places import looked_in
from emloc_ray.text import counted, listed, shown

_VARIABLE = re.compile(r"\$\{(\w+)\}|(?:(?<=/)|^)\$([A-Za-z_]\w*)")  # a file's name may have a $ in it
# The keys that hold paths, of a config and of a batch.
_PATHS = re.compile(
    r"run_dir|model(\.source)?|data\.(\w+\.path|train|calibration|selection|eval|validation|healing|image_roots)"
    r"|evaluation\.upper_bound|finetune\.deepspeed|base|tasks|cache\.path"
)
Keys = tuple[Any, ...]  # the parts of a dotted key
Checked = TypeVar("Checked", bound=Section)


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config, or takes its nested values, and applies ``key.path=value`` overrides (values are YAML too).

    A file may name another as its ``base``, by a path from its own directory: its keys override that one's. Raises ConfigError
    with every error at once, one sentence a line.
    """
    if not isinstance(config, str | os.PathLike | Mapping):
        given = type(config).__name__
        raise ConfigError(
            f"A config of the type {given} cannot be read: give a YAML file's path, or a mapping of its keys."
        )
    name = "the config" if isinstance(config, Mapping) else str(config)
    values = without_paths(config) if isinstance(config, Mapping) else read_values(Path(config))
    if is_batch(values):
        raise ConfigError(f"{name} is a batch of tasks: give it to emloc-ray batch.")
    for override in overrides:
        keys, value = read_override(override)
        put(values, keys, value, f"Override {'.'.join(keys)}")
    return parse_config(values, f"{name} and its overrides" if overrides else name)


def without_paths(value: Any) -> Any:
    """A value with its ``pathlib`` paths as text; rows are left as they are."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], os.PathLike):
        return [without_paths(inner) for inner in value]
    return value


def read_values(path: Path, named_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config's keys over those of its bases, unchecked: sections are merged, all else is replaced. Raises ConfigError where a
    file cannot be read or is its own base; shows the chain from ``named_by`` on."""
    chain = " → ".join(map(str, (*named_by, path)))
    if named_by and path.resolve() in [other.resolve() for other in named_by]:
        raise ConfigError(f"Config {path} is its own base ({chain}): take one of these out.")
    if named_by:
        values = read_mapping(path, f"Base {path} ({chain})", "write keys, or name another base")
    else:
        values = read_mapping(path, f"Config {path}", "it needs at least run_dir, model and data")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not base.strip():
        raise ConfigError(
            f"Config {path} has {base!r} as its base: give the path of a YAML file, from this one's directory."
        )
    written, wrong = with_variables({"base": base})
    if wrong:
        raise ConfigError("\n".join(f"Config {path}: {line}" for line in wrong))
    below = read_values(path.parent / os.path.expanduser(written["base"]), (*named_by, path))
    for keys, value in settings(values):
        put(below, keys, value, f"{path}: {'.'.join(map(str, keys))}")
    return below


def read_mapping(path: Path, name: str, needs: str) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError, with its ``name`` and what it ``needs``, where there is none."""
    if path.is_dir():
        raise ConfigError(f"{name} is a directory: give the path of a YAML file in it.")
    if not path.is_file():
        raise ConfigError(
            f"{name} does not exist{looked_in(str(path))}: give the path of a YAML file, such as configs/quickstart.yaml."
        )
    try:
        values = read_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} cannot be read ({error.strerror}): give one that can.") from error
    except UnicodeDecodeError as error:
        encoding = other_encoding(path.read_bytes()[:4]) or "perhaps Latin-1"
        raise ConfigError(
            f"{name} is not UTF-8 text, but {encoding} ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{name} is not YAML ({error}): fix it there.") from error
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
    """A nested dict as a config, or None and its errors, each a sentence."""
    if peer := config_of_peer(values, trained_with):
        return None, peer
    # An empty section, with all its keys commented out, has its defaults; no budget is a choice.
    values = {key: value for key, value in values.items() if value is not None or key == "memory_budget"}
    values, wrong = with_variables(values)
    if "adapter" in values:
        values["adapter"] = without_what_holds(values["adapter"])
    config, lines = check(RunConfig, values)
    lines = list(dict.fromkeys(wrong + lines + passed_through_errors(values)))
    return None if lines else config, lines


def is_batch(values: Mapping[str, Any]) -> bool:
    """Whether a file's keys are those of a batch."""
    return not {"tasks", "grid"}.isdisjoint(values)


def with_variables(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config or a batch with the ``${NAME}``, and each ``$NAME`` that begins a part, in its paths replaced from the
    environment, and a sentence for each that is not set and for each empty path, which ``Path`` takes for the working directory.
    A split's map of paths to shares has them in its keys."""
    wrong: list[str] = []

    def replaced(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(key, each) for each in value]
        if not isinstance(value, str):
            return value
        names = [braced or bare for braced, bare in _VARIABLE.findall(value)]
        wrong.extend(
            f"{key}: the variable {name} of {without_secrets(value, (key,))} is not set: export it, or write the path."
            for name in names
            if name not in os.environ
        )
        path = _VARIABLE.sub(lambda match: os.environ.get(match[1] or match[2], match[0]), value)
        if not path.strip():
            why = f" ({names[0]} is set to nothing)" if names else ""
            wrong.append(f"{key} is empty{why}: write a path, or . for the working directory.")
        return path

    def walk(node: Any, above: str) -> Any:
        if isinstance(node, dict):
            named = {replaced(above, key): value for key, value in node.items()} if _PATHS.fullmatch(above) else node
            return {key: walk(value, f"{above}.{key}" if above else str(key)) for key, value in named.items()}
        return replaced(above, node) if _PATHS.fullmatch(above) else node

    return walk(values, ""), wrong


def check(model: type[Checked], values: dict[str, Any]) -> tuple[Checked | None, list[str]]:
    """A nested dict as a pydantic model, or None and its errors, each a sentence."""
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        return None, [_sentence(detail, model) for detail in _one_of_each(error.errors())]


def _one_of_each(details: Sequence[Any]) -> list[Any]:
    """One error a key: for a key of several types pydantic gives one for each. Keeps that of the type which was given, or
    joins them."""
    by_key: dict[str, Any] = {}
    for detail in details:
        key = ".".join(_location(detail))
        first = by_key.setdefault(key, detail)
        if first is detail:
            continue
        is_other_type = first["type"].endswith("_type") or first["type"] == "literal_error"
        if is_other_type and not detail["type"].endswith("_type"):
            by_key[key] = detail
        elif is_other_type and detail["msg"].startswith(_SHOULD_BE):
            by_key[key] = {**first, "msg": f"{first['msg']} or {detail['msg'].removeprefix(_SHOULD_BE)}"}
    return [detail for key, detail in by_key.items() if not any(other.startswith(f"{key}.") for other in by_key)]


def unknown_key(key: str) -> str | None:
    """Says that no config has a dotted key, and which is nearest; None where one has it."""
    values: dict[str, Any] = {}
    put(values, tuple(key.split(".")), 0, key)
    section, _, rest = key.partition(".")
    if section == "adapter" and (name := rest.split(".")[0]) not in AdapterConfig.model_fields:
        from emloc_ray.modeling.adapter_methods import fields_of_all

        if name in fields_of_all():
            return None
    return next((line for line in check_config(values)[1] if NO_KEY in line), None)


def settings(keys: Mapping[Any, Any], *, dotted: bool = False, above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The single settings of a nested dict, each by the parts of its key; ``dotted``: keys may be dotted, as ``data.format``. A
    value that is no section, such as a table of patterns, stays whole. An empty section sets nothing."""
    for key, value in keys.items():
        parts = (*above, *(key.split(".") if dotted and isinstance(key, str) else [key]))
        is_section = _section(parts) is not None
        if is_section and isinstance(value, Mapping):
            yield from settings(value, dotted=dotted, above=parts)
        elif not (is_section and value is None and len(parts) == 1):
            yield parts, value


def put(values: dict[str, Any], keys: Keys, value: Any, what: str) -> None:
    """Sets one setting; replaces the dicts inside ``values`` instead of changing them, as YAML's aliases may share them. A bare
    value in a section's place is that of its ``bare`` key. Raises ConfigError where ``what`` reaches into a value."""
    node = values
    section = _section(keys)
    if section is not None and section.bare and isinstance(value, str | list):
        keys = (*keys, section.bare)
    for depth, parent in enumerate(keys[:-1], 1):
        child = node.get(parent)
        section = _section(keys[:depth])
        if section is not None and section.bare and isinstance(child, str | list):
            child = {section.bare: child}
        if section is not None and child is False:  # it is left out, as with healing: false
            child = None
        if child is not None and not isinstance(child, dict):
            prefix = ".".join(map(str, keys[:depth]))
            raise ConfigError(f"{what} reaches into {prefix}, which is a value: override that instead.")
        node[parent] = dict(child or {})
        node = node[parent]
    node[keys[-1]] = value


def read_override(override: str) -> tuple[Keys, Any]:
    """The parts of the key and the value of ``key.path=value``; raises ConfigError where it has another form."""
    if override.startswith("--") and "=" in override:
        written = without_secret(override.lstrip("-"))
        raise ConfigError(f"--{written.partition('=')[0]} is a key of the config: write {written}, without dashes.")
    key, equals, text = override.partition("=")
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        begin = re.split("(?<=[:=])", override, maxsplit=1)[0]  # what follows is a value, which may be a secret
        written = override if begin == override else f"{begin}…"
        raise ConfigError(f"Override {written!r} is not key.path=value: write it like finetune.max_steps=20.")
    try:
        is_glob = text.startswith("*")  # in YAML an alias, which has nothing to name here
        return keys, text if is_glob else read_yaml_value(text)
    except ValueError as error:
        raise ConfigError(f"Override {key} has a value that is not YAML ({error}): write it in quotes.") from error


# Keys of earlier versions, or values of a key, with what to do instead.
REMOVED_KEYS = {
    "calibration.convergence_tolerance": "set calibration.num_calibration_tokens to the tokens that are enough",
    "calibration.mode": "set model.hold, to block_by_block where it was streamed",
    "emulator.allocation: spectral": "take sensitivity, or uniform ranks, which were better than it",
}
_SHOULD_BE = "Input should be "
# pydantic's names of a union's members in an error's location.
_UNION_MEMBER = re.compile(r"str|bool|float|dict\[.*|list\[.*|literal\[.*|function-.*|constrained-.*")


def _sentence(detail: Any, model: type[Section]) -> str:
    """One pydantic error as a sentence: the key, what is wrong, what is right."""
    location = _location(detail)
    key = ".".join(location)
    for removed in (key, f"{key}: {detail['input']}"):
        if removed in REMOVED_KEYS:
            return f"{removed} was removed: {REMOVED_KEYS[removed]}."
    if location[-1:] == ["[key]"]:
        return f"{'.'.join(location[:-2])} has the key {location[-2]}, which is no text: write it in quotes."
    if detail["type"] == "extra_forbidden":
        if "." in location[-1]:
            return unknown_key(key) or f"{key} has dots, as overrides have: in a file write {_nested(key)}."
        section = _section(location[:-1], model)
        return f"{no_such_key(key, location[-1], section.model_fields if section else ())}."
    if detail["type"] == "missing":
        return f"{key} is missing: set it."
    if detail["type"] == "invalid_key":
        return f"{key} is no text, as keys are: write the name of a key."
    if detail["type"] == "too_short":
        return f"{key} is empty: give at least {counted(detail['ctx']['min_length'], 'item')}."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{message}." if message.startswith(key) else f"{key}: {message}."
    given = without_secrets(detail["input"], tuple(location))
    if detail["type"] == "model_type" and (section := _section(location, model)):
        keys = listed(list(section.model_fields), 3)
        return f"{key} is {shown(given)}: it is a section, give it keys of its own ({keys})."
    return f"{key} is {shown(given)}: {message[0].lower()}{message[1:]}."


def _nested(key: str) -> str:
    *sections, text = key.split(".")
    text += ": …"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    return text


def _location(detail: Any) -> list[str]:
    return [str(part) for part in detail["loc"] if not _UNION_MEMBER.fullmatch(str(part))]


def _section(keys: Sequence[Any], model: type[Section] = RunConfig) -> type[Section] | None:
    """The section that a key names; None for a single value, a table or an unknown key."""
    for key in keys:
        field = model.model_fields.get(key)
        section = section_of(field.annotation) if field else None
        if section is None:
            return None
        model = section
    return model
