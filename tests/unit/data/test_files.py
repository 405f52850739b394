"""Kinds of files: what each holds, whatever packs it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from emloc_ray.data import reading
from emloc_ray.data.files import list_files, open_file
from emloc_ray.data.reading import BadRow, SourceFile, read_rows, scan
from emloc_ray.errors import DataError

ROWS = [{"prompt": f"ä {i}, ", "completion": f"[{i}] " + "x" * (i % 7)} for i in range(3000)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in ROWS)
CONTENTS = {
    "a.jsonl": JSONL,
    "a.json": json.dumps(ROWS, indent=1),
    "bom.json": "\ufeff \n" + json.dumps(ROWS, ensure_ascii=False),
    "a.csv": CSV,
    "a.tsv": CSV.replace('","', '"\t"').replace("prompt,", "prompt\t"),
    "semicolons.csv": CSV.replace('","', '";"').replace("prompt,", "prompt;"),
}


def packed(path: Path, content: str, codec: str) -> Path:
    raw = content.encode()
    if codec == ".zst":
        path.write_bytes(pa.compress(raw, codec="zstd", asbytes=True))
    else:
        path.write_bytes(gzip.compress(raw[:70_000]) + gzip.compress(raw[70_000:]) if codec == ".gz" else raw)
    return path


def rows_of(source: SourceFile, numbers: list[int]) -> list[dict[str, object]]:
    return [row for _, row in read_rows(source, numbers)]


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENTS)
def test_rows_are_the_same_in_every_kind_of_file(tmp_path: Path, name: str, codec: str) -> None:
    [path] = list_files(str(packed(tmp_path / (name + codec), CONTENTS[name], codec)), "data.train.path")
    source = scan(path)
    assert source.num_rows == len(ROWS)
    assert rows_of(source, list(range(len(ROWS)))) == ROWS
    far = [3, 1500, 2999]  # entered at a mark where that can be
    assert rows_of(source, far) == [ROWS[number] for number in far]


def test_a_compressed_file_is_opened_once_for_rows_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = scan(packed(tmp_path / "a.jsonl.gz", JSONL, ".gz"))
    opened: list[str] = []
    monkeypatch.setattr(reading, "open_file", lambda path, size: (opened.append(path), open_file(path, size))[-1])
    assert rows_of(source, [0, 1500, 2999]) == [ROWS[0], ROWS[1500], ROWS[2999]]
    assert len(opened) == 1


def test_a_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.txt", "\ufeffone\r\n\n two\n", "")
    assert rows_of(scan(path), [0, 1]) == [{"text": "one"}, {"text": " two"}]
    assert list_files(str(path), "k") == [path]
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert list_files(str(tmp_path), "k") == [tmp_path / "b.jsonl"]  # a directory's README.txt holds no rows


def test_a_large_element_spans_pieces_of_the_file(tmp_path: Path) -> None:
    rows = [{"text": "é" * 400_000}, {"text": "b"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    assert rows_of(scan(path), [0, 1]) == rows


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('[{"a": 1}, {"b": }]', "element 2: not JSON (Expecting value): correct it"),
        ('[{"a": 1}, {"b": "c}]', "element 2: Unterminated string"),
        ('[{"a": 1}, {"b": 1}}, {"c": 1}]', "element 3: expected , or ]"),
        ('[{"a": 1}] {"b": 2}', "there is more after the ] of element 1"),
        ('[{"a": 1}', "element 2: expected , or ]"),
        ('[{"a": 1} {"b": 2}]', "element 2: expected , or ]"),
        ('[{"a": 1},]', "element 2: Expecting value"),
        ("[]", "is empty"),
    ],
)
def test_a_broken_array_is_told_by_its_element(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        scan(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (b'{"a": }', "not JSON (Expecting value): correct it"),
        (b"{'a': 1}", "not JSON (Expecting property name enclosed in double quotes): correct it"),
        (b'{"a": "x\ny", "b": "}, {"}', "not JSON (Invalid control character at): correct it"),
        (b'{"a": "\\"]" "b": [1, {}]}', "not JSON (Expecting ',' delimiter): correct it"),
        (b'{"a": "caf\xe9"}', "not UTF-8 (byte 0xe9 at 10; Latin-1, perhaps): save the file as UTF-8"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON (a number has too many digits): correct it"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON (nested too deeply): correct it"),
        (b'{"a": ' + b'"\\\\x"' * 100_000 + b"}", "not JSON (Expecting ',' delimiter): correct it"),
    ],
)
def test_a_broken_element_whose_brackets_close_is_one_row(tmp_path: Path, broken: bytes, complaint: str) -> None:
    path, rows = tmp_path / "a.json", [{"a": n, "b": [{"c": "]"}]} for n in range(3)]
    first, *others = (json.dumps(row).encode() for row in rows)
    path.write_bytes(b"[" + b",\n".join([first, broken, *others]) + b"]\n")
    with pytest.raises(DataError, match=r"a\.json cannot be read as jsonl \(element 2: not "):
        scan(path)
    source = scan(path, keep_bad=True)
    read = dict(read_rows(source, range(source.num_rows), keep_bad=True))
    bad = read.pop(1)
    assert isinstance(bad, BadRow)
    assert str(bad.error) == f"{path}, row 2: {complaint}."
    assert list(read.values()) == rows


def test_what_is_no_object_is_told_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 3]')
    with pytest.raises(DataError, match=r"a\.json, row 2: int instead of an object"):
        rows_of(scan(path), [0, 1])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_what_is_not_compressed_as_it_says_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(DataError, match=f"{name} cannot be read as jsonl"):
        scan(tmp_path / name)


def test_a_missing_relative_path_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        list_files("rows.jsonl", "data.train.path")
    assert f"data.train.path: rows.jsonl names no file in {tmp_path}: give a .jsonl" in str(caught.value)


def test_what_datasets_writes_about_rows_is_none(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "state.json", "dataset_infos.json"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert list_files(str(tmp_path), "data.train.path") == [tmp_path / "rows.jsonl", tmp_path / "state.json"]
    (tmp_path / "dataset_info.json").write_text("{}")
    assert list_files(str(tmp_path), "data.train.path") == [tmp_path / "rows.jsonl"]
    assert list_files(str(tmp_path / "state.json"), "data.train.path") == [tmp_path / "state.json"]
    (tmp_path / "rows.jsonl").rename(tmp_path / "data-00000-of-00001.arrow")
    with pytest.raises(DataError, match=rf"or a glob, or hf:{tmp_path} for what datasets saved there\.$"):
        list_files(str(tmp_path), "data.train.path")
    with pytest.raises(DataError, match=r"ends in \.arrow: give .*, or hf:FOLDER for a folder that datasets saved"):
        list_files(str(tmp_path / "data-00000-of-00001.arrow"), "data.train.path")
