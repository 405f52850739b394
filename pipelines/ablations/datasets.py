"""Tasks made from the Python sources installed here, and calibration rows that are not the task's own.

``summaries``   a function's code -> the first sentence of its docstring
``names``       a function's code with its name masked -> its name
``code``        a whole function with its docstring: plain text
``exceptions``  a function's code with the exception that it raises masked -> the exception's name

Nothing leaks between splits: whole files go to one split, drawn by a hash of seed and module name, and no row has the words
of another's prompt or completion in any split, as copies of a file in another package would; only the exceptions' names are
shared. The rows are a function of the seed and the installed sources alone.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from ablations.config import AblationConfig, CalibrationRows, RowsConfig
from emloc_ray.demos.docstrings import LEAD, summary_row
from emloc_ray.demos.python_sources import (
    Function,
    SourceRow,
    SourceTask,
    code_of,
    collect,
    installed_roots,
    words,
)
from emloc_ray.demos.splits import draw, split_at
from emloc_ray.errors import DataError
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.atomic import atomic_directory, write_json

Dataset = Literal["summaries", "names", "code", "exceptions"]
DATASETS: tuple[str, ...] = get_args(Dataset)
FORMATS = {name: "text" if name == "code" else "prompt_completion" for name in DATASETS}
SPLITS = ("train", "selection", "eval", "calibration")

NAME_LEAD = "\n# Its name:\n"
EXCEPTION_LEAD = "\n# The exception:\n"
MASK = "____"

_MADE = "made.json"
_MAX_CHARS = 280
_PROSE_CHARS = (120, 600)
_LICENCES = re.compile(r"(licen[cs]e|copying|notice|readme)[^/]*", re.IGNORECASE)


def make_dataset(
    name: str,
    out_dir: Path,
    seed: int,
    rows: RowsConfig,
    calibrations: dict[str, CalibrationRows],
    healing_rows: Sequence[str] = (),
    roots: Sequence[Path] | None = None,
) -> dict[str, str]:
    """Writes the splits as JSONL into ``out_dir``, unless they are there already; returns the SHA-256 of each.

    These are ``train``, ``selection`` and ``eval``, for each of ``calibrations`` a ``calibration-NAME``, and for each of
    ``healing_rows`` a ``healing-NAME`` of as many rows as ``train`` has.

    Raises:
        DataError: where the sources under ``roots``, by default the interpreter's, yield too few rows.
    """
    asked = _asked(name, seed, rows, calibrations, healing_rows)
    if (known := made(out_dir, asked)) is not None:
        return known
    folders = installed_roots() if roots is None else list(roots)
    splits = {
        split: [_as_row(row, name) for row in members] for split, members in _splits(name, folders, seed, rows).items()
    }
    files: dict[str, list[dict[str, str]]] = {split: splits[split] for split in SPLITS[:-1]}
    for key, calibration in calibrations.items():
        files[f"calibration-{key}"] = _calibration(name, splits["calibration"], calibration, folders, seed, rows)
    for key in healing_rows:
        texts = _foreign(key, "train", rows.train, folders, seed, rows)
        files[f"healing-{key}"] = [_as_row(_cut(text), name) for text in texts]
    written = {key: "".join(json.dumps(row) + "\n" for row in members) for key, members in files.items()}
    content = {key: hashlib.sha256(text.encode()).hexdigest() for key, text in written.items()}
    with atomic_directory(out_dir) as temporary:
        for key, text in written.items():
            (temporary / f"{key}.jsonl").write_text(text)
        write_json(temporary / _MADE, {"asked": asked, "content": content})
    return content


def _asked(
    name: str,
    seed: int,
    rows: RowsConfig,
    calibrations: dict[str, CalibrationRows],
    healing_rows: Sequence[str],
) -> str:
    of_calibration = {key: value.model_dump() for key, value in calibrations.items()}
    return fingerprint([name, seed, rows.model_dump(), of_calibration, list(healing_rows)])


def made(folder: Path, asked: str | None = None) -> dict[str, str] | None:
    """The SHA-256 of each file of a data set that is there, None where it is not, or not as asked."""
    file = folder / _MADE
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    content: dict[str, str] = record["content"]
    return content if asked in (None, record["asked"]) else None


def data_dir(folder: Path, name: str, seed: int, config: AblationConfig) -> Path:
    """Where a data set is below ``folder``: ablations that ask for the same one find it there."""
    asked = _asked(name, seed, config.rows, config.calibrations, config.healing_rows)
    return folder / f"{name}-{seed}-{asked[:8]}"


def stand_in(name: str, out_dir: Path, calibrations: Iterable[str], healing_rows: Iterable[str] = ()) -> None:
    """A row of usual length for each split: what a config can be checked against before its data are made."""
    row = SourceRow("" if FORMATS[name] == "text" else "x = 1\n" * (_MAX_CHARS // 6), "return x\n" * 6, "")
    out_dir.mkdir(parents=True, exist_ok=True)
    others = (*(f"calibration-{key}" for key in calibrations), *(f"healing-{key}" for key in healing_rows))
    for split in (*SPLITS[:-1], *others):
        (out_dir / f"{split}.jsonl").write_text(json.dumps(_as_row(row, name)) + "\n")


def data_section(name: str, folder: Path, calibration: str, heal_on: str | None = None) -> dict[str, Any]:
    """The keys of a run's ``data`` section for the files in ``folder``."""
    files = split_files(calibration, heal_on)
    paths = {split: {"path": str(folder / f"{file}.jsonl")} for split, file in files.items()}
    return {"format": FORMATS[name], **paths}


