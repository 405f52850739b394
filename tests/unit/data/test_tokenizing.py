"""Shards from rows: the same whatever the work was cut into, whatever was there before; memory that rows do not grow."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from benchmarks.data_probe import Peaks
from plain_stages import tokenized_here
from small_runs import task_rows, write_jsonl
from tiny import make_tokenizer

from emloc_ray.data import tokenizing, units
from emloc_ray.data.formats import MOST_CHARACTERS, Tokens, encode, truncate
from emloc_ray.data.reading import scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import TokenShards, shard_name, written_counts
from emloc_ray.data.tokenizing import TokenizeOptions, row_lengths, tokenize_splits
from emloc_ray.errors import DataError


@pytest.fixture
def inline() -> Iterator[None]:
    with tokenized_here():
        yield


@pytest.fixture
def options(tiny_model_dir: Callable[..., Path]) -> TokenizeOptions:
    return TokenizeOptions(str(tiny_model_dir("llama")), "prompt_completion", 16)


def selected(path: Path, count: int = 90) -> RowSelection:
    return RowSelection.all_rows([scan(path)]).sample(count, 3)


def shards_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("group", [8, 120])
def test_shards_do_not_depend_on_the_file_s_kind_or_its_row_groups(
    tmp_path: Path, options: TokenizeOptions, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", 5)
    rows = task_rows()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=group)
    write_jsonl(tmp_path / "a.jsonl", rows)
    counts = []
    for kind in ("parquet", "jsonl"):
        splits = {"train": selected(tmp_path / f"a.{kind}")}
        counts.append(tokenize_splits(splits, options, tmp_path / kind, rows_per_shard={"train": 4}, num_workers=1))
    assert counts[0] == counts[1]
    assert counts[0]["train"]["rows"] + counts[0]["train"]["dropped_rows"] == 90
    assert shards_of(tmp_path / "parquet" / "train") == shards_of(tmp_path / "jsonl" / "train")


def long_rows() -> Iterator[tuple[str, dict[str, str]]]:
    for number in range(300):
        long = number % 50 == 7
        yield (
            f"row {number}",
            {"prompt": f"{number} ", "completion": "many words " * (4000 if long else number % 30 + 1)},
        )


@pytest.mark.parametrize("form", ["prompt_completion", "text"])
def test_memory_is_that_of_rows_as_long_as_they_may_be(
    options: TokenizeOptions, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(where, row if form != "text" else {"text": row["completion"]}) for where, row in long_rows()]
    options = replace(options, format=form)
    whole = list(options.tokens(rows, whole=True))
    sizes: list[int] = []

    def watched(made_of: Any, tokenizer: Any) -> list[Tokens]:
        sizes.append(sum(len(part.text) for parts in made_of for part in parts))
        return encode(made_of, tokenizer)

    monkeypatch.setattr(tokenizing, "encode", watched)
    cut = list(options.tokens(rows))
    assert max(sizes) <= (2 * tokenizing.ROWS_PER_BATCH + MOST_CHARACTERS) * options.max_seq_length
    for several, others in zip(cut, whole, strict=True):
        (tokens,), (every,) = several or [], others or []
        assert truncate(tokens, 16) == truncate(every, 16)
        assert (len(tokens) > 16) == (len(every) > 16)
    assert sum(len(row[0]) for row in cut if row) < sum(len(row[0]) for row in whole if row)


@pytest.mark.parametrize("characters", [1, 2, 3])
def test_rows_of_wide_tokens_are_cut_no_shorter(
    options: TokenizeOptions, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [truncate(row[0], 16) for row in options.tokens(long_rows(), whole=True) if row]
    monkeypatch.setattr(tokenizing, "MOST_CHARACTERS", characters)
    assert [truncate(row[0], 16) for row in options.tokens(long_rows()) if row] == whole


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("lost", [[0], [2, 3], [1, 5], [22], list(range(23))])
def test_what_is_there_is_kept_and_the_rest_is_made_as_it_was(
    tmp_path: Path, options: TokenizeOptions, lost: list[int]
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(task_rows()), path)  # one row group: units of several shards
    splits, sizes = {"train": selected(path)}, {"train": 4}
    counts = tokenize_splits(splits, options, tmp_path / "out", rows_per_shard=sizes, num_workers=1)
    whole = shards_of(tmp_path / "out" / "train")
    kept = [name for name in whole if name not in map(shard_name, lost) and name.endswith("arrow")]
    times = [(tmp_path / "out" / "train" / name).stat().st_mtime_ns for name in kept]
    for number in lost:
        shard = tmp_path / "out" / "train" / shard_name(number)
        shard.write_bytes(shard.read_bytes()[:-1]) if number % 2 else shard.unlink()
    assert tokenize_splits(splits, options, tmp_path / "out", rows_per_shard=sizes, num_workers=1) == counts
    assert [(tmp_path / "out" / "train" / name).stat().st_mtime_ns for name in kept] == times
    assert shards_of(tmp_path / "out" / "train") == whole
    assert all(written_counts(tmp_path / "out" / "train" / name) for name in whole if name.endswith("arrow"))


@pytest.mark.usefixtures("inline")
def test_skipping_bad_rows_where_there_are_none_makes_the_same_files(tmp_path: Path, options: TokenizeOptions) -> None:
    splits = {"s": selected(write_jsonl(tmp_path / "a.jsonl", task_rows()))}
    for name in ("fail", "skip"):
        made = replace(options, skip_bad_rows=name == "skip")
        tokenize_splits(splits, made, tmp_path / name, rows_per_shard={"s": 50}, num_workers=1)
    assert shards_of(tmp_path / "fail" / "s") == shards_of(tmp_path / "skip" / "s")


@pytest.mark.usefixtures("inline")
def test_row_lengths_are_those_of_the_rows_that_are_kept(tmp_path: Path, options: TokenizeOptions) -> None:
    rows = task_rows(700)
    rows[5] = {"prompt": "long " * 50, "completion": "lost"}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    selection = RowSelection.all_rows([scan(path)]).split(40, 1)[1]
    tokenize_splits({"s": selection}, options, tmp_path, rows_per_shard={"s": 50}, num_workers=1)
    shards = TokenShards(tmp_path / "s")
    lengths = row_lengths(selection, options, 1).tolist()
    assert len(lengths) == 660
    assert [n for n in lengths if n] == [len(shards.row(position)) for position in range(len(shards))]
    assert lengths.count(0) == shards.index["dropped_rows"] == 1


def test_small_data_are_tokenized_by_one_process_as_large_ones_by_ray_data(
    tmp_path: Path, options: TokenizeOptions, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {name: selected(write_jsonl(tmp_path / f"{name}.jsonl", task_rows()), 40) for name in ("train", "eval")}
    sizes = {"train": 8, "eval": 50}
    results = []
    for most in (units.SMALL_ROWS, 0):
        monkeypatch.setattr(units, "SMALL_ROWS", most)
        assert units.is_small(splits.values()) is (most > 0)
        out = tmp_path / str(most)
        counts = tokenize_splits(splits, options, out, rows_per_shard=sizes, num_workers=2)
        shards = [shards_of(out / name) for name in splits]
        results.append((counts, shards, row_lengths(splits["train"], options, 2).tolist()))
        bad = {"bad": selected(write_jsonl(tmp_path / "bad.jsonl", [*task_rows(3), {"prompt": 1, "completion": "x"}]))}
        with pytest.raises(DataError, match="row 4"):
            tokenize_splits(bad, options, tmp_path / f"bad-{most}", rows_per_shard={"bad": 8}, num_workers=1)
    assert results[0] == results[1]


def test_a_file_that_is_gone_is_named_as_every_unreadable_one_is(
    tmp_path: Path, options: TokenizeOptions, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": selected(write_jsonl(tmp_path / "rows.jsonl", task_rows(9)), 9)}
    (tmp_path / "rows.jsonl").unlink()
    assert units.is_small(splits.values())
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        tokenize_splits(splits, options, tmp_path / "out", rows_per_shard={"train": 4}, num_workers=1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is told by Linux alone")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_is_flat_in_the_rows(
    tmp_path: Path, options: TokenizeOptions, ray_session: None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALL_ROWS", 0)  # as many rows are
    options = replace(options, format="text")
    peaks: dict[str, list[int]] = {"driver": [], "worker": []}
    for count in (16_000, 64_000):
        path = tmp_path / f"{count}.{kind}"
        rows = [{"text": f"{i} {'and so on ' * 8}"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), path) if kind == "parquet" else write_jsonl(path, rows)
        del rows
        pa.default_memory_pool().release_unused()
        with Peaks(named="ShardTokenizer") as watched:
            splits = {"train": RowSelection.all_rows([scan(path)])}
            out = tmp_path / f"{count}-{kind}"
            counts = tokenize_splits(splits, options, out, rows_per_shard={"train": 1024}, num_workers=1)
            time.sleep(0.1)
        assert counts["train"]["truncated_rows"] == counts["train"]["rows"] == count
        for name, sizes in peaks.items():
            sizes.append(watched.peaks[name])
    assert all(small > 0 for small, _ in peaks.values())
    # Held as dictionaries, 48,000 rows more would be 19 MB, as lists of tokens as much again. Up to 16,000 rows Arrow's
    # pool still grows to the size of its batches.
    grown = {name: (large - small) / 2**20 for name, (small, large) in peaks.items()}
    assert grown["driver"] < 16
    assert grown["worker"] < 16


def test_where_the_tokenizer_lies_does_not_matter(inline: None, options: TokenizeOptions, tmp_path: Path) -> None:
    """What is built on the rows is shared by what they are."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(20))
    shutil.copytree(options.tokenizer, tmp_path / "copy")
    found = []
    for name, tokenizer in (("one", options.tokenizer), ("other", str(tmp_path / "copy"))):
        tokenize_splits(
            {"train": selected(rows, 20)},
            replace(options, tokenizer=tokenizer),
            tmp_path / name,
            rows_per_shard={"train": 8},
            num_workers=1,
        )
        found.append(shards_of(tmp_path / name / "train"))
    assert found[0] == found[1]


def test_a_tokenizer_that_was_saved_anew_is_opened_anew(tmp_path: Path) -> None:
    options = TokenizeOptions(str(tmp_path), "messages", 64)
    rows = [("row 1", {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]})]
    make_tokenizer("{{ raise_exception('no such role') }}").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no such role"):
        list(options.tokens(rows))
    make_tokenizer().save_pretrained(tmp_path)
    [[first]] = options.tokens(rows)
    make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(tmp_path)
    [[other]] = options.tokens(rows)
    assert first.input_ids != other.input_ids
