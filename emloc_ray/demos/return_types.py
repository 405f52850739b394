"""A task of short answers, made on the spot: name the type that a function returns.

A row's prompt is a short function without its docstring, the annotation of what it returns masked; its completion is that
annotation. Functions are found as :mod:`emloc_ray.demos.python_sources` says.
"""

import ast
import re

from emloc_ray.demos.python_sources import Function, SourceRow, SourceTask, code_of

LEAD = "\n# The return type:\n"
"""What stands between the code and the completion; it ends at a line's border, where every tokenizer splits."""
MASK = "____"
_TYPES = ("bool", "bytes", "float", "int", "str")  # and None; of others there are few each


def return_type_row(node: Function, lines: list[str], module: str, max_prompt_chars: int) -> SourceRow | None:
    """A function's row; None where it returns another type, its name fixes the type (``__len__``), or it is too long."""
    annotation = node.returns
    if annotation is None or (returned := _type_name(annotation)) is None or node.name.startswith("__"):
        return None
    line = lines[annotation.lineno - 1]
    if not line.isascii():  # columns are of bytes
        return None
    masked = [*lines]
    masked[annotation.lineno - 1] = line[: annotation.col_offset] + MASK + line[annotation.end_col_offset :]
    code = code_of(node, masked, max_prompt_chars - len(LEAD))
    if code is None or not code.endswith(lines[(node.end_lineno or node.lineno) - 1].strip()):  # was cut
        return None
    return SourceRow(code + LEAD, returned, module)


def _type_name(annotation: ast.expr) -> str | None:
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return "None"
    return annotation.id if isinstance(annotation, ast.Name) and annotation.id in _TYPES else None


_RETURNS = re.compile(rf"->[\s(\\]*(None|{'|'.join(_TYPES)})\b")
TASK = SourceTask(return_type_row, max_prompt_chars=240, max_rows=2_000, min_rows=800, max_share=0.3, matches=_RETURNS)
"""No type is on more than 30 % of the rows: naming always the same one is right no more often."""
