"""Rows made to stop a reader, in every kind of file: named by file and row, or left out where bad rows are."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulting.s3 import uri
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import task_rows, write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RunConfig
from emloc_ray.data import text_rows
from emloc_ray.data.images import load_images
from emloc_ray.data.reading import BadRow, Place, SourceFile, read_rows, scan
from emloc_ray.data.row_formats import FORMATS
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.tokenizing import ShardTokenizer, TokenizeOptions
from emloc_ray.data.units import shard_units
from emloc_ray.errors import DataError
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.planning.data_checks import check_split
from emloc_ray.planning.lengths import row_lengths

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


@pytest.mark.parametrize("ending", ['", "completion": "c"}', '\\\\", "a": [{"b": "}]"}]}', '\\"}"}'])
@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_a_too_long_element_of_an_array_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, piece: int
) -> None:
    monkeypatch.setattr(text_rows, "SKIP_BYTES", piece)
    monkeypatch.setattr(text_rows, "ARRAY_BYTES", 2**12)
    path = tmp_path / "a.json"
    rows = [json.dumps(row, ensure_ascii=False) for row in GOOD[:9]]
    rows[4] = '{"prompt": "' + "}ü" * 70_000 + ending
    path.write_text("[" + ", ".join(rows) + "]")
    read = dict(read_rows(scan(path, keep_bad=True), range(9), keep_bad=True))
    bad = read.pop(4)
    assert isinstance(bad, BadRow)
    assert str(bad.error) == f"{path}, row 5: longer than 65536 bytes: split it."
    assert [*read.values()] == [*GOOD[:4], *GOOD[5:9]]
    with pytest.raises(
        DataError, match=r"a\.json cannot be read as jsonl \(element 5: longer than 65536 bytes: split it\)"
    ):
        scan(path)


def test_a_too_long_element_without_an_end_ends_its_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a", "completion": "b"}, {"prompt": "' + "x" * 1_000_000)
    with pytest.raises(DataError, match="element 2: Unterminated string"):
        scan(path, keep_bad=True)


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


@pytest.mark.parametrize("kind", ["text", "nested", "dictionary"])
def test_a_too_long_value_of_a_parquet_file_is_named_or_left_out(tmp_path: Path, kind: str) -> None:
    texts = [str(row["completion"]) for row in GOOD]
    texts[BAD] = "x" * 70_000
    column = pa.array([[text] for text in texts] if kind == "nested" else texts)
    if kind == "dictionary":
        column = column.dictionary_encode()
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [row["prompt"] for row in GOOD], "completion": column}), path)
    source = scan(path)
    with pytest.raises(DataError) as caught:
        list(read_rows(source, range(len(GOOD))))
    told = f"{path}, row {BAD + 1}: column 'completion' is longer than 65536 bytes: split it."
    assert str(caught.value) == told
    rows = dict(read_rows(source, range(len(GOOD)), keep_bad=True))
    bad = rows.pop(BAD)
    assert isinstance(bad, BadRow)
    assert str(bad.error) == told
    assert [row["prompt"] for row in rows.values()] == [f"p{number}" for number in rows]


def test_few_rows_are_read_at_once_that_repeat_a_long_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet stores it once; read as text it is there once a row."""
    monkeypatch.setattr(text_rows, "MAX_LINE_BYTES", 2**21)
    path = tmp_path / "a.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"text": text}), path, store_schema=False)
    source, before = scan(path), pa.total_allocated_bytes()
    for _, row in itertools.islice(read_rows(source, range(500)), 9):
        assert len(row["text"]) == 2**20
        assert pa.total_allocated_bytes() - before < 2**24


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_files_of_other_encodings_say_which(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes((jsonl(b"{}") if suffix == ".jsonl" else csv(b"a,b")).decode().encode(encoding))
    with pytest.raises(DataError) as caught:
        scan(path, keep_bad=True)
    assert str(caught.value) == f"{path} is {encoding[:6].upper()} text: save it as UTF-8."


@pytest.mark.parametrize("keep_bad", [False, True])
@pytest.mark.parametrize(
    ("rest", "complaint"),
    [
        (b"", "a quote is opened that is never closed"),
        (b"a,b\n" * 30_000, "longer than 65536 bytes, or a quote is opened that is never closed"),
        (b'a,"b"\n', "',' expected after '\"'"),
    ],
)
def test_the_row_is_named_whose_quote_is_never_closed(
    tmp_path: Path, keep_bad: bool, rest: bytes, complaint: str
) -> None:
    """Where its row ends is not known, so that it is not left out alone."""
    path = tmp_path / "a.csv"
    content = csv(b'"a,b') + rest
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        scan(path, keep_bad)
    begin = content.index(b'"a,b')
    assert str(caught.value) == f"{path}, row {BAD + 1}: {complaint} (from byte {begin} on): correct its quotes."


def test_a_quote_of_a_header_that_is_never_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'prompt\t"completion\na\tb\n')
    with pytest.raises(DataError, match=r"a\.tsv, header: a quote is opened that is never closed \(from byte 0 on\)"):
        scan(path)


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


@pytest.mark.parametrize("skips", [False, True])
def test_a_token_that_the_model_does_not_embed_is_told(skips: bool, tiny_model_dir: Callable[..., Path]) -> None:
    rows = task_rows(20)
    options = TokenizeOptions(str(tiny_model_dir("llama")), "prompt_completion", 64, skip_bad_rows=skips)
    sequences = [tokens for row in options.tokens(("", row) for row in rows) for tokens in row or ()]
    last = max(max(tokens.input_ids) for tokens in sequences)
    assert len([*replace(options, embedded=last + 1).tokens(("", row) for row in rows)]) == 20
    with pytest.raises(
        DataError, match=rf"^row \d+: token {last} \('.*'\) is beyond the {last} that the model embeds: "
    ):
        list(replace(options, embedded=last).tokens((f"row {number}", row) for number, row in enumerate(rows)))


