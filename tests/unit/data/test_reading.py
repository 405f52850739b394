"""Rows by number, from the three kinds of files, against what Python's own readers say; errors name file and row."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from socket import gethostname
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data.files import list_files
from emloc_ray.data.reading import read_rows, scan, value_errors
from emloc_ray.data.source_versions import fingerprint_sources
from emloc_ray.errors import DataError

Row = dict[str, Any]


def rows_of(count: int) -> list[Row]:
    return [{"prompt": f"p{i}", "completion": f"c{i}\nand ü"} for i in range(count)]


def write_jsonl(path: Path, rows: list[Row], blank_every: int = 0) -> Path:
    with path.open("w") as file:
        for number, row in enumerate(rows):
            if blank_every and number % blank_every == 0:
                file.write("\n   \n")
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def write_parquet(path: Path, rows: list[Row], group: int = 7) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_csv(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet, ".csv": write_csv}


@pytest.mark.parametrize("suffix", WRITERS)
@given(st.data())
def test_any_ascending_rows(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject) -> None:
    rows = rows_of(data.draw(st.integers(1, 40), "rows"))
    source = scan(WRITERS[suffix](tmp_path_factory.mktemp("r") / f"a{suffix}", rows))
    assert source.num_rows == len(rows)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1), "wanted"))
    assert list(read_rows(source, wanted)) == [(number, rows[number]) for number in wanted]


@pytest.mark.parametrize("blank_every", [0, 1, 3])
@pytest.mark.parametrize("last_newline", [True, False])
def test_jsonl_of_many_lines_by_random_access(tmp_path: Path, blank_every: int, last_newline: bool) -> None:
    rows = rows_of(3000)
    path = write_jsonl(tmp_path / "a.jsonl", rows, blank_every)
    if not last_newline:
        path.write_text(path.read_text().rstrip("\n"))
    source = scan(path)
    assert source.num_rows == 3000
    assert len(source.marks) == 3
    wanted = [0, 1, 1023, 1024, 1025, 2047, 2048, 2999]
    assert list(read_rows(source, wanted)) == [(number, rows[number]) for number in wanted]
    assert [row for _, row in read_rows(source, range(3000))] == rows


def test_jsonl_reads_only_what_is_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(2000))
    lines = path.read_text().splitlines(keepends=True)
    lines[5] = "not json\n"  # before the mark of row 1024, and in another block than asked
    path.write_text("".join(lines))
    assert len(list(read_rows(scan(path), [1024, 1999]))) == 2


def test_parquet_keeps_nested_values_and_row_groups(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"m{i}"}] * (i % 3)} for i in range(20)]
    source = scan(write_parquet(tmp_path / "a.parquet", rows, group=6))
    wanted = [0, 5, 6, 12, 19]
    assert list(read_rows(source, wanted)) == [(number, rows[number]) for number in wanted]


def test_parquet_reads_the_fields_alone_where_all_are_there(tmp_path: Path) -> None:
    source = scan(write_parquet(tmp_path / "a.parquet", [{"text": "t", "image": "i"}]))
    assert list(read_rows(source, [0], ["text"])) == [(0, {"text": "t"})]
    assert list(read_rows(source, [0], ["text", "other"])) == [(0, {"text": "t", "image": "i"})]


@pytest.mark.slow
def test_one_huge_row_group_is_read_in_parts(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": f"{i} " * 500} for i in range(40_000)], group=40_000)
    source = scan(path)
    assert source.group_rows == 40_000
    before = pa.total_allocated_bytes()
    peak = 0
    for number, row in read_rows(source, range(3, 40_000, 2)):
        assert row["text"].startswith(f"{number} ")
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 2**24  # of 115 MB


def test_csv_with_quoted_newlines_commas_and_quotes(tmp_path: Path) -> None:
    rows = [{"prompt": 'two\nlines, a comma and "quotes"', "completion": "x\n\ny"}] * 3
    source = scan(write_csv(tmp_path / "a.csv", rows))
    assert source.num_rows == 3
    assert list(read_rows(source, [1, 2])) == [(1, rows[1]), (2, rows[2])]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_of_many_rows_by_random_access(tmp_path: Path, bom: bytes, newline: str) -> None:
    rows = [{"prompt": f'"p"\n\n{i}, ü', "completion": f"c{i}{newline}\u2028"} for i in range(3000)]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=newline, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        for row in rows:
            file.write(newline)
            writer.writerow(row)
    path.write_bytes(bom + path.read_bytes())
    source = scan(path)
    assert (source.num_rows, len(source.marks)) == (3000, 3)
    wanted = [0, 1, 1023, 1024, 1025, 2047, 2048, 2999]
    assert list(read_rows(source, wanted)) == [(number, rows[number]) for number in wanted]
    assert [row for _, row in read_rows(source, range(3000))] == rows


def test_csv_values_longer_than_the_csv_module_takes_by_itself(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 200_000, "completion": "y"}]
    assert [row for _, row in read_rows(scan(write_csv(tmp_path / "a.csv", rows)), [0])] == rows


def test_csv_is_text_throughout(tmp_path: Path) -> None:
    rows = [{"prompt": "how many", "completion": value} for value in ("007", "1.50", "true", "NA", "2024-01-01", "")]
    assert [row for _, row in read_rows(scan(write_csv(tmp_path / "a.csv", rows)), range(6))] == rows
    numbers = [{"prompt": "how many", "completion": value} for value in ("007", "3")]
    assert [row for _, row in read_rows(scan(write_csv(tmp_path / "b.csv", numbers)), range(2))] == numbers


# Errors: which file, which row.


@pytest.mark.parametrize(
    ("line", "complaint"), [("{not json}", "not JSON"), ("[1, 2]", "list instead of an object"), ('"x"', "str instead")]
)
def test_bad_jsonl_row(tmp_path: Path, line: str, complaint: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(1100), blank_every=2)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=complaint) as caught:
        list(read_rows(scan(path), range(1101)))
    assert str(caught.value).startswith(f"{path}, row 1101: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_that_is_not_on_this_node(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"a{suffix}", rows_of(3))
    source = scan(path)
    path.unlink()
    with pytest.raises(DataError) as error:
        list(read_rows(source, [0]))
    assert str(error.value) == f"{path}: node {gethostname()} does not see it: put it where every node does."


def test_a_file_that_shrank(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows_of(10))
    source = scan(path)
    write_jsonl(path, rows_of(5))
    with pytest.raises(DataError, match="shorter than when it was counted") as caught:
        list(read_rows(source, [7]))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    with pytest.raises(DataError) as caught:
        scan(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_file_with_no_rows_but_a_header(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("prompt,completion\n")
    else:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="is empty"):
        scan(path)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("a.parquet", b"not parquet at all", " cannot be read as parquet "),
        ("a.csv", b"prompt,compl\xe9tion\na,b\n", r", header: not UTF-8 \(byte 0xe9 at 5"),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"a.*{complaint}") as caught:
        scan(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows_of(50), group=10)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    source = scan(path)  # the footer is whole
    with pytest.raises(DataError, match="rows 1 to 10: not readable as parquet") as caught:
        list(read_rows(source, [0, 1, 2]))
    assert str(caught.value).startswith(str(path))


# Which files.


def test_directories_globs_and_lists(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    one, two = tmp_path / "b.jsonl", tmp_path / "deep" / "a.csv"
    for path in (one, two, tmp_path / "README.md"):
        path.write_text("x")
    assert list_files(str(tmp_path), "k") == [one, two]
    assert list_files(f"file://{one}", "k") == [one]
    assert list_files(str(tmp_path / "**" / "*.csv"), "k") == [two]
    assert list_files([str(two), str(one)], "k") == [two, one]
    assert list_files([str(tmp_path), str(one)], "k") == [one, two]  # each once, or its copy could be held out
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "b-checkpoint.jsonl").write_text("x")
    assert list_files(str(tmp_path), "k") == [one, two]


def test_a_directory_s_linked_folders_are_read_once_each(tmp_path: Path) -> None:
    inside, elsewhere, old = tmp_path / "data" / "b", tmp_path / "elsewhere", tmp_path / "data" / ".old"
    for folder in (inside, elsewhere, old):
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text("x")
    for link, target in ((inside / "up", tmp_path / "data"), (inside / "part", elsewhere), (old / "b", inside)):
        link.symlink_to(target)
    for name in ("a", "c"):
        (tmp_path / "data" / name).symlink_to(inside)
    assert list_files(str(tmp_path / "data"), "k") == [inside / "part" / "x.jsonl", inside / "x.jsonl"]


@pytest.mark.parametrize("pattern", ["absent.jsonl", "*.parquet", "empty"])
def test_nothing_found(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.train\.path") as caught:
        list_files(str(tmp_path / pattern), "data.train.path")
    assert str(tmp_path / pattern) in str(caught.value)


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"ends in \.xlsx.*\.jsonl"):
        list_files(str(tmp_path / "a.xlsx"), "data.train.path")


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,prompt\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv, header: it names 'prompt' twice: rename one\."):
        scan(path)


def test_what_no_check_foresaw_is_told_with_its_place() -> None:
    sentence = r"^a, row 3: its values cannot be read \(KeyError: 'role'\): fix the row\.$"
    with pytest.raises(DataError, match=sentence), value_errors("a, row 3"):
        raise KeyError("role")
    with pytest.raises(OSError, match="disk"), value_errors("a, row 3"):  # is no row's
        raise OSError("disk")


def test_a_file_that_moves_to_another_share_of_a_split_is_another_content(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / name, rows_of(2)) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    one, two, three = (scan(path) for path in paths)
    two_b, three_b = (dataclasses.replace(source, part=1) for source in (two, three))
    assert fingerprint_sources([one, two, three_b]) != fingerprint_sources([one, two_b, three_b])
