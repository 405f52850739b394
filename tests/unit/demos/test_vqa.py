"""The visual question-answering task: a function of the seed, answers that the images show, splits that share nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from emloc_ray.data.formats import check_row
from emloc_ray.data.images import load_images
from emloc_ray.demos.splits import SPLIT_FRACTIONS
from emloc_ray.demos.vqa import COLOURS, Example, VqaTask, examples, generate, split_of

TASK = VqaTask(num_rows=90, image_size=56)


def heights(example: Example) -> dict[str, int]:
    """How many pixels of the image are of each colour's bar, in its highest column."""
    image = Image.open(io.BytesIO(example.image)).convert("RGB")
    columns = [[image.getpixel((x, y)) for y in range(image.height)] for x in range(image.width)]
    found = {name: max(column.count(colour) for column in columns) for name, colour in COLOURS.items()}
    return {name: count for name, count in found.items() if count}


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    counts = generate(tmp_path / "a", TASK)
    assert counts == generate(tmp_path / "b", TASK)
    assert sum(counts.values()) == 90
    for name in SPLIT_FRACTIONS:
        assert (tmp_path / "a" / f"{name}.parquet").read_bytes() == (tmp_path / "b" / f"{name}.parquet").read_bytes()
    other = [e.image for e in examples(VqaTask(num_rows=90, image_size=56, seed=1))]
    assert not set(other) & {e.image for e in examples(TASK)}


def test_every_row_is_a_message_with_its_image(tmp_path: Path) -> None:
    generate(tmp_path, TASK)
    for name in SPLIT_FRACTIONS:
        for row in pq.read_table(tmp_path / f"{name}.parquet").to_pylist():
            check_row(row, "messages", "here")
            [content] = load_images(row, "here")
            assert Image.open(io.BytesIO(content)).size == (56, 56)


def test_a_chart_shows_its_answer() -> None:
    seen = set()
    for example in examples(VqaTask(num_rows=60, image_size=56, kinds=("chart",))):
        bars = heights(example)
        shown = dict(part.split(":") for part in example.shown.split())
        assert bars.keys() == shown.keys()
        answers = {
            "How many bars are there?": str(len(bars)),
            "Which bar is the highest?": max(bars, key=bars.__getitem__),
            "Which bar is the lowest?": min(bars, key=bars.__getitem__),
        }
        assert example.answer == answers[example.question]
        seen.add(example.question)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["number", "word"])
def test_a_text_is_written_in_full(kind: str) -> None:
    """Something is drawn, and nothing of it at the border."""
    for example in examples(VqaTask(num_rows=20, image_size=112, kinds=(kind,))):
        image = Image.open(io.BytesIO(example.image)).convert("RGB")
        ground = image.getpixel((0, 0))
        border = [image.getpixel((x, y)) for x in range(112) for y in (0, 111)]
        border += [image.getpixel((x, y)) for y in range(112) for x in (0, 111)]
        assert set(border) == {ground}
        assert len({pixel for _, pixel in image.getcolors(2**16) or []}) > 2
        assert example.answer == example.shown


def test_what_is_shown_is_in_one_split_alone() -> None:
    task = VqaTask(num_rows=600, image_size=16, kinds=("chart",), max_bars=2)
    places: dict[str, set[str]] = {}
    asked = set()
    for example in examples(task):
        places.setdefault(example.shown, set()).add(split_of(example, task.seed))
        assert (example.shown, example.question) not in asked
        asked.add((example.shown, example.question))
    assert all(len(names) == 1 for names in places.values())
    assert set.union(*places.values()) == set(SPLIT_FRACTIONS)
