"""Functions of the Python sources on this machine, as rows of a task: of the standard library and of installed packages.

Files are parsed, never imported. Rows are a function of the seed and the installed sources alone: files are taken
in the order of a seeded hash, no row is like another, and whole modules go to one split, so that none stands in two.
"""

import ast
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from emloc_ray.demos.splits import SPLIT_FRACTIONS, draw, split_at, write_splits
from emloc_ray.errors import DataError

_MAX_FILE_BYTES = 1_000_000

# Tests, copies of other packages, generated code; and this package itself, so that work on it does not change the task.
_SKIPPED_FOLDER = re.compile(
    r"(.*_)?tests?|testing|conftest|_?vendor(ed)?|extern(als?)?|third_?party.*|_distutils|(.*_)?generated"
    r"|site-packages|dist-packages|__pycache__|emloc_ray"
)
_SKIPPED_FILE = re.compile(r"test_.*|.*_tests?|tests?|conftest|setup|.*_pb2(_grpc)?|.*generated.*")
_GENERATED = re.compile(r"generated (from|by|with|using)|do not edit|@generated", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceRow(NamedTuple):
    """A row and the module that it is from; rows of plain text have no ``prompt``."""

    prompt: str
    completion: str
    module: str


# A function's row, given the lines of its file, its module's name and the most characters of a prompt; None where it makes none.
RowOf = Callable[[Function, list[str], str, int], SourceRow | None]

_SCHEMA = pa.schema([(name, pa.string()) for name in SourceRow._fields])


@dataclass(frozen=True)
class SourceTask:
    """How a task makes its rows, ``row_of`` a function, and how many.

    ``max_prompt_chars`` bounds the whole prompt, its closing line included: 280 make rows of about 100 tokens. The caps on
    packages and modules keep any from taking over. Fewer rows than ``min_rows``, or than a smaller ``max_rows``, are an error.
    Where ``max_share`` is set, completions are labels, which rows share: none is on more than that share of ``max_rows``. Files
    in which nothing ``matches`` make no row, and are not parsed.
    """

    row_of: RowOf
    max_prompt_chars: int = 280
    max_rows: int = 12_000
    seed: int = 0
    min_rows: int = 3_000
    max_rows_per_package: int = 1_200
    max_rows_per_module: int = 12
    max_share: float | None = None
    matches: re.Pattern[str] | None = None


def write_task(out_dir: Path, task: SourceTask, roots: Sequence[Path] | None = None) -> dict[str, int]:
    """Writes ``train``, ``calibration``, ``selection`` and ``eval`` as Parquet files into ``out_dir``.

    ``roots`` are the folders whose Python files are read, by default those of the running interpreter. Returns the number of
    rows of each split. Raises DataError where the sources yield too few rows.
    """
    folders = installed_roots() if roots is None else list(roots)
    rows = list(islice(collect(folders, task), task.max_rows))
    needed = min(task.min_rows, task.max_rows)
    if len(rows) < needed:
        where = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"The task found {len(rows)} usable functions in {where} and needs {needed}: install more Python packages there, "
            "or lower min_rows."
        )
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in SPLIT_FRACTIONS}
    sorted_by = "completion" if task.max_share is None else "prompt"
    for row in sorted(rows, key=lambda row: draw(task.seed, "row", getattr(row, sorted_by))):
        splits[split_at(draw(task.seed, "split", row.module))].append(row._asdict())
    return write_splits(out_dir, splits, _SCHEMA)


def collect(folders: Sequence[Path], task: SourceTask) -> Iterator[SourceRow]:
    """Rows from files in hash order; no prompt has the words of an earlier one, and no completion unless it is a label."""
    files = sorted(_modules(folders).items(), key=lambda item: draw(task.seed, "module", item[0]))
    seen: set[str] = set()
    per_package: Counter[str] = Counter()
    per_label: Counter[str] = Counter()
    most = None if task.max_share is None else task.max_share * task.max_rows
    for module, path in files:
        package = module.partition(".")[0]
        allowed = min(task.max_rows_per_module, task.max_rows_per_package - per_package[package])
        for row in _rows_of_file(path, module, task) if allowed > 0 else []:
            texts = (row.prompt, row.completion) if most is None else (row.prompt,)
            keys = {words(text) for text in texts if text}
            if allowed > 0 and seen.isdisjoint(keys) and (most is None or per_label[row.completion] < most):
                seen |= keys
                per_package[package] += 1
                per_label[row.completion] += 1
                allowed -= 1
                yield row


def installed_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages, each once."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(Path(path).resolve() for path in paths if Path(path).is_dir()))


def _modules(folders: Sequence[Path]) -> dict[str, Path]:
    """Module name -> file, for every file worth reading; of two files with one name, the first folder's."""
    modules: dict[str, Path] = {}
    for root in folders:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name.isidentifier() and not _SKIPPED_FOLDER.fullmatch(name)]
            package = Path(folder).relative_to(root).parts
            for name in names:
                stem, _, suffix = name.rpartition(".")
                parts = package if stem == "__init__" else (*package, stem)
                if suffix == "py" and parts and stem.isidentifier() and not _SKIPPED_FILE.fullmatch(stem):
                    modules.setdefault(".".join(parts), Path(folder, name))
    return modules


def _rows_of_file(path: Path, module: str, task: SourceTask) -> list[SourceRow]:
    """The file's rows in a seeded order, with duplicates; none where the file cannot be read as Python."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return []
        source = importlib.util.decode_source(path.read_bytes())
        if _GENERATED.search(source, 0, 2_000) or (task.matches and not task.matches.search(source)):
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functions = list(_functions(ast.parse(source)))
        lines = source.split("\n")
        rows = [row for node in functions if (row := task.row_of(node, lines, module, task.max_prompt_chars))]
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError, OSError):
        return []
    return sorted(rows, key=lambda row: (draw(task.seed, "row", row.completion), row.prompt))


def _functions(tree: ast.AST) -> Iterator[Function]:
    """Functions and methods, but not those inside another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.stmt):
            yield from _functions(node)


def code_of(node: Function, lines: list[str], max_chars: int) -> str | None:
    """The function's source, dedented, without docstrings and blank lines, cut at a line's border. None where less than two
    lines fit, where a docstring shares its line with code, or where not all is ASCII."""
    dropped: set[int] = set()
    for docstring in _docstrings(node):
        if lines[docstring.lineno - 1][: docstring.col_offset].strip():
            return None
        dropped.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    kept: list[str] = []
    size = -1
    for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
        line = lines[number - 1].rstrip()
        line = line[min(node.col_offset, len(line) - len(line.lstrip())) :]
        if number in dropped or not line:
            continue
        size += len(line) + 1
        if size > max_chars:
            break
        kept.append(line)
    code = "\n".join(kept)
    return code if len(kept) >= 2 and code.isascii() else None


def _docstrings(node: ast.stmt) -> Iterator[ast.stmt]:
    """The docstrings of a function and of the functions and classes inside it."""
    if isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        yield node.body[0]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)


def words(text: str) -> str:
    """The text as lower-case words with single spaces, without punctuation: duplicates are compared by it."""
    return " ".join(re.findall(r"[a-z0-9_]+", text.lower()))
