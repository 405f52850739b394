"""Kinds of files: what each holds, whatever packs it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from emloc_ray.data.files import list_files
from emloc_ray.data.reading import SourceFile, read_rows, scan
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
        ('[{"a": 1}, {"b": }]', "element 2: Expecting value"),
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
