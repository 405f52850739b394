"""One matcher for all stages: which modules a pattern names, with PEFT's meaning."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from emloc_ray.errors import ConfigError

Value = TypeVar("Value")
Patterns = str | Sequence[str]

ALL_LINEAR = "all-linear"


def matches(name: str, patterns: Patterns) -> bool:
    """Whether ``patterns`` names the module: a string is a regex for the full name, a list holds names or suffixes
    (https://huggingface.co/docs/peft/package_reference/lora, ``target_modules``)."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def select(
    names: Sequence[str], targets: Patterns | None, exclude: Patterns | None, key: str, others: Sequence[str] = ()
) -> list[str]:
    """The ``names`` that ``targets`` (all where ``None`` or ``all-linear``) minus ``exclude`` name, in order.

    A pattern may match ``others`` alone, which are not chosen. Raises ConfigError where a pattern matches nothing; says
    ``key``, the pattern and what there is.
    """
    if targets is None or targets == ALL_LINEAR:
        chosen = list(names)
    else:
        _check_each(names, targets, key, others)
        chosen = [name for name in names if matches(name, targets)]
    if exclude is not None:
        excludes = key.replace("target_modules", "exclude_modules")
        _check_each(names, exclude, excludes, others)
        chosen = [name for name in chosen if not matches(name, exclude)]
        if not chosen:
            raise ConfigError(f"{excludes}: {exclude!r} leaves none of the linears that {key} names: exclude less.")
    return chosen


def _check_each(names: Sequence[str], patterns: Patterns, key: str, others: Sequence[str]) -> None:
    """Raises ConfigError for the first pattern that names no module."""
    known = [*names, *others]
    if isinstance(patterns, str):
        _check_regex(patterns, key)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(matches(name, pattern if isinstance(patterns, str) else [pattern]) for name in known):
            raise ConfigError(_no_match(key, pattern, names))


def lookup(name: str, table: Mapping[str, Value], default: Value) -> Value:
    """The value of the first key that names the module, as PEFT reads ``rank_pattern``: ``(.*\\.)?KEY`` in full."""
    for pattern, value in table.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def order_free(table: Mapping[str, Value], names: Iterable[str], pattern_of: Callable[[str], str]) -> dict[str, Value]:
    """A table that says the same of each of ``names`` whatever the order of its keys, which PEFT sorts as it saves: itself
    where it does, else one key, ``pattern_of(name)``, for each name that it holds for."""
    values = {name: {value for key, value in table.items() if lookup(name, {key: True}, False)} for name in names}
    if all(len(fitting) <= 1 for fitting in values.values()):
        return dict(table)
    return {pattern_of(name): lookup(name, table, next(iter(fitting))) for name, fitting in values.items() if fitting}


def check_table(names: Sequence[str], table: Mapping[str, object], key: str, others: Sequence[str] = ()) -> None:
    """Raises ConfigError for the first key of a pattern table that names no module, of ``names`` or ``others``."""
    for pattern in table:
        _check_regex(pattern, key)
        if flags := re.match(r"\(\?([aiLmsux]+)\)", pattern):  # PEFT puts the key inside another expression
            raise ConfigError(f"{key}: {pattern!r} begins with flags: write (?{flags[1]}:…) around what they are for.")
        if not any(lookup(name, {pattern: True}, False) for name in [*names, *others]):
            raise ConfigError(_no_match(key, pattern, names))


def suffixes(names: Iterable[str]) -> list[str]:
    """The distinct last parts of module names, in order: ``q_proj``, ``k_proj``, …"""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _check_regex(pattern: str, key: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression ({error}): fix it.") from error


def _no_match(key: str, pattern: str, names: Sequence[str]) -> str:
    endings = suffixes(names)
    near = difflib.get_close_matches(pattern, endings, n=1, cutoff=0.6)
    hint = f"; the nearest is {near[0]}" if near else ""
    if pattern in endings:  # in a list it would match
        hint = f"; a text is a pattern of whole names: write [{pattern}]"
    return f"{key}: {pattern!r} matches none of the {len(names)} linears (there are {', '.join(endings[:20])}{hint})."


def portable_targets(chosen: Sequence[str], every_linear: Sequence[str]) -> list[str]:
    """The shortest ``target_modules`` that names just ``chosen`` among all the model's linears. Suffixes (``q_proj``) where
    they suffice, as servers expect; else full names."""
    short = suffixes(chosen)
    reached = [name for name in every_linear if matches(name, short)]
    return short if set(reached) == set(chosen) else list(chosen)
