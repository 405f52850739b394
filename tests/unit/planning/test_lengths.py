"""How long rows are planned to be."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.data.formats import Tokens, pack
from emloc_ray.data.hub_splits import HubSplit
from emloc_ray.planning.first_rows import first_rows, sequences_a_row
from emloc_ray.planning.lengths import Lengths, row_lengths
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.prepared import UNKNOWN_ROWS, Prepared
from emloc_ray.planning.work import num_sequences, num_steps, steps_trained, tokens_stored

_TEXTS = ("and so on " * 4, "7" * 50, "a few words", "日本語の文章です。" * 3)


@pytest.mark.parametrize(
    ("rows", "format"),
    [
        ([{"text": text} for text in _TEXTS], "text"),
        ([{"prompt": text, "completion": text[:9]} for text in _TEXTS], "prompt_completion"),
    ],
)
def test_as_long_as_the_tokenizer_makes_them(
    prepared: Callable[..., Prepared], tmp_path: Path, rows: list[dict[str, Any]], format: str
) -> None:
    """Numbers and other scripts have several times the tokens of as many characters of prose."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepared(data={"train": {"path": str(path)}, "format": format, "max_seq_length": 4096})
    first = first_rows(run)
    assert first is not None
    lengths = [len(tokens) for tokens in first.sequences]
    assert abs(run.lengths.mean - sum(lengths) / len(lengths)) <= 2  # a mark at the end of each
    assert max(lengths) <= run.lengths.longest <= 1.25 * max(lengths)
    guessed = row_lengths(run.config.data, dict.fromkeys(run.files["train"], 1), 0)
    assert guessed.longest < 0.7 * run.lengths.longest


