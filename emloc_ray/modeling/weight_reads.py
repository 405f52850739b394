"""Which children's weights a module's own code reads, where it could have called the child: only the child's dense weight
will do there, and an adapter beside it would be passed over."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

_LOOKED_AT = ("dtype", "device", "shape", "is_meta")  # asked of a weight, these say nothing of its values
_SETTING_UP = ("__init__", "_init_weights", "reset_parameters")


@functools.cache
def children_read(owner: type[Any]) -> frozenset[str]:
    """The children of a module of class ``owner`` whose ``weight`` or ``bias`` its methods take for a computation: Mamba's
    mixers hand that of ``out_proj`` to a fused kernel in training alone, so the code is read. Empty where the source is not at
    hand."""
    names: set[str] = set()
    for part in owner.__mro__:
        if part.__module__.partition(".")[0] not in ("torch", "builtins"):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
            except (OSError, TypeError, SyntaxError):
                continue
            names.update(_read(tree))
    return frozenset(names)


def _read(node: ast.AST) -> Iterator[str]:
    """The ``name``s of ``self.name.weight`` and ``self.name.bias`` below a node, but where only looked at."""
    for child in ast.iter_child_nodes(node):
        if (isinstance(child, ast.FunctionDef) and child.name in _SETTING_UP) or _emulates_slices(child):
            continue
        name = _child_of_self(child)
        if name is None:
            yield from _read(child)
        elif not _only_looks(node):
            yield name


def _emulates_slices(node: ast.AST) -> bool:
    """BLOOM's way to add up as on the devices that it was trained on, for which no released config asks."""
    return isinstance(node, ast.If) and "pretraining_tp" in ast.unparse(node.test)


def _only_looks(node: ast.AST) -> bool:
    is_asked = isinstance(node, ast.Attribute) and node.attr in _LOOKED_AT
    is_checked = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
    return is_asked or is_checked or (isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)))


def _child_of_self(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.value, ast.Attribute):
        owner = node.value.value
        return node.value.attr if isinstance(owner, ast.Name) and owner.id == "self" else None
    return None
