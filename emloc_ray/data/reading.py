"""The user's rows, counted and read by row number, in streams.

Files are local or on an object store, where they are read by ranges and never kept whole.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from emloc_ray.data import text_rows
from emloc_ray.data.files import STORED_HEADER_BYTES, codec_of, delimiter_of, is_array, kind_of, open_file
from emloc_ray.data.text_rows import (
    BadText,
    Row,
    array_items,
    check_length,
    check_object,
    csv_offsets,
    csv_records,
    csv_row,
    lines,
    no_text,
    read_object,
    text_row,
)
from emloc_ray.errors import DataError
from emloc_ray.io.formats.arrow_schemas import open_parquet
from emloc_ray.io.runs.fingerprint import look_of
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.io.store.places import above, is_store_uri
from emloc_ray.io.store.stored_files import StoredFile, shown
from emloc_ray.text import one_line


class BadRow(Row):
    """A row that cannot be read; ``error`` says why."""

    def __init__(self, error: DataError) -> None:
        super().__init__()
        self.error = error


class Place(str):
    """A row's file and number, for errors; ``folder``: the file's, where the row's relative paths begin; ``row_format``:
    the format of the file's rows, where it is known."""

    folder: str
    row_format: str

    @classmethod
    def of(cls, source: SourceFile, row: int) -> Place:
        """The place of a row by its number, from 0."""
        made = cls(f"{source.name}, row {row + 1}")
        made.row_format = source.format
        made.folder = above(source.path, 1) if source.is_stored else str(Path(source.path).parent)
        return made


@contextlib.contextmanager
def value_errors(where: str) -> Iterator[None]:
    """Makes a DataError, naming file and row, of what a row's values bring the code inside to raise: a row may hold whatever a
    file can hold, and one that no check foresaw is a bad row like others."""
    try:
        yield
    except _BY_VALUES as error:
        raise DataError(f"{where}: its values cannot be read ({_named(error)}): fix the row.") from error


def _named(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 120)


Item = TypeVar("Item")
Result = TypeVar("Result")

_ROWS_PER_MARK = 1024
_ROWS_PER_BATCH = 256
BATCH_BYTES = 2**24  # of a Parquet file's rows, which may hold images
_BUFFER_BYTES = 2**18
# The bytes of one request to a store: more where a file is read through, fewer where single rows are read.
_STORED_SCAN_BYTES = 2**23
STORED_BUFFER_BYTES = 2**20
_CONNECTIONS = 8
# ValueError: also for a registered type with broken metadata.
_UNREADABLE = (OSError, pa.ArrowException, csv.Error, ValueError, RecursionError)
# RuntimeError: a RecursionError among them.
_BY_VALUES = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class SourceFile:
    """A file, by its path or its URI on an object store, and the number of its rows.

    ``marks`` are the byte offsets of every 1,024th row of a JSONL or CSV file, where reading can begin: 9,766 for 10⁷ rows.
    ``group_rows`` is the size of a Parquet file's largest row group, where alone reading can begin. ``version`` identifies a
    stored file's content; it is empty for a local file. ``images`` is a hash of the images that its first rows name: their
    names, and for local files their sizes and times. ``format`` is that of its rows, empty until its first ones were
    read. ``part``: the number of the place in a split's shares that names it. ``looked`` is what a local file was when it was
    counted.
    """

    path: str
    kind: str
    num_rows: int
    marks: tuple[int, ...] = ()
    group_rows: int = 1
    version: str = ""
    images: str = ""
    format: str = ""
    delimiter: str = ","
    part: int = 0
    looked: str = ""
    columns: tuple[str, ...] = ()

    @property
    def is_stored(self) -> bool:
        """Whether it is on an object store."""
        return is_store_uri(self.path)

    @property
    def name(self) -> str:
        """The file's name for errors: its path, or its URI without options."""
        return shown(self.path)


def each(function: Callable[[Item], Result], items: Sequence[Item], stored: bool) -> list[Result]:
    """The results of ``function`` for all items, in order; ``stored``: in threads, as every item waits for a store."""
    if not stored:
        return [function(item) for item in items]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(function, items))


