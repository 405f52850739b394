"""The user's rows as files hold them: JSONL, Parquet, CSV, counted and read by row number, in streams."""

from __future__ import annotations

import csv
import glob as globbing
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.errors import DataError
from emloc_ray.io.node_cache import ensure

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv"}
Row = dict[str, Any]

_ROWS_PER_MARK = 1024
_ROWS_PER_BATCH = 256
_BUFFER_BYTES = 2**18
_MAX_CSV_FIELD = 2**31 - 1  # the csv module's own limit is 128 KiB
_UNREADABLE = (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError)


@dataclass(frozen=True)
class SourceFile:
    """A file and how many rows it holds.

    ``marks`` are the byte offsets of every 1,024th row of a JSONL or CSV file, where reading can begin: 10⁷ rows have
    9,766. ``group_rows`` is the size of a Parquet file's largest row group: reading can begin at groups alone.
    """

    path: str
    kind: str
    num_rows: int
    marks: tuple[int, ...] = ()
    group_rows: int = 1


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
    ensure(path)
    kind = KINDS[path.suffix]
    try:
        if kind == "parquet":
            metadata = pq.read_metadata(path)
            groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
            source = SourceFile(str(path), kind, metadata.num_rows, group_rows=max(groups, default=1))
        else:
            marks, count = [], 0
            for offset in _csv_offsets(path) if kind == "csv" else _line_offsets(path):
                if count % _ROWS_PER_MARK == 0:
                    marks.append(offset)
                count += 1
            source = SourceFile(str(path), kind, count, tuple(marks))
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read as {kind} ({_detail(error)}): mend the file.") from error
    if source.num_rows == 0:
        raise DataError(f"{path} is empty: give a file with rows.")
    return source


def read_rows(
    source: SourceFile, rows: Iterable[int], fields: Sequence[str] | None = None
) -> Iterator[tuple[int, Row]]:
    """Yields ``(row number, row)`` for ascending row numbers (0-based), reading on from one to the next.

    Of a Parquet file that has all ``fields`` no other columns are read. Memory is a buffer's, whatever the size of files,
    row groups and ``rows``.

    Raises:
        DataError: naming file and row.
    """
    ensure(Path(source.path))
    return _read_groups(source, rows, fields) if source.kind == "parquet" else _read_records(source, rows)


def _read_groups(source: SourceFile, rows: Iterable[int], fields: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    wanted = iter(rows)
    row = next(wanted, None)
    start = stop = 0
    try:
        # Buffered, a row group is read page by page; unbuffered, whole columns of it at once.
        with pq.ParquetFile(source.path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            columns = list(fields) if fields and set(fields) <= set(file.schema_arrow.names) else None
            for group in range(file.num_row_groups):
                start, stop = stop, stop + file.metadata.row_group(group).num_rows
                if row is None or row >= stop:
                    continue
                begin = start
                for batch in file.iter_batches(_ROWS_PER_BATCH, [group], columns, use_threads=False):
                    inside = []
                    while row is not None and row < begin + batch.num_rows:
                        inside.append(row)
                        row = next(wanted, None)
                    if inside:
                        taken = batch.take(pa.array([number - begin for number in inside]))
                        yield from zip(inside, taken.to_pylist(), strict=True)
                    begin += batch.num_rows
                    if row is None or row >= stop:
                        break
    except _UNREADABLE as error:
        where = f"rows {start + 1} to {stop}"
        raise DataError(
            f"{source.path}, {where}: not readable as parquet ({_detail(error)}): mend the file."
        ) from error
    if row is not None:
        raise DataError(f"{source.path} is shorter than when it was counted: run again.")


def _read_records(source: SourceFile, rows: Iterable[int]) -> Iterator[tuple[int, Row]]:
    """JSONL and CSV: from the nearest mark on where that is ahead, else by reading on."""
    records: Iterator[Any] = iter(())
    position = -1
    row = 0
    try:
        for row in rows:
            mark = row // _ROWS_PER_MARK
            if position < 0 or mark * _ROWS_PER_MARK > position:
                records = _records(source, source.marks[mark])
                position = mark * _ROWS_PER_MARK
            record = next(itertools.islice(records, row - position, None), None)
            if record is None:
                raise DataError(f"{source.path} is shorter than when it was counted: run again.")
            yield row, record if source.kind == "csv" else _parse(record, source.path, row)
            position = row + 1
    except _UNREADABLE as error:
        raise DataError(
            f"{source.path}, row {row + 1}: not readable as {source.kind} ({_detail(error)}): mend the file."
        ) from error


def _records(source: SourceFile, offset: int) -> Iterator[Any]:
    return _csv_rows(source.path, offset) if source.kind == "csv" else _lines(source.path, offset)


def _lines(path: str, offset: int) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        stream.seek(offset)
        for line in stream:
            if line.strip():
                yield line


def _line_offsets(path: Path) -> Iterator[int]:
    """Where each line begins that is not blank."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield offset
            offset += len(line)


def _csv_rows(path: str, offset: int) -> Iterator[Row]:
    """The rows from a byte offset on; all values are text, as a CSV file has them: an answer of 007 is no number."""
    with open(path, encoding="utf-8-sig", newline="") as text:
        names = next(_csv_records(text), [])
    with open(path, "rb") as stream:
        stream.seek(offset)
        for record in _csv_records(io.TextIOWrapper(stream, encoding="utf-8", newline="")):
            yield dict(zip(names, record, strict=True))


def _csv_offsets(path: Path) -> Iterator[int]:
    """Where each row begins, in bytes: a quoted value may hold newlines, so the reader says where a row is over."""
    consumed = 0

    def counted(text: Iterable[str]) -> Iterator[str]:
        nonlocal consumed
        for line in text:
            bare = line if consumed else line.removeprefix("\ufeff")
            consumed += len(line) if line.isascii() else len(line.encode())
            yield bare

    with path.open(encoding="utf-8", newline="") as text:
        records = _csv_records(counted(text))
        names = next(records, [])
        repeated = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if repeated is not None:
            raise csv.Error(f"its header names {repeated!r} twice")
        begin = consumed
        for number, record in enumerate(records):
            if len(record) != len(names):
                raise csv.Error(f"row {number + 1} has {len(record)} values, the header {len(names)}")
            yield begin
            begin = consumed


def _csv_records(text: Iterable[str]) -> Iterator[list[str]]:
    """Records of a CSV file, without blank lines; they are read no further than they are asked for."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    return filter(None, csv.reader(text, strict=True))


def _detail(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _parse(line: bytes, path: str, row: int) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{path}, row {row + 1}: not JSON ({' '.join(str(error).split())}): write one object a line."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path}, row {row + 1}: {type(value).__name__} instead of an object: write one object a line.")
    return value
