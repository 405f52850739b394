"""A task of short answers, made on the spot: name the exception that a function raises.

A row's prompt is the last lines of a function up to a ``raise`` with a message, the exception's name masked; its completion is
that name. Functions are found as :mod:`emloc_ray.demos.python_sources` says.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Sequence
from pathlib import Path

from emloc_ray.demos.python_sources import Function, SourceRow, SourceTask, write_task

LEAD = "\n# The exception:\n"
"""What stands between the code and the completion; it ends at a line's border, where every tokenizer splits."""
MASK = "____"
TASK = SourceTask(max_prompt_chars=240, max_rows=1_200, min_rows=800, max_share=1 / 3)
"""No exception is on more than a third of the rows: naming always the same one is right no more often."""
# Not those that are raised for anything: no message tells them apart.
_NAMES = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
} - {"AssertionError", "Exception", "RuntimeError", "ValueError"}


def generate(out_dir: Path, task: SourceTask = TASK, roots: Sequence[Path] | None = None) -> dict[str, int]:
    """Writes the task's splits; see :func:`~emloc_ray.demos.python_sources.write_task`."""
    return write_task(
        out_dir, task, lambda node, lines, module: exception_row(node, lines, module, task.max_prompt_chars), roots
    )


def exception_row(node: Function, lines: list[str], module: str, max_prompt_chars: int) -> SourceRow | None:
    """A function's row, of a ``raise`` of a built-in exception with a message; None where it has none that fits."""
    for statement, name in _raises(node):
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        line = lines[first - 1]
        masked = line[: name.col_offset] + MASK + line[name.end_col_offset :]
        code = [*lines[node.lineno - 1 : first - 1], masked, *lines[first:last]]
        prompt = _last_lines(code, max_prompt_chars - len(LEAD))
        if prompt is not None and name.id not in prompt:
            return SourceRow(prompt + LEAD, name.id, module)
    return None


def _raises(node: Function) -> Iterator[tuple[ast.Raise, ast.Name]]:
    """Its statements ``raise NAME("message" …)`` of built-in exceptions, each with the name."""
    for statement in ast.walk(node):
        if (
            isinstance(statement, ast.Raise)
            and isinstance(call := statement.exc, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in _NAMES
            and call.func.lineno == statement.lineno
            and call.args
            and isinstance(call.args[0], ast.Constant | ast.JoinedStr)
        ):
            yield statement, call.func


def _last_lines(lines: list[str], max_chars: int) -> str | None:
    kept: list[str] = []
    size = -1
    for line in reversed(lines):
        if not (line := line.rstrip()):
            continue
        size += len(line) + 1
        if size > max_chars:
            break
        kept.insert(0, line)
    code = "\n".join(kept)
    return code if MASK in code and code.isascii() else None