def scan(path: Path | str, keep_bad: bool = False) -> SourceFile:
    """Counts a file's rows; ``keep_bad``: counts a CSV file's bad rows too, and takes a file without rows. Raises DataError where
    it is unreadable or empty, ArtifactError where its store does not answer."""
    if isinstance(path, Path):
        ensure(path)
    kind, place = kind_of(path), str(path)
    try:
        looked = look_of(path) if isinstance(path, Path) else ""
        with open_file(place, _STORED_SCAN_BYTES) as stream:
            version = getattr(stream.raw, "version", "")
            if kind == "parquet":
                with open_parquet(stream, shown(place)) as file:
                    metadata, names = file.metadata, tuple(file.schema_arrow.names)
                groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
                source = SourceFile(place, kind, metadata.num_rows, (), max(groups, default=1), version, columns=names)
            else:
                if problem := no_text(stream.peek(4)):
                    raise DataError(f"{shown(place)} is {problem}.")
                source = _counted(place, kind, stream, keep_bad, version)
    except _UNREADABLE as error:
        raise DataError(f"{shown(str(path))} cannot be read as {kind} ({one_line(error)}): fix the file.") from error
    if source.num_rows == 0 and not keep_bad:
        raise DataError(f"{source.name} is empty: give a file with rows.")
    return dataclasses.replace(source, looked=looked)


def _counted(place: str, kind: str, stream: io.BufferedReader, keep_bad: bool, version: str) -> SourceFile:
    """A text file with its rows counted, and marked where reading can begin there."""
    if kind == "jsonl" and is_array(place, stream):
        count = sum(1 for _ in array_items(stream, keep_bad))
        return SourceFile(place, "array", count, (), max(1, count), version)
    marks, count = [], 0
    delimiter = delimiter_of(place, stream) if kind == "csv" else ","
    of_lines = (offset for offset, _ in lines(stream))
    for offset in csv_offsets(stream, shown(place), keep_bad, delimiter) if kind == "csv" else of_lines:
        if count % _ROWS_PER_MARK == 0:
            marks.append(offset)
        count += 1
    # What is compressed is read from its beginning, wherever reading begins.
    whole = count if codec_of(place) else 1
    return SourceFile(place, kind, count, tuple(marks), max(1, whole), version, delimiter=delimiter)


def changed(source: SourceFile) -> DataError:
    """What is said of a file that is another than when its rows were counted."""
    return DataError(f"{source.name} was changed after its rows were counted: run the same command again.")


def read_rows(
    source: SourceFile,
    rows: Iterable[int],
    fields: Sequence[str] | None = None,
    extra: Sequence[str] = (),
    keep_bad: bool = False,
) -> Iterator[tuple[int, Row]]:
    """Yields ``(row number, row)`` for ascending row numbers from 0, in one stream.

    Reads only the columns ``fields`` and ``extra`` of a Parquet file that has all ``fields``. Holds a buffer, whatever the size
    of files, row groups and ``rows``. ``keep_bad``: a line that is no row comes as a :class:`BadRow`. Raises DataError, naming
    file and row.
    """
    if not source.is_stored:
        ensure(Path(source.path))
    if source.kind == "parquet":
        return _read_groups(source, rows, fields, extra, keep_bad)
    return _read_records(source, rows, keep_bad)


