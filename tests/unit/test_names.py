"""Functions, parameters and variables are named after what they hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import emloc_ray

ROOT = Path(emloc_ray.__file__).parent
EMPTY = {"found", "room", "some", "standing", "there", "told", "way", "ways"}


def names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def test_no_name_is_one_that_names_nothing() -> None:
    empty = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {name}"  # type: ignore[attr-defined]
        for file in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        for name in names(node)
        if name.strip("_").lower() in EMPTY
    ]
    assert empty == []
