"""The quickstart's task, made on the spot: say in one sentence what a Python function does.

The rows come from the Python sources on this machine: the standard library and whatever is installed beside it. They
are parsed, never imported. A row's prompt is a function without its docstring, its completion the docstring's first
sentence. The result is a function of the seed and the installed sources alone: files are taken in the order of a
seeded hash until enough rows are found, and whole modules go to one split, so that no module stands in two.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.errors import DataError
from emloc_ray.io.atomic import atomic_file

SPLIT_FRACTIONS = {"train": 0.7, "calibration": 0.1, "selection": 0.08, "eval": 0.12}
"""The split names, which are also the file names, and each one's share of the modules."""

LEAD = "\n# What it does:\n"
"""What stands between the code and the completion; it ends at a line's border, where every tokenizer splits."""

_MAX_FILE_BYTES = 1_000_000
_MIN_WORDS, _MAX_WORDS = 3, 30

# Folders and files that hold tests, copies of other packages, or code that no one wrote by hand; and this package
# itself, so that working on it does not change the task.
_SKIPPED_FOLDER = re.compile(
    r"(.*_)?tests?|testing|conftest|_?vendor(ed)?|extern(als?)?|third_?party.*|_distutils|(.*_)?generated"
    r"|site-packages|dist-packages|__pycache__|emloc_ray"
)
_SKIPPED_FILE = re.compile(r"test_.*|.*_tests?|tests?|conftest|setup|.*_pb2(_grpc)?|.*generated.*")
_GENERATED = re.compile(r"generated (from|by|with|using)|do not edit|@generated", re.IGNORECASE)

_DOC_LIST_LINE = re.compile(r"[-*+:@.>=~^|]|\w[\w ]*:\s*$|\w+ ?\(.*\) ?:")
_ROLE = re.compile(r":[\w:+.-]+:`(?:~(?:[^`.]*\.)*|\.)?([^`<]+?)(?: *<[^`]*>)?`")
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|etc|vs|cf|resp|approx|al|fig|eq|no|incl|dr|[a-z])|\.\.)\.$", re.IGNORECASE)
# Plain prose: a capitalised word, then letters, digits and everyday punctuation, then a full stop.
_PROSE = re.compile(r"[A-Z][a-z]*(-[a-z]+)?,? [A-Za-z0-9 ,.;'\"()/_%&+-]*[A-Za-z0-9)'\"]\.")
_NOT_A_DESCRIPTION = re.compile(
    r"(see|refer|todo|fixme|deprecated|note|example|usage|overrid\w*|overload\w*|same as|alias|args|arguments|test"
    r"|tests|please|copied|adapted|constructor|initializ\w* self|not implemented|inherit\w*|equivalent to|author"
    r"|copyright|abstract|docstring|internal|helper|function|method|like|similar|warning|placeholder"
    # These begin remarks about a function, not what it does.
    r"|this|these|it|there|if|when|where|in|on|for|to|used|called|just|we|you|our|they|some|not|no)\b",
    re.IGNORECASE,
)
_CUT_SHORT = re.compile(r"\b(a|an|the|of|to|for|by|and|or|as|is|are|if|via|from|that|with|using|when|into|than)\.$")


@dataclass(frozen=True)
class DocstringTask:
    """What the task's rows look like, and how many there are.

    ``max_prompt_chars`` bounds the whole prompt, its closing line included: 280 make rows of about 100 tokens. The
    two caps keep any package or module from taking over. Fewer than ``min_rows`` (or ``max_rows``, if that is
    smaller) is an error.
    """

    max_prompt_chars: int = 280
    max_rows: int = 12_000
    seed: int = 0
    min_rows: int = 3_000
    max_rows_per_package: int = 1_200
    max_rows_per_module: int = 12


class _Row(NamedTuple):
    prompt: str
    completion: str
    module: str


_SCHEMA = pa.schema([(name, pa.string()) for name in _Row._fields])


def generate(out_dir: Path, task: DocstringTask, roots: Sequence[Path] | None = None) -> dict[str, int]:
    """Write ``train``, ``calibration``, ``selection`` and ``eval`` as Parquet files into ``out_dir``.

    ``roots`` are the folders whose Python files are read, by default those of the running interpreter. Returns the
    number of rows of each split. Raises ``DataError`` where the sources yield too few rows.
    """
    folders = _installed_roots() if roots is None else list(roots)
    was_collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles, and looking for some takes longer than the parsing
    try:
        rows = _collect(folders, task)
    finally:
        if was_collecting:
            gc.enable()
    needed = min(task.min_rows, task.max_rows)
    if len(rows) < needed:
        where = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"The docstring task found {len(rows)} usable functions in {where} and needs {needed}: "
            "install more Python packages there, or lower min_rows."
        )
    splits: dict[str, list[_Row]] = {name: [] for name in SPLIT_FRACTIONS}
    for row in sorted(rows, key=lambda row: _draw(task.seed, "row", row.completion)):
        splits[_split_of(row.module, task.seed)].append(row)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, members in splits.items():
        _write(out_dir / f"{name}.parquet", members)
    return {name: len(members) for name, members in splits.items()}


