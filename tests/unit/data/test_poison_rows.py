"""Rows made to stop a reader, in every kind of file: named by file and row, or left out where bad rows are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_server import uri
from small_runs import task_rows, write_jsonl

from emloc_ray.data import text_rows
from emloc_ray.data.reading import BadRow, read_rows, scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.tokenizing import ShardTokenizer, TokenizeOptions, shard_units
from emloc_ray.errors import DataError
from emloc_ray.io.store.object_store import ObjectStore

GOOD = [{"prompt": f"p{number}", "completion": "c ü"} for number in range(1100)]
BAD = 1050  # behind the second mark: it is read from a place of its own, too


def jsonl(bad: bytes) -> bytes:
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in GOOD]
    return b"\n".join([*rows[:BAD], bad, *rows[BAD + 1 :]]) + b"\n"


def csv(bad: bytes) -> bytes:
    rows = [f"{row['prompt']},{row['completion']}".encode() for row in GOOD]
    return b"\n".join([b"prompt,completion", *rows[:BAD], bad, *rows[BAD + 1 :]]) + b"\n"


def broken_text(texts: list[bytes]) -> pa.Array:
    """A column of text, whatever its bytes are."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


def parquet(path: Path, nested: bool) -> None:
    texts = [row["completion"].encode() for row in GOOD]
    texts[BAD] = b"caf\xe9"
    column = broken_text(texts)
    if nested:
        column = pa.StructArray.from_arrays([column], ["text"])
    pq.write_table(
        pa.table({"prompt": [row["prompt"] for row in GOOD], "completion": column}), path, row_group_size=500
    )


NESTED = b"[" * 100_000 + b"]" * 100_000
POISON = [
    ("a.jsonl", jsonl(b'{"prompt": ' + NESTED + b"}"), "JSON that is nested too deeply"),
    ("a.jsonl", jsonl(b'{"a":' * 100_000), "JSON that is nested too deeply"),
    (
        "a.jsonl",
        jsonl(b'{"prompt": "caf\xe9", "completion": "c"}'),
        r"not UTF-8 .byte 0xe9 at 15; Latin-1, perhaps.: save",
    ),
    ("a.jsonl", jsonl(b'{"prompt": "\xed\xa0\x80", "completion": "c"}'), "not UTF-8"),
    ("a.jsonl", jsonl(b'{"prompt": ' + b"9" * 5000 + b"}"), "not JSON"),
    ("a.jsonl", jsonl(b'{"prompt": "' + b"x" * 70_000 + b'", "completion": "c"}'), "longer than 65536 bytes: split it"),
    ("a.csv", csv(b"a,b,c"), "3 values under a header of 2"),
    ("a.csv", csv(b"a"), "1 values under a header of 2"),
    ("a.csv", csv(b"caf\xe9,b"), r"not UTF-8 .byte 0xe9 at 3; Latin-1, perhaps.: save"),
    ("a.csv", csv(b"x" * 70_000 + b",b"), "longer than 65536 bytes: split it"),
    ("a.csv", csv(b"a," + b"x" * 2_200_000), "longer than 65536 bytes: split it"),
]


@pytest.fixture(autouse=True)
def _short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 2**16)


def written(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    if content.count(b"[") > 1000 or content.count(b'{"a":') > 1000:  # which are longer than the lines of these tests
        monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 2**20)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("name", "content", "complaint"), POISON)
def test_a_poison_row_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, complaint: str
) -> None:
    path = written(tmp_path / name, content, monkeypatch)
    with pytest.raises(DataError, match=complaint) as caught:
        list(read_rows(scan(path), range(len(GOOD))))
    assert str(caught.value).startswith(f"{path}, row {BAD + 1}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("name", "content", "complaint"), POISON)
@pytest.mark.parametrize("begin", [0, 1040])
def test_a_poison_row_alone_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, complaint: str, begin: int
) -> None:
    source = scan(written(tmp_path / name, content, monkeypatch), keep_bad=True)
    assert (source.num_rows, len(source.marks)) == (len(GOOD), 2)
    rows = dict(read_rows(source, range(begin, len(GOOD)), keep_bad=True))
    assert isinstance(rows[BAD], BadRow)
    assert all(rows[number] == GOOD[number] for number in rows if number != BAD)


@pytest.mark.parametrize("nested", [False, True])
def test_text_of_a_parquet_file_that_is_not_utf8(tmp_path: Path, nested: bool) -> None:
    parquet(tmp_path / "a.parquet", nested)
    source = scan(tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        list(read_rows(source, range(len(GOOD))))
    assert str(caught.value).startswith(f"{source.path}, row {BAD + 1}: column 'completion' is not UTF-8 (")
    rows = dict(read_rows(source, range(len(GOOD)), keep_bad=True))
    assert isinstance(rows.pop(BAD), BadRow)
    assert len(rows) == len(GOOD) - 1
    assert all(row["prompt"] == f"p{number}" for number, row in rows.items())


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_files_of_other_encodings_say_which(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes((jsonl(b"{}") if suffix == ".jsonl" else csv(b"a,b")).decode().encode(encoding))
    with pytest.raises(DataError) as caught:
        scan(path, keep_bad=True)
    assert str(caught.value) == f"{path} is {encoding[:6].upper()} text: save it as UTF-8."


def test_a_quote_that_is_never_closed_is_not_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv(b'"a,b') + b"a,b\n" * 30_000)
    with pytest.raises(DataError, match=r"the row at byte \d+ is longer than 65536 bytes, or a quote is open"):
        scan(path, keep_bad=True)


def test_a_csv_of_carriage_returns_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\ra,b\r\rc,"d\re"\r')
    assert [row for _, row in read_rows(scan(path), range(2))] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": "d\re"},
    ]


def test_a_long_line_of_a_store_is_passed_over(s3_port: int) -> None:
    root = uri(s3_port, "poison")
    ObjectStore(root, "data").write("a.jsonl", jsonl(b"x" * 3_000_000))
    source = scan(root.replace("?", "/a.jsonl?", 1))
    rows = dict(read_rows(source, range(1040, len(GOOD)), keep_bad=True))
    assert [number for number, row in rows.items() if isinstance(row, BadRow)] == [BAD]


def test_poison_rows_are_counted(tmp_path: Path, tiny_model_dir: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", task_rows(20))
    lines = path.read_bytes().splitlines()
    lines[3], lines[7] = b'{"prompt": "caf\xe9"}', b"x" * 70_000
    path.write_bytes(b"\n".join(lines))
    rows = RowSelection.all_rows([scan(path)])
    options = TokenizeOptions(str(tiny_model_dir("llama")), "prompt_completion", 64, skip_bad_rows=True)
    (tmp_path / "out" / "train").mkdir(parents=True)
    [unit] = shard_units("train", rows, 32)
    told = ShardTokenizer(options, {"train": rows}, tmp_path / "out")({"unit": [json.dumps(unit)]})
    assert (told["skipped_rows"].tolist(), told["rows"].tolist()) == ([2], [18])
