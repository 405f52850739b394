"""Checks of the data's files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError, DataError
from emloc_ray.planning import data_checks


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(count)))
    return path


def test_the_same_files_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tasks may have the same rows; changed ones are counted anew."""
    counted, scanning = [], data_checks.scan
    monkeypatch.setattr(data_checks, "scan", lambda place, **how: counted.append(place) or scanning(place, **how))
    path = write_rows(tmp_path / "a.jsonl", 5)
    values = {"run_dir": str(tmp_path / "run"), "model": {"source": "unused"}, "data": {"train": {"path": str(path)}}}
    config = parse_config(values)
    first, again = (data_checks.check_split(config, "train", False) for _ in range(2))
    assert first is again
    assert len(counted) == 1
    write_rows(path, 6)
    assert [source.num_rows for source in data_checks.check_split(config, "train", False)] == [6]


def test_a_mapped_column_is_there_where_any_file_of_any_split_has_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 5)
    pq.write_table(pa.table({"text": ["a"], "functions": ["b"]}), tmp_path / "a.parquet")

    def check(column: str) -> None:
        data = {"train": f"{tmp_path}/a.jsonl", "eval": f"{tmp_path}/a.parquet", "columns": {"tools": column}}
        config = parse_config({"run_dir": "run", "model": "unused", "data": {**data, "format": "text"}})
        files = {name: data_checks.check_split(config, name, False) for name in ("train", "eval")}
        data_checks.check_columns(config.data, files)

    check("functions")
    with pytest.raises(ConfigError, match=r"data\.columns\.tools names 'function', .* they have \(functions, text\)"):
        check("function")


def test_a_file_has_one_share_of_a_mixture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", 5)
    every, one = f"{tmp_path}/*.jsonl", f"{tmp_path}/b.jsonl"
    config = parse_config({"run_dir": "run", "model": "unused", "data": {"train": {"path": {every: 1, one: 3}}}})
    with pytest.raises(ConfigError) as error:
        data_checks.check_split(config, "train", False)
    assert str(error.value) == f"data.train.path: both {every} and {one} name {one}: give each file one share."


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of files, all but one without rows, as Spark writes empty partitions."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write_rows(folder / "a.jsonl", 0)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "b.parquet")
    (folder / "c.csv").write_text("text\n")
    write_rows(folder / "d.jsonl", 5)
    return folder


def test_files_without_rows_are_skipped_as_bad_rows_are(parts: Path) -> None:
    def checked(on_error: str) -> list[tuple[str, int]]:
        data = {"train": str(parts), "on_error": on_error}
        files = data_checks.check_split(
            parse_config({"run_dir": "run", "model": "unused", "data": data}), "train", False
        )
        return [(Path(source.path).name, source.num_rows) for source in files]

    assert checked("skip") == [("d.jsonl", 5)]
    with pytest.raises(DataError, match=r"a\.jsonl is empty"):
        checked("fail")
    (parts / "d.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl is empty: give a file with rows"):
        checked("skip")


def test_a_share_is_of_rows(parts: Path) -> None:
    place = f"{parts}/[ab].*"
    data = {"train": {"path": {place: 1, f"{parts}/d.jsonl": 3}}, "on_error": "skip"}
    with pytest.raises(ConfigError, match=r"data\.train\.path: every file of .* is empty: give files with rows"):
        data_checks.check_split(parse_config({"run_dir": "run", "model": "unused", "data": data}), "train", False)