def _read_groups(
    source: SourceFile, rows: Iterable[int], fields: Sequence[str] | None, extra: Sequence[str], keep_bad: bool
) -> Iterator[tuple[int, Row]]:
    """Rows of Parquet files: reads the row groups that hold any, each as far as its last one."""
    start = stop = 0
    try:
        with _parquet(source) as (file, stream):
            names = file.schema_arrow.names
            wanted = [*(fields or ()), *(name for name in extra if name in names)]
            columns = wanted if fields and set(fields) <= set(names) else None
            groups = range(file.num_row_groups)
            ends = list(itertools.accumulate(file.metadata.row_group(group).num_rows for group in groups))
            for group, in_group in itertools.groupby(rows, functools.partial(bisect.bisect_right, ends)):
                if group == len(ends):
                    raise _shorter(source)
                metadata = file.metadata.row_group(group)
                start, stop = ends[group] - metadata.num_rows, ends[group]
                size = _rows_a_batch(metadata, columns, stream)
                batches = file.iter_batches(size, [group], columns, use_threads=False)
                for batch, begin, numbers in _batches_with(in_group, batches, start, source):
                    yield from zip(numbers, _python_rows(batch, begin, source, numbers, keep_bad), strict=True)
    except _UNREADABLE as error:
        raise _unreadable(source, f"rows {start + 1} to {stop}", error) from error


def _batches_with(
    rows: Iterator[int], batches: Iterable[pa.RecordBatch], begin: int, source: SourceFile
) -> Iterator[tuple[pa.RecordBatch, int, list[int]]]:
    """Those of consecutive batches that hold any of the ``rows``, each with the number of its first row and those rows; ``begin``
    is the first row of all."""
    row = next(rows, None)
    for batch in batches:
        numbers = []
        while row is not None and row < begin + batch.num_rows:
            numbers.append(row)
            row = next(rows, None)
        if numbers:
            yield batch, begin, numbers
        if row is None:
            return
        begin += batch.num_rows
    raise _shorter(source)


def _shorter(source: SourceFile) -> DataError:
    return DataError(f"{source.name} is shorter than when it was counted: run again.")


def _unreadable(source: SourceFile, where: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError) and not source.is_stored:
        return DataError(f"{source.name}: node {gethostname()} does not see it: put it where every node does.")
    return DataError(f"{source.name}, {where}: not readable as {source.kind} ({one_line(error)}): fix the file.")


