"""Every key that a config may have, read from the sections themselves: what is printed is what is checked."""

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from emloc_ray.config.base import Section, section_of
from emloc_ray.config.passed import passed_on
from emloc_ray.config.peers import peer_key
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError

_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true | false",
    str: "text",
    ByteSize: "size",
    list: "list",
    dict: "map",
}


@dataclass(frozen=True)
class Key:
    """A key of a section: its values, its default (None: it has to be set) and its meaning."""

    name: str
    values: str
    default: str | None
    text: str


BASE = Key("base", "text", "null", "another config, whose keys these override")  # gone once a config is read


@dataclass(frozen=True)
class KeySection:
    """A section's keys; ``name`` is dotted, empty for the top level, and several names where sections are alike."""

    name: str
    text: str
    keys: tuple[Key, ...]


def config_keys(name: str | None = None) -> list[KeySection]:
    """Every section, in a config's order, or ``name`` alone with its subsections; of a key's ``name``, the key alone, and
    without its section, each key that is called so. Raises ConfigError where there is neither a section nor a key of that
    name."""
    top, *below = _sections("", RunConfig)
    every = [replace(top, keys=(BASE, *top.keys)), *below]
    if name is None:
        return every
    chosen = [s for s in every if any(f"{one}.".startswith(f"{name}.") for one in s.name.split(", "))]
    return chosen or _keys_called(name, every)


def _keys_called(name: str, every: list[KeySection]) -> list[KeySection]:
    above, _, last = name.rpartition(".")
    called = [(section, key) for section in every for key in section.keys if key.name == last]
    for section, key in called:
        if above in section.name.split(", "):
            return [KeySection(above, section.text, (key,))]
    for passing in [above] if above else [] if called else ["finetune", "adapter", "ray"]:
        if (passed := passed_on(passing, last)) is not None:
            return [KeySection(passing, "", (Key(last, passed[0], "", f"{passed[1]}, which is passed on"),))]
    if not above and called:
        return [KeySection(section.name, section.text, (key,)) for section, key in called]
    if (peer := peer_key(name)) is not None:
        raise ConfigError(f"There is no key {name}: write {peer}.")
    near = difflib.get_close_matches(last, sorted({key.name for section in every for key in section.keys}), n=1)
    sections = f"take one of the sections {', '.join(s.name for s in every if s.name)}"
    raise ConfigError(f"There is no section or key {name}: {f'the nearest key is {near[0]}' if near else sections}.")


def _sections(name: str, section: type[Section]) -> Iterator[KeySection]:
    keys = tuple(_key(key, field) for key, field in section.model_fields.items())
    yield KeySection(name, " ".join((section.__doc__ or "").replace("``", "").split()), keys)
    inner: dict[type[Section], list[str]] = {}
    for key, field in section.model_fields.items():
        if subsection := section_of(field.annotation):
            inner.setdefault(subsection, []).append(f"{name}.{key}" if name else key)
    for subsection, names in inner.items():
        yield from _sections(", ".join(names), subsection)


def _key(name: str, field: FieldInfo) -> Key:
    text = field.description or ""
    if section_of(field.annotation):
        return Key(name, "section", None if field.is_required() else "", text)
    default = None if field.is_required() else _text(field.get_default(call_default_factory=True))
    return Key(name, _values(field.annotation), default, text)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_values(one) for one in arguments if one is not types.NoneType))
    if origin is typing.Annotated:
        return _values(arguments[0])
    if origin is list and typing.get_origin(arguments[0]) is Literal:
        return f"list of {_values(arguments[0])}"
    return _NAMES[origin or annotation]