def split_files(calibration: str, heal_on: str | None = None) -> dict[str, str]:
    """The name of each split's file."""
    files = {split: split for split in SPLITS[:-1]} | {"calibration": f"calibration-{calibration}"}
    return files | ({} if heal_on is None else {"healing": f"healing-{heal_on}"})


def _splits(name: str, folders: Sequence[Path], seed: int, rows: RowsConfig) -> dict[str, list[SourceRow]]:
    """As many rows a split as are asked for, each split of files of its own."""
    wanted: dict[str, int] = {split: getattr(rows, split) for split in SPLITS}
    shares = {split: count / sum(wanted.values()) for split, count in wanted.items()}
    splits: dict[str, list[SourceRow]] = {split: [] for split in SPLITS}
    task = replace(_TASKS[name], seed=seed)
    for row in collect(folders, task):
        split = splits[split_at(draw(seed, "split", row.module), shares)]
        split.append(row)
        if all(len(splits[name]) >= count for name, count in wanted.items()):
            break
    short = [split for split, count in wanted.items() if len(splits[split]) < count]
    if short:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"The data set {name} has {len(splits[short[0]])} rows for {short[0]} in {where} and needs {wanted[short[0]]}:"
            f" install more Python packages there, or lower rows.{short[0]}."
        )
    # In an order of their own: rows of one file stand apart, and rows of one label.
    drawn_by = "completion" if task.max_share is None else "prompt"
    by_draw = {
        split: sorted(members, key=lambda row: draw(seed, "row", getattr(row, drawn_by)))
        for split, members in splits.items()
    }
    return {split: members[: wanted[split]] for split, members in by_draw.items()}


def _calibration(
    name: str, own: list[dict[str, str]], asked: CalibrationRows, folders: Sequence[Path], seed: int, rows: RowsConfig
) -> list[dict[str, str]]:
    """The task's own calibration rows, some of them replaced, their words shuffled where that is asked for."""
    mixed = list(own)
    if asked.foreign is not None:
        count = round(asked.share * len(own))
        texts = _foreign(asked.foreign, "calibration", count, folders, seed, rows)
        places = sorted(range(len(own)), key=lambda number: draw(seed, "foreign", str(number)))
        for place, text in zip(places, texts, strict=False):
            mixed[place] = _as_row(_cut(text), name)
    if asked.shuffle:
        mixed = [{key: _shuffled(text, seed) for key, text in row.items()} for row in mixed]
    return mixed


def _foreign(name: str, split: str, count: int, folders: Sequence[Path], seed: int, rows: RowsConfig) -> list[str]:
    """Rows of another data set's split, or of prose, as texts."""
    if name == "prose":
        texts = prose(seed)
    else:
        texts = [row.prompt + row.completion for row in _splits(name, folders, seed, rows)[split]]
    if len(texts) < count:
        raise DataError(f"There are {len(texts)} rows of {name} here, {count} are needed: lower rows.{split}.")
    return texts[:count]


def prose(seed: int) -> list[str]:
    """Paragraphs of the installed packages' descriptions and licences, each once, in a seeded order."""
    paragraphs = _paragraphs()
    return [paragraphs[key] for key in sorted(paragraphs, key=lambda key: draw(seed, "prose", key))]