def _rows_a_batch(group: pq.RowGroupMetaData, columns: Sequence[str] | None, stream: Any) -> int:
    """How many rows of a group are read at once: about :data:`BATCH_BYTES` of them. Rows may repeat a dictionary's values, of
    each column as many as make a value too long at most."""
    names = None if columns is None else tuple(f"{name}." for name in columns)
    every = (group.column(number) for number in range(group.num_columns))
    chunks = [chunk for chunk in every if names is None or f"{chunk.path_in_schema}.".startswith(names)]
    whole = sum(chunk.total_uncompressed_size for chunk in chunks)
    large = [chunk for chunk in chunks if chunk.total_uncompressed_size * _ROWS_PER_BATCH > text_rows.MAX_LINE_BYTES]
    most = [text_rows.MAX_LINE_BYTES // _dictionary_bytes(chunk, stream) for chunk in large]
    return max(1, min(_ROWS_PER_BATCH, BATCH_BYTES * group.num_rows // max(whole, 1), *most))


def _dictionary_bytes(chunk: pq.ColumnChunkMetaData, stream: Any) -> int:
    """The bytes of a column's dictionary, by the header of its first page: 1 where it has none. The header begins with the
    page's kind, 2 for a dictionary, and its size, each as a byte 0x15 and a zigzag varint (Thrift's compact protocol)."""
    stream.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
    head = stream.read(8)
    if not head.startswith(b"\x15\x04\x15"):
        return 1 if head.startswith(b"\x15") else int(chunk.total_uncompressed_size)
    size = 0
    for place, byte in enumerate(head[3:]):
        size |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return max(1, size >> 1)


def _python_rows(
    batch: pa.RecordBatch, begin: int, source: SourceFile, numbers: Sequence[int], keep_bad: bool
) -> Iterable[Row]:
    """The rows ``numbers`` of a batch that begins with row ``begin``.

    Converted one by one where the batch is large, or holds a value that Arrow does not check (text that is no UTF-8) or that
    Python lacks (a date after the year 9999).
    """
    with contextlib.suppress(*_BY_VALUES):
        if batch.nbytes <= min(2 * BATCH_BYTES, text_rows.MAX_LINE_BYTES):
            return batch.take(pa.array([number - begin for number in numbers])).to_pylist()
    return (_python_row(batch.slice(number - begin, 1), source, number, keep_bad) for number in numbers)


def _python_row(batch: pa.RecordBatch, source: SourceFile, row: int, keep_bad: bool) -> Row:
    values: Row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            check_length((column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).nbytes)
            values[name] = column[0].as_py()
        except BadText as error:
            return _bad(f"column {name!r} is {error}", source, row, keep_bad)
        except UnicodeDecodeError as error:
            return _bad(f"column {name!r} is not UTF-8 ({error.reason}): write it so", source, row, keep_bad)
        except _BY_VALUES as error:
            what = f"column {name!r} cannot be read ({_named(error)}): fix its value, or leave the column out"
            return _bad(what, source, row, keep_bad)
    return values


def _bad(what: str, source: SourceFile, row: int, keep_bad: bool) -> BadRow:
    bad = BadRow(DataError(f"{source.name}, row {row + 1}: {what}."))
    if not keep_bad:
        raise bad.error
    return bad


def _read_records(source: SourceFile, rows: Iterable[int], keep_bad: bool) -> Iterator[tuple[int, Row]]:
    """Rows of JSONL and CSV files: enters at the nearest mark where it is ahead, else reads on. A compressed file is entered
    once, as each entry decompresses all that is before it."""
    records: Iterator[Any] = iter(())
    position, row = -1, 0
    try:
        parse = _parser(source)
        for row in rows:
            mark = row // _ROWS_PER_MARK if source.marks else 0
            if position < 0 or (mark * _ROWS_PER_MARK > position and not codec_of(source.path)):
                records = _records(source, source.marks[mark] if source.marks else 0)
                position = mark * _ROWS_PER_MARK
            record = next(itertools.islice(records, row - position, None), None)
            if record is None:
                raise _shorter(source)
            try:
                values: Row = parse(record)
            except BadText as error:
                values = _bad(str(error), source, row, keep_bad)
            yield row, values
            position = row + 1
    except _UNREADABLE as error:
        raise _unreadable(source, f"row {row + 1}", error) from error


def _records(source: SourceFile, offset: int) -> Iterator[Any]:
    with _text(source, STORED_BUFFER_BYTES) as stream:
        if source.kind == "array":
            yield from array_items(stream, keep_bad=True)
            return
        is_csv = source.kind == "csv"
        for _, record in csv_records(stream, offset, source.delimiter) if is_csv else lines(stream, offset):
            yield record


def _parser(source: SourceFile) -> Callable[[Any], Row]:
    """The function that makes a row of a record; of a CSV file's by its header."""
    if source.kind != "csv":
        return {"array": check_object, "text": text_row, "jsonl": read_object}[source.kind]
    with _text(source, STORED_HEADER_BYTES) as stream:
        names = next(csv_records(stream, delimiter=source.delimiter), (0, []))[1]
    return functools.partial(csv_row, names)


def _check_version(source: SourceFile, stream: Any) -> None:
    """Raises DataError where a stored file that was opened is another than the one whose rows were counted."""
    if getattr(stream, "version", "") != source.version:
        raise changed(source)


@contextlib.contextmanager
def _text(source: SourceFile, stored_bytes: int) -> Iterator[io.BufferedReader]:
    with open_file(source.path, stored_bytes) as stream:
        _check_version(source, stream.raw)
        yield stream


@contextlib.contextmanager
def _parquet(source: SourceFile) -> Iterator[tuple[pq.ParquetFile, Any]]:
    """A Parquet file, buffered: so a row group is read page by page instead of by whole columns; and its bytes. Checks its schema
    each time, as a local file may have changed since it was counted."""
    size = STORED_BUFFER_BYTES if source.is_stored else _BUFFER_BYTES
    with StoredFile(source.path) if source.is_stored else pa.OSFile(source.path) as stream:
        _check_version(source, stream)
        with open_parquet(stream, source.name, buffer_size=size, pre_buffer=False) as file:
            yield file, stream
