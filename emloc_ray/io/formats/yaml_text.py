"""YAML 1.2, as configs are written: ``yes``, ``no``, ``on`` and ``off`` are text, ``1e-4`` is a number."""

import io
import math
import sys
from datetime import date
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import BaseConstructor, ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode

_MERGE = "tag:yaml.org,2002:merge"  # <<, which brings another mapping's keys
_MOST = 1_000_000  # values, where each alias counts as what it stands for
_TOO_MANY = f"with its aliases written out it holds over {_MOST:,} values"


class _Constructor(SafeConstructor):
    """ruamel itself lets equal keys pass in a mapping that has a merge key."""

    def flatten_mapping(self, node: Any) -> Any:
        own = [pair for pair in node.value if pair[0].tag != _MERGE]
        if len(own) < len(node.value):
            BaseConstructor.construct_mapping(self, MappingNode(node.tag, own, node.start_mark))
        super().flatten_mapping(node)
        if len(node.value) > _MOST:
            raise ConstructorError(problem=_TOO_MANY, problem_mark=node.start_mark)


def read_yaml(text: str) -> Any:
    """The value of a text that holds one document. Raises ValueError with the line and what is wrong there, such as a tab or
    the second of two equal keys; shows no value."""
    yaml = YAML(typ="safe", pure=True, plug_ins=[])
    yaml.Constructor = _Constructor
    try:
        value = yaml.load(text)
        if _written_out(value, {}) > _MOST:
            raise ValueError(_TOO_MANY)
        return value
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{_problem(error)}") from error
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml_value(text: str) -> Any:
    """A value on a command line or in a cell: as YAML where that is a number, a list and the like, otherwise as text, where #
    begins no comment. Raises ValueError as :func:`read_yaml` does."""
    text = text.strip()
    value = read_yaml(text)
    is_text = isinstance(value, str | date) if value is not None else text.lower() not in ("", "null", "~")
    return text if is_text and text[0] not in "\"'" else value


def write_yaml(value: Any) -> str:
    """A value as a YAML document, keys in their order."""
    yaml = YAML(typ="safe", pure=True, plug_ins=[])
    yaml.default_flow_style = False
    yaml.width = sys.maxsize  # a text that is folded where it has two spaces is read with one
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def _written_out(value: Any, known: dict[int, float]) -> float:
    """How many values a value holds; infinitely many where an alias in it is the value itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(item, known) for item in items)
    return known[id(value)]


def _problem(error: MarkedYAMLError) -> str:
    problem = str(error.problem)
    if isinstance(error, DuplicateKeyError):  # its own words hold both values, of which one may be a secret
        return problem.replace("found duplicate", "there is a second").partition(" with value ")[0]
    if r"'\t'" in problem:
        return "there is a tab where YAML takes only spaces"
    if "undefined alias" in problem:
        return "a text that begins with * names an alias, of which there is none: write it in quotes"
    return " ".join(f"{error.context or ''} {problem}".split())