@functools.cache
def _paragraphs() -> dict[str, str]:
    """By their words."""
    paragraphs: dict[str, str] = {}
    for text in _documents():
        for paragraph in re.split(r"\n\s*\n", text):
            plain = " ".join(paragraph.split())
            letters = sum(letter.isalpha() or letter == " " for letter in plain)
            if _PROSE_CHARS[0] <= len(plain) <= _PROSE_CHARS[1] and letters > 0.9 * len(plain):
                paragraphs.setdefault(words(plain), plain)
    return paragraphs


def _documents() -> Iterator[str]:
    for distribution in importlib.metadata.distributions():
        about: Any = distribution.metadata  # an email's Message, whatever its declared type
        yield str(about.get_payload() or about.get("Description") or "")
        for file in distribution.files or ():
            if _LICENCES.fullmatch(file.name) and file.suffix not in (".py", ".pyc"):
                try:
                    yield Path(str(file.locate())).read_text("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue


def _as_row(row: SourceRow, name: str) -> dict[str, str]:
    if FORMATS[name] == "text":
        return {"text": row.prompt + row.completion}
    return {"prompt": row.prompt, "completion": row.completion}


def _cut(text: str) -> SourceRow:
    """A text as prompt and completion, its last quarter of words."""
    border = [match.start() for match in re.finditer(r"\s\S", text)] or [len(text) // 2]
    place = border[3 * len(border) // 4]
    return SourceRow(text[:place], text[place:], "")


def _shuffled(text: str, seed: int) -> str:
    """The same words in an order of a hash."""
    numbered = list(enumerate(text.split()))
    return " ".join(word for _, word in sorted(numbered, key=lambda item: draw(seed, text, str(item[0]))))


def _name(node: Function, lines: list[str], module: str, max_prompt_chars: int) -> SourceRow | None:
    """The code with the name masked; None where the name is one that Python or a base class gave, or says nothing."""
    if node.name.startswith("__") or len(node.name.strip("_")) < 4 or len(node.body) < 2:
        return None
    code = code_of(node, lines, max_prompt_chars - len(NAME_LEAD))
    if code is None:
        return None
    masked = re.sub(rf"\b{re.escape(node.name)}\b", MASK, code)
    return SourceRow(masked + NAME_LEAD, node.name, module)


def _text(node: Function, lines: list[str], module: str, max_prompt_chars: int) -> SourceRow | None:
    """The function as it stands, dedented, cut at a line's border."""
    kept: list[str] = []
    size = 0
    for line in lines[node.lineno - 1 : node.end_lineno]:
        line = line.rstrip()[min(node.col_offset, len(line) - len(line.lstrip())) :]
        size += len(line) + 1
        if size > max_prompt_chars + len(LEAD):
            break
        kept.append(line)
    text = "\n".join(kept)
    return SourceRow("", text + "\n", module) if len(kept) > 3 and text.isascii() and _has_code(node) else None


def _has_code(node: Function) -> bool:
    return not isinstance(node.body[-1], ast.Pass | ast.Raise)


def _exception(node: Function, lines: list[str], module: str, max_prompt_chars: int) -> SourceRow | None:
    """The code with the first exception that it raises masked; None where it raises none by a class's name, or was cut there."""
    raised = min(filter(None, map(_raised, ast.walk(node))), default=None)
    code = code_of(node, lines, max_prompt_chars - len(EXCEPTION_LEAD))
    if raised is None or code is None:
        return None
    masked = re.sub(rf"\b{raised[1]}\b", MASK, code)
    return SourceRow(masked + EXCEPTION_LEAD, raised[1], module) if f"raise {MASK}" in masked else None


def _raised(node: ast.AST) -> tuple[int, str] | None:
    """The line of a ``raise`` and its class; None of what else there is, as ``raise error``."""
    if not isinstance(node, ast.Raise):
        return None
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return (node.lineno, raised.id) if isinstance(raised, ast.Name) and raised.id[0].isupper() else None


_FEW_A_FILE = SourceTask(summary_row, _MAX_CHARS, max_rows_per_package=400, max_rows_per_module=6)
_TASKS = {
    "summaries": _FEW_A_FILE,
    "names": replace(_FEW_A_FILE, row_of=_name),
    "code": replace(_FEW_A_FILE, row_of=_text),
    # No exception is on more than 300 rows of all: ValueError alone would be on a third.
    "exceptions": replace(
        _FEW_A_FILE, row_of=_exception, max_rows=2_000, max_share=0.15, matches=re.compile(r"\braise [A-Z]")
    ),
}