def nested(depth: int, key: str = "a") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {key: value}
    return value


def shown(**part: Any) -> list[dict[str, Any]]:
    """A chat that shows an image."""
    return [{"role": "user", "content": [{"type": "image", **part}]}, {"role": "assistant", "content": "a"}]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
FITTING: dict[str, dict[str, Any]] = {
    "messages": {"messages": CHAT},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "conversational": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "q"},
}


def complaints(path: Path, form: str, row: dict[str, Any], model: Path) -> list[str]:
    """Reads a good row and this one as the driver and as a worker do. Where bad rows are left out neither raises; else this
    gives what each raises, which names the second row."""
    write_jsonl(path, [FITTING[form], row])
    told = []
    for on_error in ("skip", "fail"):
        splits = {name: {"path": str(path)} for name in ("train", "selection", "eval")}
        data = {**splits, "format": form, "on_error": on_error, "max_seq_length": 64}
        config = parse_config({"run_dir": str(path.parent / "run"), "model": {"source": "unused"}, "data": data})
        for read in (
            functools.partial(driver_reads, config),
            functools.partial(worker_reads, path, form, model, on_error),
        ):
            try:
                read()
            except DataError as error:
                if on_error == "skip":
                    raise
                told.append(str(error))
    assert all(error.startswith(f"{path}, row 2: ") for error in told), told
    return told


def driver_reads(config: RunConfig) -> None:
    row_lengths(config.data, dict.fromkeys(check_split(config, "train", True), 1), 0)


def worker_reads(path: Path, form: str, model: Path, on_error: str) -> None:
    options = TokenizeOptions(str(model), form, 64, skip_bad_rows=on_error == "skip")
    source = scan(path, keep_bad=options.skip_bad_rows)
    rows = read_rows(source, range(2), keep_bad=options.skip_bad_rows)
    first, _ = options.tokens((Place.of(source, number), row) for number, row in rows)
    assert first


@pytest.mark.parametrize(
    ("form", "row", "complaint"),
    [
        ("messages", {"messages": CHAT, "tools": json.dumps([nested(600)])}, "field 'tools' is nested too deeply"),
        ("alpaca", {"instruction": {}, "output": "a"}, "field 'instruction' is dict: it must be text"),
        ("alpaca", {"instruction": "q", "output": []}, "field 'output' is list: it must be text"),
        ("alpaca", {"instruction": "q", "output": "a", "input": {}}, "field 'input' is dict: it must be text"),
        ("messages", {"messages": shown(path="~nobodyx/a.png")}, "~nobodyx/a.png is not there"),
        ("messages", {"messages": shown(path="x" * 5000)}, "is not there"),
        ("messages", {"messages": [{"role": "\ud800", "content": "x"}, *CHAT]}, "its chat holds '\\ud800'"),
    ],
)
def test_rows_whose_values_no_reader_expects(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], form: str, row: dict[str, Any], complaint: str
) -> None:
    told = complaints(tmp_path / "a.jsonl", form, row, tiny_model_dir("llama"))
    assert complaint in told[0]


@pytest.mark.parametrize("name", ["~nobodyx/a.png", "a\0b.png", "x" * 5000, "\ud800.png", "s3://[", "http://[bad"])
def test_images_of_names_that_are_none(tmp_path: Path, name: str) -> None:
    where = Place.of(SourceFile(str(tmp_path / "a.jsonl"), "jsonl", 1), 0)
    with pytest.raises(DataError, match=r"row 1: image 1 "):
        load_images({"messages": shown(path=name)}, where)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2**30, 2], pa.date32()),
        pa.array([1, 2**59, 2], pa.timestamp("ms")),
        pa.array([[1], [2**30], [2]], pa.list_(pa.date32())),
    ],
    ids=["date", "time", "list of dates"],
)
def test_values_of_a_parquet_file_that_python_has_none_for(tmp_path: Path, values: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 3, "completion": ["b"] * 3, "when": values}), path)
    source = scan(path, keep_bad=True)
    assert [isinstance(row, BadRow) for _, row in read_rows(source, range(3), keep_bad=True)] == [False, True, False]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'when' cannot be read"):
        list(read_rows(source, range(3)))


scalars = st.sampled_from([None, 1, 1.5, "x", "", True, 10**400, float("nan"), "\ud800", "[", json.dumps(nested(600))])
deep = st.sampled_from([nested(300), [nested(300)], json.dumps([nested(600)]), {"function": nested(300)}])
leaf = scalars | deep | st.sampled_from(["role", "user", "assistant", "from", "gpt", "function_call", "image", "text"])
KEYS = "role content from value type text image url path tool_calls function arguments weight"
values = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS.split()), inner, max_size=3)
        | st.builds(lambda content: [CHAT[0], {"role": "assistant", "content": content}], inner)
        | st.builds(
            lambda content: [CHAT[0], {**CHAT[1], **content}], st.dictionaries(st.sampled_from(KEYS.split()), inner)
        )
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_whatever_a_row_holds_it_is_a_row_or_a_bad_one(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path], form: str, data: st.DataObject
) -> None:
    names = [*FORMATS[form].needed, *FORMATS[form].optional]
    row = data.draw(st.dictionaries(st.sampled_from(names), values))
    complaints(tmp_path_factory.mktemp("rows") / "a.jsonl", form, {**FITTING[form], **row}, tiny_model_dir("llama"))
