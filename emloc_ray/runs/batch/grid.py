"""Expands a grid of settings into points, each with a unique name that is safe for a directory."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_NAME = 120
# Copies of an object store's runs have names that begin with "store=" (io/store/node_cache.py).
SAFE_NAME = re.compile(rf"(?!store=)[A-Za-z0-9_][A-Za-z0-9._=-]{{0,{MAX_NAME - 1}}}")
_MAX_VALUE = 40


@dataclass(frozen=True)
class Point:
    """The settings of one point, by dotted key, and its name ``KEY=VALUE-KEY=VALUE``; an empty grid has one, unnamed."""

    values: dict[str, Any]
    name: str = ""


def points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The product of all values; the last key varies fastest.

    A name has the last part of each key. A value keeps its label when others join the grid: a label with replaced letters
    ends in a digest. No label holds a "=", so that names are unambiguous.
    """
    named = [
        [(key, value, f"{_key_label(key)}={label}") for value, label in zip(values, _labels(values), strict=True)]
        for key, values in grid.items()
    ]
    return [
        Point({key: value for key, value, _ in point}, "-".join(label for *_, label in point))
        for point in itertools.product(*named)
    ]


def joined_name(task: str, point: str) -> str:
    """A task's name with a point's, either may be empty; a too long name is cut to ``MAX_NAME`` and ends in a digest."""
    name = "-".join(filter(None, (task, point)))
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}.{_digest(name)}"


def repeated(values: Sequence[Any]) -> list[str]:
    """The values that occur more than once, as text."""
    return [text for text, times in Counter(map(repr, values)).items() if times > 1]


def _key_label(key: str) -> str:
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", key.rpartition(".")[2])
    return label if SAFE_NAME.fullmatch(f"{label}=") else f"_{label[:_MAX_VALUE]}"


def _labels(values: Sequence[Any]) -> list[str]:
    labels: dict[str, None] = {}
    for value in values:
        text = json.dumps(value) if value is None or isinstance(value, bool | int | float) else str(value)
        label = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:_MAX_VALUE]
        if label != text:
            label = f"{label}.{_digest(text)}"
        while label in labels:  # the text 1 beside the number 1
            label = f"{label}.{_digest(label + repr(value))}"
        labels[label] = None
    return list(labels)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
