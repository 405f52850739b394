"""Lines of JSON, some of them left unfinished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faulting.s3 import uri

from emloc_ray.io.formats.json_lines import append_line, append_object, end_last_line, keep_objects, read_objects
from emloc_ray.io.store.node_cache import ensure, mirror, publish


@pytest.mark.parametrize("cut", range(len('{"step": 2}\n')))
def test_what_follows_a_line_that_was_cut_anywhere_stays_readable(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + '{"step": 2}\n'[:cut])
    end_last_line(path)
    with path.open("a") as file:
        file.write(json.dumps({"step": 3}) + "\n")
    found = [line["step"] for line in read_objects(path.read_bytes())]
    assert found == ([1, 2, 3] if cut == 11 else [1, 3])


def test_a_line_after_one_that_a_full_disk_cut_stays_readable(tmp_path: Path) -> None:
    append_line(tmp_path / "log", '{"step": 1}')
    with (tmp_path / "log").open("a") as file:
        file.write('{"st')
    append_line(tmp_path / "log", '{"step": 3}')
    assert (tmp_path / "log").read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 3}']


def test_lines_that_are_no_objects_are_left_out() -> None:
    assert read_objects(b'3\n[]\nnull\n{"a": 1}\n{"b": "\xff"}\n{"c": 1}{"d"') == [{"a": 1}, {"b": "\ufffd"}]
    assert read_objects(b"") == []


def test_a_line_ends_at_its_newline_alone() -> None:
    text = "one\u2028two\u2029three\x85four"
    assert read_objects(json.dumps({"a": text}, ensure_ascii=False).encode() + b"\r\n") == [{"a": text}]


def test_nothing_is_ended_where_nothing_was_begun(tmp_path: Path) -> None:
    end_last_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").touch()
    end_last_line(tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_file_is_written_anew_where_objects_go(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    keep_objects(path, lambda value: False)
    assert not path.exists()
    for step in range(4):
        append_object(path, {"step": step, "loss": float("nan")})
    before = path.stat()
    keep_objects(path, lambda value: value["step"] <= 3)
    assert path.stat() == before
    keep_objects(path, lambda value: value["step"] <= 1)
    assert path.read_text() == '{"step": 0, "loss": NaN}\n{"step": 1, "loss": NaN}\n'
    assert [*tmp_path.iterdir()] == [path]


def test_objects_go_from_a_store_too(s3_port: int, node_cache: Path) -> None:
    path = mirror(uri(s3_port, "logs/run")) / "finetune" / "log.jsonl"
    for step in range(3):
        append_object(path, {"step": step})
    publish(path)
    keep_objects(path, lambda value: value["step"] <= 1)
    append_object(path, {"step": 5})
    publish(path)
    path.unlink()  # as on another node
    ensure(path)
    assert [line["step"] for line in read_objects(path.read_bytes())] == [0, 1, 5]