def _collect(folders: Sequence[Path], task: DocstringTask) -> list[_Row]:
    """Read files in hash order until ``max_rows`` rows are found, none of them like another."""
    files = sorted(_modules(folders).items(), key=lambda item: _draw(task.seed, "module", item[0]))
    rows: list[_Row] = []
    seen: set[str] = set()
    per_package: Counter[str] = Counter()
    for module, path in files:
        package = module.partition(".")[0]
        allowed = min(task.max_rows_per_module, task.max_rows_per_package - per_package[package])
        for row in _rows_of_file(path, module, task) if allowed > 0 else []:
            keys = {_words(row.prompt), _words(row.completion)}
            if allowed > 0 and seen.isdisjoint(keys):
                seen |= keys
                rows.append(row)
                per_package[package] += 1
                allowed -= 1
        if len(rows) >= task.max_rows:
            break
    return rows[: task.max_rows]


def _installed_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages, each once."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(Path(path).resolve() for path in paths if Path(path).is_dir()))


def _modules(folders: Sequence[Path]) -> dict[str, Path]:
    """Module name -> file, for every file worth reading; of two files with one name the first folder's counts."""
    found: dict[str, Path] = {}
    for root in folders:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name.isidentifier() and not _SKIPPED_FOLDER.fullmatch(name)]
            package = Path(folder).relative_to(root).parts
            for name in names:
                stem, suffix = os.path.splitext(name)
                parts = package if stem == "__init__" else (*package, stem)
                if suffix == ".py" and parts and stem.isidentifier() and not _SKIPPED_FILE.fullmatch(stem):
                    found.setdefault(".".join(parts), Path(folder, name))
    return found


def _rows_of_file(path: Path, module: str, task: DocstringTask) -> list[_Row]:
    """The file's rows in a seeded order, not yet deduplicated; none where the file cannot be read as Python."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return []
        source = importlib.util.decode_source(path.read_bytes())
        if _GENERATED.search(source, 0, 2_000):
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            functions = list(_functions(ast.parse(source)))
        lines = source.split("\n")
        rows = [row for node in functions if (row := _row_of(node, lines, module, task.max_prompt_chars))]
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError, OSError):
        return []
    return sorted(rows, key=lambda row: (_draw(task.seed, "row", row.completion), row.prompt))


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(tree: ast.AST) -> Iterator[_Function]:
    """Functions and methods, but not those inside another function: their code is the outer one's."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Function):
            yield node
        elif isinstance(node, ast.stmt):
            yield from _functions(node)


def _row_of(node: _Function, lines: list[str], module: str, max_prompt_chars: int) -> _Row | None:
    """The row that a function makes; None where its docstring or its body says too little."""
    docstring = ast.get_docstring(node)
    if docstring is None or node.name.startswith("__") or not _has_real_body(node.body[1:]):
        return None
    completion = _first_sentence(docstring)
    code = _code(node, lines, max_prompt_chars - len(LEAD)) if completion else None
    if completion is None or code is None or _words(completion) in _words(code):
        return None
    return _Row(code + LEAD, completion, module)


def _has_real_body(body: list[ast.stmt]) -> bool:
    """Whether anything happens besides ``pass``, ``...`` and raising an error."""
    return any(
        not isinstance(statement, ast.Pass | ast.Raise)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


def _code(node: _Function, lines: list[str], max_chars: int) -> str | None:
    """The function's source, dedented, without docstrings and blank lines, cut at a line's border.

    None where less than two lines fit, where a docstring shares its line with code, or where not all is ASCII.
    """
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
    if isinstance(node, _Function | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
        yield node.body[0]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)


def _first_sentence(docstring: str) -> str | None:
    """The docstring's first sentence as plain prose with a full stop; None where it does not begin with one."""
    paragraph: list[str] = []
    for line in _ROLE.sub(r"\1", docstring).strip().split("\n"):
        if not line.strip() or _DOC_LIST_LINE.match(line.strip()):
            break
        paragraph.append(line)
    text = " ".join(" ".join(paragraph).replace("`", "").split())
    ends = (match.end() for match in re.finditer(r"[.!?](?=\s|$)", text))
    end = next((end for end in ends if end == len(text) or not _ABBREVIATION.search(text, 0, end)), None)
    if end is None and len(paragraph) == 1:
        text += "."
    elif end is not None and not text[end:].lstrip()[:1].islower():
        text = text[:end]
    else:
        return None
    is_prose = _PROSE.fullmatch(text) and not _NOT_A_DESCRIPTION.match(text) and not _CUT_SHORT.search(text)
    is_closed = text.count("(") == text.count(")") and text.count('"') % 2 == 0
    return text if is_prose and is_closed and _MIN_WORDS <= len(text.split()) <= _MAX_WORDS else None


def _words(text: str) -> str:
    """The text as lower-case words with single spaces, punctuation dropped: what duplicates are told by."""
    return " ".join(re.findall(r"[a-z0-9_]+", text.lower()))


def _draw(seed: int, kind: str, name: str) -> float:
    """A number in [0, 1) that depends on the arguments alone, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{kind}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_of(module: str, seed: int) -> str:
    """The split that the whole module goes to."""
    drawn = _draw(seed, "split", module)
    bounds = zip(SPLIT_FRACTIONS, accumulate(SPLIT_FRACTIONS.values()), strict=True)
    return next((name for name, bound in bounds if drawn < bound), "train")


def _write(path: Path, rows: list[_Row]) -> None:
    """Write one split, whole or not at all."""
    columns = {name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}
    with atomic_file(path) as file:
        pq.write_table(pa.table(columns, schema=_SCHEMA), file)