def test_rows_that_will_be_cut_count_as_cut(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text((json.dumps({"text": "7" * 100_000}) + "\n" + json.dumps({"text": "7" * 20}) + "\n") * 4)
    found = prepared(data={"train": {"path": str(path)}, "max_seq_length": 64}).lengths
    assert found.longest == 64
    assert 32 < found.mean < 64


def test_a_row_without_text_has_no_length(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text((json.dumps({"text": "good"}) + "\n" + json.dumps({"text": None}) + "\n") * 4)
    data = {"train": {"path": str(path)}, "on_error": "skip", "format": "text"}
    one = prepared(data={**data, "max_seq_length": 64}).lengths
    assert one == Lengths(one.longest / 1.25 / 2, one.longest)


def test_a_text_that_is_none_is_counted_until_it_is_left_out(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text((json.dumps({"text": "good"}) + "\n") * 4 + '{"text": "\\ud800"}\n')
    data = {"train": {"path": str(path)}, "on_error": "skip", "format": "text", "max_seq_length": 64}
    assert prepared(data=data).lengths.longest == 5


def test_rows_of_every_file_and_of_every_split_that_is_scored_count(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("short", "long", "longer")}
    for path, length in zip(paths.values(), (5, 50, 90), strict=True):
        path.write_text((json.dumps({"text": "7" * length}) + "\n") * 3)
    short, long, longer = map(str, paths.values())
    limit = {"max_seq_length": 4096, "format": "text"}
    alone = prepared(data={"train": {"path": short}, **limit})
    both = prepared(data={"train": {"path": [short, long]}, **limit})
    assert both.lengths.longest > 5 * alone.lengths.longest == 5 * alone.lengths.longest_scored
    scored = prepared(data={"train": {"path": short}, "eval": {"path": longer}, **limit})
    assert scored.lengths.longest == alone.lengths.longest
    assert scored.lengths.longest_scored == scored.lengths_of("eval").longest > both.lengths.longest
    mine, others = MemoryModel(scored), MemoryModel(alone)
    assert mine.finetuning_parts() == others.finetuning_parts()
    assert total(mine.evaluation_parts()) > total(others.evaluation_parts())


def test_the_mean_is_that_of_the_rows_however_they_lie_in_files(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    for name, length, rows in (("short", 10, 3000), *((f"long/{number}", 100, 10) for number in range(20))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": "7" * length}) + "\n") * rows)
    short, long = str(tmp_path / "short.jsonl"), str(tmp_path / "long")

    def mean(path: Any) -> float:
        return prepared(data={"train": {"path": path}, "format": "text", "max_seq_length": 4096}).lengths.mean

    one, other = mean(short), mean(long)
    assert other > 5 * one
    assert mean([short, long]) == pytest.approx((3000 * one + 200 * other) / 3200, rel=0.05)
    assert mean({short: 1, long: 3}) == pytest.approx((one + 3 * other) / 4, rel=0.01)
    assert mean({long: 1, short: 3}) == pytest.approx((3 * one + other) / 4, rel=0.01)


def test_rows_of_the_hub_beside_files_are_as_long_as_rows_may_be(
    prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text((json.dumps({"text": "7" * 10}) + "\n") * 8000)

    def run(**data: Any) -> Prepared:
        return prepared(data={"train": {"path": str(path)}, "format": "text", "max_seq_length": 128, **data})

    alone, both = run(), run(train={"path": [str(path), "hf:some/rows"]})
    assert both.lengths.mean == pytest.approx((alone.lengths.mean + 128) / 2)
    assert both.lengths.longest == 128
    assert both.num_rows() == alone.num_rows() + UNKNOWN_ROWS
    assert alone.knows_rows("calibration")
    assert not both.knows_rows("calibration")
    scored = run(eval={"path": "hf:some/rows"})
    assert scored.lengths.longest == alone.lengths.longest < 128 == scored.lengths.longest_scored
    assert tokens_stored(scored)[0] > tokens_stored(alone)[0] + 100 * scored.num_rows("eval")
    few = run(train={"path": "hf:some/rows", "num_samples": 100}, eval=None)
    assert few.num_rows() == 100


def test_rows_of_the_hub_are_as_many_as_its_card_says(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emloc_ray.planning.prepared.num_rows", {HubSplit("some/rows", "", "train"): 52000}.get)
    places = ["hf:some/rows", "hf:other/rows"]
    assert prepared(data={"train": {"path": places[0]}}).num_rows() == 52000
    assert prepared(data={"train": {"path": places}}).num_rows() == 52000 + UNKNOWN_ROWS


@pytest.mark.parametrize(("length", "limit"), [(18, 512), (150, 512), (300, 512)])
def test_rows_that_are_joined_count_as_the_sequences_that_they_become(
    prepared: Callable[..., Prepared], tmp_path: Path, length: int, limit: int
) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text((json.dumps({"text": "7" * length}) + "\n") * 4500)
    data = {"train": {"path": str(path)}, "max_seq_length": limit, "packing": True}
    run = prepared(data=data, calibration={"num_calibration_samples": 64})
    row = round(run.lengths_of("train", packed=False).mean)

    def joined(rows: int, shard: int) -> int:
        counts = [min(shard, rows - begin) for begin in range(0, rows, shard)]
        return sum(sum(1 for _ in pack([Tokens([7] * row, [True] * row)] * count, limit)) for count in counts)

    for split, shard in (("train", 1024), ("eval", 1024), ("calibration", 32)):
        assert num_sequences(run, split) == pytest.approx(joined(run.num_rows(split), shard), rel=0.2)
    assert run.calibration_tokens(run.lengths.mean) == pytest.approx(64 * row, rel=0.03)
    assert steps_trained(run) == num_steps(run.config.finetune, num_sequences(run))


def test_the_rows_of_500_tasks_are_read_once(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    run, read = prepared(data={"train": {"path": str(path)}}), Counter[str]()
    monkeypatch.setattr("emloc_ray.planning.prepared.row_lengths", lambda *_: read.update(["lengths"]) or Lengths(8, 8))
    monkeypatch.setattr("emloc_ray.planning.first_rows.first_rows", lambda *_: read.update(["sequences"]))
    for length in [*range(1000, 1500)] * 2:
        data = run.config.data.model_copy(update={"max_seq_length": length})
        task = dataclasses.replace(run, config=run.config.model_copy(update={"data": data}))
        task.lengths_of("train")
        sequences_a_row(task)
    assert read == {"lengths": 500, "sequences": 500}
