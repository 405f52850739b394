"""Rows of JSON, CSV and text files: their offsets, their values, and the errors of each alone.

A line longer than :data:`MAX_LINE_BYTES` is a bad row; its rest is skipped. So is a row of a Parquet file with such a value.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from emloc_ray.errors import DataError

Row = dict[str, Any]

MAX_LINE_BYTES = 2**28  # an image of 128 MiB in base64, and half as much again
_MAX_CSV_FIELD = 2**31 - 1  # the csv module's own limit is 128 KiB
SKIP_BYTES = 2**20
ARRAY_BYTES = 2**18
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
# The marks that count outside JSON's strings, and inside.
_OUTSIDE, _INSIDE = re.compile(r'["\[\]{}]'), re.compile(r'"|\\.?', re.DOTALL)
_PARSE = json.JSONDecoder().raw_decode
_OPEN_QUOTE = "a quote is opened that is never closed"
_TOO_LONG = "\udcfftoo long"  # replaces a too long line of a CSV file; no UTF-8 decodes to it
_BOMS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),  # first: the one begins as UTF-16's does
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}

_NO_TEXT = {
    b"\x1f\x8b": "compressed by gzip: end its name in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard: end its name in .zst",
    b"PK\3\4": "a zip archive: unpack it",
    b"PAR1": "a Parquet file: end its name in .parquet",
}


class BadText(ValueError):
    """A row's text is no row; says why."""


def no_text(head: bytes) -> str | None:
    """What a file with this beginning is instead of text, and what to do; None where it may be UTF-8."""
    other = next((what for mark, what in _NO_TEXT.items() if head.startswith(mark)), None)
    encoding = None if other else other_encoding(head)
    return f"{encoding} text: save it as UTF-8" if encoding else other


def other_encoding(head: bytes) -> str | None:
    """The encoding of a text file with this beginning, where it is recognizable and not UTF-8."""
    encoding = next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)
    if encoding or b"\0" not in head[:4]:
        return encoding
    return "UTF-32" if b"\0\0" in head[:4] else "UTF-16"


