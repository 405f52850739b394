"""The ablations' data sets: nothing in two splits, the same again, other rows for other seeds; calibration rows made worse."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from ablations.config import CalibrationRows, RowsConfig
from ablations.datasets import DATASETS, FORMATS, MASK, data_section, make_dataset, prose, stand_in

from emloc_ray.config.schema import DataConfig
from emloc_ray.demos.python_sources import words
from emloc_ray.errors import DataError

ROWS = RowsConfig(train=40, selection=8, eval=12, calibration=20)
CALIBRATIONS = {
    "own": CalibrationRows(),
    "shuffled": CalibrationRows(shuffle=True),
    "quarter": CalibrationRows(foreign="prose", share=0.25),
    "other": CalibrationRows(foreign="prose"),
}
ERRORS = ("ValueError", "TypeError", "KeyError", "LimitError")
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty modules of four functions, and each of them once more in another package."""
    root = tmp_path_factory.mktemp("sources")
    for package in ("first", "copied"):
        (root / package).mkdir()
        for number in range(60):
            functions = [
                f'def count_item_{number}_{n}(values):\n    """Count item {n} of the list {number} once more."""\n'
                f"    if not values:\n        raise {ERRORS[n]}(values)\n"
                f"    total = values[{n}] + {number}\n    total += count_item_{number}_{n}(values)\n    return total\n"
                for n in range(4)
            ]
            (root / package / f"m{number}.py").write_text("\n\n".join(functions))
    return root


def read(folder: Path, split: str) -> Rows:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    root = tmp_path_factory.mktemp("made")

    def get(name: str, seed: int) -> Path:
        make_dataset(name, root / f"{name}-{seed}", seed, ROWS, CALIBRATIONS, ["prose"], [sources])
        return root / f"{name}-{seed}"

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_no_row_and_no_file_is_in_two_splits(made: Callable[[str, int], Path], name: str) -> None:
    splits = {split: read(made(name, 0), split) for split in ("train", "selection", "eval", "calibration-own")}
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 40,
        "selection": 8,
        "eval": 12,
        "calibration-own": 20,
    }
    fields = {"prompt"} if name == "exceptions" else {"prompt", "completion", "text"}  # exceptions' names are shared
    texts = [words(row[field]) for rows in splits.values() for row in rows for field in fields & row.keys()]
    assert max(Counter(texts).values()) == 1  # copies of a module are in, and none of their rows
    modules = {
        split: {word.split("_")[2] for row in rows for word in " ".join(row.values()).split() if "count_item_" in word}
        for split, rows in splits.items()
    }
    if name != "summaries":
        assert not any(
            first & other
            for number, first in enumerate(modules.values())
            for other in list(modules.values())[number + 1 :]
        )


@pytest.mark.parametrize("name", DATASETS)
def test_the_same_again_and_other_rows_for_another_seed(
    made: Callable[[str, int], Path], sources: Path, tmp_path: Path, name: str
) -> None:
    first, other = made(name, 0), made(name, 1)
    fingerprint = make_dataset(name, tmp_path / "again", 0, ROWS, CALIBRATIONS, ["prose"], [sources])
    for file in first.glob("*"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert (first / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()
    # What is there is not made again.
    written = (tmp_path / "again" / "train.jsonl").stat().st_mtime_ns
    assert make_dataset(name, tmp_path / "again", 0, ROWS, CALIBRATIONS, ["prose"], [sources]) == fingerprint
    assert (tmp_path / "again" / "train.jsonl").stat().st_mtime_ns == written


def test_names_are_masked_wherever_they_stand(made: Callable[[str, int], Path]) -> None:
    for row in read(made("names", 0), "train"):
        assert row["completion"] not in row["prompt"]
        assert row["prompt"].count(MASK) == 2


def test_the_exception_is_masked_wherever_it_stands(made: Callable[[str, int], Path], tmp_path: Path) -> None:
    rows = read(made("exceptions", 0), "train")
    assert {row["completion"] for row in rows} == set(ERRORS)
    for row in rows:
        assert row["completion"] not in row["prompt"]
        assert f"raise {MASK}(values)" in row["prompt"]
    bodies = {
        "again": "    raise error\n",
        "lower": "    raise builder(values)\n",
        "beyond": "    value = 'a text that is long'\n" * 9 + "    raise ValueError\n",
        "first": "    try:\n        raise TypeError\n    except TypeError:\n        raise ValueError\n",
    }
    for number in range(40):
        text = "".join(f"def {name}_{number}(values):\n    a = {number}\n{body}\n" for name, body in bodies.items())
        (tmp_path / f"m{number}.py").write_text(text)
    make_dataset(
        "exceptions", tmp_path / "out", 0, RowsConfig(train=1, selection=1, eval=1, calibration=1), {}, (), [tmp_path]
    )
    [row] = read(tmp_path / "out", "train")
    assert row["completion"] == "TypeError"
    assert row["prompt"].count(MASK) == 2
    assert "def first_" in row["prompt"]


@pytest.mark.parametrize("name", DATASETS)
def test_calibration_rows_are_made_worse_as_asked(made: Callable[[str, int], Path], name: str) -> None:
    folder = made(name, 0)
    own, shuffled, quarter, other = (read(folder, f"calibration-{key}") for key in CALIBRATIONS)
    for before, after in zip(own, shuffled, strict=True):
        for field, text in before.items():
            assert sorted(after[field].split()) == sorted(text.split())
    assert shuffled != own
    assert sum(row not in own for row in quarter) == 5
    assert sum(row not in own for row in other) == 20
    assert all(row.keys() == own[0].keys() and all(text.strip() for text in row.values()) for row in other)
    assert len(read(folder, "healing-prose")) == 40


def test_prose_is_in_an_order_of_the_seed() -> None:
    assert sorted(prose(0)) == sorted(prose(1))
    assert prose(0) == prose(0) != prose(1)


def test_too_few_rows_are_told(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"names has \d+ rows for train in .* and needs 4000: .* lower rows.train"):
        make_dataset("names", tmp_path / "out", 0, RowsConfig(train=4000), {}, (), [sources])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DATASETS)
def test_stand_ins_have_the_files_of_the_data(made: Callable[[str, int], Path], tmp_path: Path, name: str) -> None:
    stand_in(name, tmp_path, CALIBRATIONS, ["prose"])
    assert {file.name for file in tmp_path.glob("*")} == {file.name for file in made(name, 0).glob("*.jsonl")}
    data = DataConfig.model_validate(data_section(name, tmp_path, "own", "prose"))
    assert data.format == FORMATS[name]
    named = (data.train, data.selection, data.eval, data.calibration, data.healing)
    assert all(split is not None and Path(str(split.path)).is_file() for split in named)
