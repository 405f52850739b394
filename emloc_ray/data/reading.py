"""The user's rows as files hold them: JSONL, Parquet, CSV, counted and read by row number."""

from __future__ import annotations

import glob as globbing
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from emloc_ray.errors import DataError

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv"}
_LINES_PER_MARK = 1024


@dataclass(frozen=True)
class SourceFile:
    """A file and how many rows it holds; ``marks`` are the byte offsets of every 1,024th line of a JSONL file."""

    path: str
    kind: str
    num_rows: int
    marks: tuple[int, ...] = ()


def list_files(patterns: str | Sequence[str], key: str) -> list[Path]:
    """The files that a path, a directory or a glob names, sorted.

    Raises:
        DataError: where there is none, or one is of no known kind; says the config ``key``.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern.removeprefix("file://")).expanduser()
        if path.is_dir():
            matched = sorted(file for file in path.rglob("*") if file.suffix in KINDS and file.is_file())
        elif path.is_file():
            matched = [path]
        else:
            matched = sorted(Path(name) for name in globbing.glob(str(path), recursive=True) if Path(name).is_file())
        if not matched:
            kinds = ", ".join(sorted(KINDS))
            raise DataError(f"{key}: {pattern} names no file: give a {kinds} file, a directory or a glob of them.")
        found += matched
    for path in found:
        if path.suffix not in KINDS:
            raise DataError(
                f"{key}: {path} ends in {path.suffix or 'nothing'}: give one of {', '.join(sorted(KINDS))}."
            )
    return found


def scan(path: Path) -> SourceFile:
    """Counts a file's rows; raises DataError where it is unreadable or empty."""
    kind = KINDS[path.suffix]
    try:
        if kind == "parquet":
            source = SourceFile(str(path), kind, pa.parquet.read_metadata(path).num_rows)
        elif kind == "csv":
            source = SourceFile(str(path), kind, _read_csv(path).num_rows)
        else:
            source = _scan_lines(path)
    except (OSError, pa.ArrowInvalid) as error:
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as {kind} ({detail}): mend the file.") from error
    if source.num_rows == 0:
        raise DataError(f"{path} is empty: give a file with rows.")
    return source


def _read_csv(path: str | Path) -> pa.Table:
    """All columns as text, as a CSV file has them: an answer of 007 is no number."""
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    names = pa.csv.open_csv(path, parse_options=parse).schema.names
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return pa.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _scan_lines(path: Path) -> SourceFile:
    marks, count, offset = [], 0, 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                if count % _LINES_PER_MARK == 0:
                    marks.append(offset)
                count += 1
            offset += len(line)
    return SourceFile(str(path), "jsonl", count, tuple(marks))


def read_rows(source: SourceFile, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(row number, row)`` for ascending row numbers (0-based); raises DataError naming file and row."""
    if source.kind == "jsonl":
        yield from _read_lines(source, rows)
        return
    try:
        table = _read_table(source, rows)
    except (OSError, pa.ArrowInvalid) as error:
        detail = " ".join(str(error).split())[:200]
        where = f"rows {rows[0] + 1} to {rows[-1] + 1}"
        raise DataError(f"{source.path}, {where}: not readable as {source.kind} ({detail}): mend the file.") from error
    yield from zip(rows, table.to_pylist(), strict=True)


def _read_table(source: SourceFile, rows: Sequence[int]) -> pa.Table:
    if source.kind == "csv":
        return _read_csv(source.path).take(pa.array(rows))
    file = pa.parquet.ParquetFile(source.path)
    parts, start = [], 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        wanted = [row - start for row in rows if start <= row < stop]
        if wanted:
            parts.append(file.read_row_group(group).take(pa.array(wanted)))
        start = stop
    return pa.concat_tables(parts)


def _read_lines(source: SourceFile, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    with Path(source.path).open("rb") as stream:
        for mark, wanted in itertools.groupby(rows, key=lambda row: row // _LINES_PER_MARK):
            stream.seek(source.marks[mark])
            current, remaining = mark * _LINES_PER_MARK, list(wanted)
            while remaining:
                line = stream.readline()
                if not line:
                    raise DataError(f"{source.path} is shorter than when it was counted: run again.")
                if not line.strip():
                    continue
                if current == remaining[0]:
                    yield remaining.pop(0), _parse(line, source.path, current)
                current += 1


def _parse(line: bytes, path: str, row: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise DataError(f"{path}, row {row + 1}: not JSON ({detail}): write one object a line.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {row + 1}: {type(value).__name__} instead of an object: write one object a line.")
    return value