def lines(stream: io.BufferedReader, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its offset, from ``offset`` on; only the beginning of a too long one."""
    stream.seek(offset)
    for line, size in _bounded(stream):
        if line.strip():
            yield offset, line
        offset += size


def read_object(line: bytes) -> Row:
    """The object that a line of a JSONL file holds; raises BadText where it holds none."""
    text = _decoded(line)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise BadText("JSON that is nested too deeply: write it flat") from error
    except ValueError as error:
        raise BadText(f"not JSON ({' '.join(str(error).split())}): write one object a line") from error
    return check_object(value)


def check_object(value: Any) -> Row:
    """The value itself; raises BadText where it is no object, or is that itself."""
    if isinstance(value, BadText):
        raise value
    if not isinstance(value, dict):
        raise BadText(f"{type(value).__name__} instead of an object: write one object a line")
    return value


def text_row(line: bytes) -> Row:
    """A line of a text file as a row; raises BadText where it is not UTF-8."""
    return {"text": _decoded(line).rstrip("\r\n")}


def check_length(size: int) -> None:
    """Raises BadText for a line or a value of more than :data:`MAX_LINE_BYTES`."""
    if size > MAX_LINE_BYTES:
        raise BadText(f"longer than {MAX_LINE_BYTES} bytes: split it")


def _decoded(line: bytes) -> str:
    check_length(len(line))
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText(_not_utf8(line[error.start], error.start)) from error


def array_items(stream: io.BufferedReader, keep_bad: bool = False) -> Iterator[Any]:
    """The values in the one JSON array of a file; holds one of them, and a piece of the file.

    ``keep_bad``: gives BadText, not raised, for an object that is no JSON, not UTF-8 or too long and whose brackets still say
    where it ends. Raises ValueError where it is no JSON; what comes after that cannot be found.
    """
    stream.seek(0)
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    text, at, size, ended = "", 0, ARRAY_BYTES, False
    place = "["  # what comes next: the array's beginning, a value or its end, or what is between two values
    number = 0
    while True:
        at = _JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
        if at < len(text) and place == "[":
            at, place = at + 1, "value or ]"
            continue
        if at < len(text) and place == ", or ]" and text[at] == ",":
            at, place = at + 1, "value"
            continue
        if at < len(text) and text[at] == "]" and place != "value":
            while not (rest := text[at + 1 :].strip()) and (more := stream.read(ARRAY_BYTES)):
                text, at = decode(more), -1
            if rest:
                raise ValueError(f"there is more after the ] of element {number}")
            return
        try:
            if place == ", or ]" or at == len(text):
                raise json.JSONDecodeError(f"expected {place}", text, at)
            value, at = _array_value(text, at)
        except (ValueError, RecursionError) as error:
            is_long = len(text) - at > MAX_LINE_BYTES
            if not (ended or is_long or (at < len(text) and place == ", or ]")):
                more = stream.read(size)
                text, at, ended, size = text[at:] + decode(more, not more), 0, not more, 2 * size
                continue
            pieces = (decode(more) for more in iter(lambda: stream.read(SKIP_BYTES), b""))
            passed = _past(text, at, pieces) if is_long and text.startswith("{", at) else None
            if passed is None:
                raise ValueError(f"element {number + 1}: {_why(error)}") from error
            value, (text, at) = BadText(f"longer than {MAX_LINE_BYTES} bytes: split it"), passed
        if isinstance(value, BadText) and not keep_bad:
            raise ValueError(f"element {number + 1}: {value}")
        yield value
        number, place, size = number + 1, ", or ]", ARRAY_BYTES


def _array_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at ``at``, or BadText, and where it ends; raises where it is not all there, or has no end."""
    try:
        value, end = _PARSE(text, at)
    except (ValueError, RecursionError) as error:  # also of a number of more digits than Python reads
        passed = _past(text, at, iter(())) if text.startswith("{", at) else None
        if passed is None:
            raise
        return BadText(f"not JSON ({_why(error)}): correct it"), passed[1]
    try:
        text[at:end].encode()
    except UnicodeEncodeError as error:
        return BadText(_not_utf8(ord(text[at + error.start]) & 0xFF, error.start)), end
    return value, end


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def _past(text: str, at: int, pieces: Iterator[str]) -> tuple[str, int] | None:
    """The piece of a text in which the object at ``at`` ends, and where; holds one piece of ``pieces``, which follow. None
    where it has no end."""
    depth, is_inside = 0, False
    while True:
        while mark := (_INSIDE if is_inside else _OUTSIDE).search(text, at):
            at = mark.end()
            if mark[0] == '"':
                is_inside = not is_inside
            elif not is_inside:
                depth += 1 if mark[0] in "{[" else -1
                if depth == 0:
                    return text, at
            elif mark[0] == "\\":  # the piece ends inside an escape
                break
        rest = "\\" if mark else ""
        piece = next(pieces, None)
        if piece is None:
            return None
        text, at = rest + piece, 0


def csv_records(stream: io.BufferedReader, offset: int = 0, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file that are not blank, each with its offset; reads no further than asked. A quoted value may hold
    newlines: the csv module finds a record's end. Raises csv.Error where it has none, as with a quote that is never closed: where
    the next record begins is not known then."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    stream.seek(offset)
    begin = consumed = offset
    held, ended = 0, False

    def parts() -> Iterator[str]:
        nonlocal consumed, held, ended
        for line, size in _bounded(stream):
            # As with newline="": a lone carriage return ends a line too.
            for part in [line] if size > MAX_LINE_BYTES else line.splitlines(keepends=True):
                bare = part.removeprefix(codecs.BOM_UTF8) if consumed == 0 else part
                text = f"{_TOO_LONG}\n" if size > MAX_LINE_BYTES else bare.decode("utf-8", "surrogateescape")
                consumed += size if size > MAX_LINE_BYTES else len(part)
                held += len(text)
                if held > MAX_LINE_BYTES:
                    raise csv.Error(f"longer than {MAX_LINE_BYTES} bytes, or {_OPEN_QUOTE}")
                yield text
        ended = True

    try:
        for record in csv.reader(parts(), delimiter=delimiter, strict=True):
            if record:
                yield begin, record
            begin, held = consumed, 0
    except csv.Error as error:
        raise csv.Error(f"{_OPEN_QUOTE if ended else error} (from byte {begin} on): correct its quotes") from error


def csv_offsets(stream: io.BufferedReader, name: str, keep_bad: bool, delimiter: str) -> Iterator[int]:
    """Where each row begins, in bytes. Raises DataError, naming the row, where the rows after it cannot be told apart."""
    names: list[str] = []
    row = -1  # the header
    try:
        for row, (offset, record) in enumerate(csv_records(stream, delimiter=delimiter)):
            if row == 0:
                names = record
                _check_header(names)
                continue
            if not keep_bad:
                csv_row(names, record)
            yield offset
    except BadText as error:
        raise DataError(f"{name}, {f'row {row}' if row else 'header'}: {error}.") from error
    except csv.Error as error:
        raise DataError(f"{name}, {f'row {row + 1}' if row >= 0 else 'header'}: {error}.") from error


def _check_header(names: Sequence[str]) -> None:
    repeated = next((column for place, column in enumerate(names) if column in names[:place]), None)
    if repeated is not None:
        raise BadText(f"it names {repeated!r} twice: rename one")
    csv_row(names, names)


def csv_row(names: Sequence[str], record: Sequence[str]) -> Row:
    """A record as a dict by the header's names, all values text (007 is no number); raises BadText for a bad one."""
    if any(_TOO_LONG in value for value in record):
        raise BadText(f"longer than {MAX_LINE_BYTES} bytes: split it")
    for value in record:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadText(_not_utf8(ord(value[error.start]) & 0xFF, error.start)) from error
    if len(record) != len(names):
        raise BadText(f"{len(record)} values under a header of {len(names)}: quote those that hold commas")
    return dict(zip(names, record, strict=True))


def _not_utf8(byte: int, place: int) -> str:
    return f"not UTF-8 (byte {byte:#04x} at {place}; Latin-1, perhaps): save the file as UTF-8"


def _bounded(stream: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    """Lines with their sizes; of a too long one the first ``MAX_LINE_BYTES + 1`` bytes."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        size = len(line)
        rest = line
        while size > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
            rest = stream.readline(SKIP_BYTES)
            size += len(rest)
        yield line, size
