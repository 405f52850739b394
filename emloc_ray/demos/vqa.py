"""A visual question-answering task made on the spot: read a number or a word, or compare the bars of a chart.

Every image is drawn with Pillow from the seed and the row's number alone. Rows are chat messages with the image's PNG bytes
inside the question, as transformers has them. What an image shows (the number, the word, the bars) is in one split alone,
so that no held-out answer can be remembered.
"""

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from emloc_ray.demos.splits import SPLIT_FRACTIONS, draw, split_at, write_splits
from emloc_ray.errors import DataError

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "purple": (148, 103, 189),
    "black": (20, 20, 20),
}
_PART = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.binary())])
_SCHEMA = pa.schema(
    [("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))), ("kind", pa.string())]
)
_MOST_TRIES = 20  # draws a row, where images repeat


@dataclass(frozen=True)
class VqaTask:
    """The number of rows, the ``kinds`` of their images, each ``image_size`` pixels wide and high, and the ``questions`` about
    charts."""

    num_rows: int = 6_000
    image_size: int = 224
    kinds: tuple[str, ...] = ("number", "word", "chart")
    questions: tuple[str, ...] = ("highest", "lowest", "count")
    max_bars: int = 5
    seed: int = 0


class Example(NamedTuple):
    """One image with its question; ``shown`` is its content, whatever the place and the colours."""

    kind: str
    shown: str
    question: str
    answer: str
    image: bytes


def generate(out_dir: Path, task: VqaTask) -> dict[str, int]:
    """Writes ``train``, ``calibration``, ``selection`` and ``eval`` as Parquet files into ``out_dir``. Returns the number of
    rows of each split. Raises ``DataError`` without Pillow."""
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLIT_FRACTIONS}
    for example in examples(task):
        splits[split_of(example, task.seed)].append({"messages": messages(example), "kind": example.kind})
    return write_splits(out_dir, splits, _SCHEMA)


def examples(task: VqaTask) -> Iterator[Example]:
    """The task's rows, ``kinds`` in turn; no two show the same and ask the same."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError("data.generate vqa draws with Pillow: pip install 'emloc-ray[vision]'.") from error
    seen: set[tuple[str, str]] = set()
    for number in range(task.num_rows):
        kind = task.kinds[number % len(task.kinds)]
        for attempt in range(_MOST_TRIES):
            made = _MAKERS[kind](task, random.Random(f"{task.seed}:{number}:{attempt}"))
            if (made.shown, made.question) not in seen:
                seen.add((made.shown, made.question))
                yield made
                break


def split_of(example: Example, seed: int) -> str:
    """The split of all examples that show the same."""
    return split_at(draw(seed, example.kind, example.shown))


def messages(example: Example) -> list[dict[str, Any]]:
    """The row: the image and the question, and the answer."""
    asked = [{"type": "image", "image": example.image}, {"type": "text", "text": example.question}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": example.answer}]},
    ]


def _number(task: VqaTask, draw: random.Random) -> Example:
    text = str(draw.randrange(10, 100_000))
    return Example("number", text, "Which number is written here?", text, _written(text, task.image_size, draw))


def _word(task: VqaTask, draw: random.Random) -> Example:
    """A word of syllables: there are more of these than any word list has."""
    syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.choice((2, 3)))]
    text = "".join(syllables)
    return Example("word", text, "Which word is written here?", text, _written(text, task.image_size, draw))


def _chart(task: VqaTask, draw: random.Random) -> Example:
    """Bars side by side, each of another colour and another height."""
    count = draw.randint(2, task.max_bars)
    colours = draw.sample(list(COLOURS), count)
    heights = draw.sample(range(2, 11), count)
    asked = draw.choice(task.questions)
    if asked == "count":
        question, answer = "How many bars are there?", str(count)
    else:
        best = max(heights) if asked == "highest" else min(heights)
        question, answer = f"Which bar is the {asked}?", colours[heights.index(best)]
    shown = " ".join(f"{colour}:{height}" for colour, height in zip(colours, heights, strict=True))
    return Example("chart", shown, question, answer, _bars(colours, heights, task.image_size))


_MAKERS: dict[str, Callable[[VqaTask, random.Random], Example]] = {"number": _number, "word": _word, "chart": _chart}


def _written(text: str, size: int, draw: random.Random) -> bytes:
    """The text in one of the colours, somewhere on a light ground."""
    from PIL import Image, ImageDraw, ImageFont

    ground = tuple(draw.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (size, size), ground)
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=draw.uniform(0.16, 0.24) * size)
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    x = draw.uniform(0.02 * size, max(0.02 * size, 0.98 * size - (right - left)))
    y = draw.uniform(0.02 * size, max(0.02 * size, 0.98 * size - (bottom - top)))
    canvas.text((x - left, y - top), text, fill=COLOURS[draw.choice(list(COLOURS))], font=font)
    return _encoded(image)


def _bars(colours: list[str], heights: list[int], size: int) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size), (255, 255, 255))
    canvas = ImageDraw.Draw(image)
    width = size / len(colours)
    for place, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        top = size * (1 - height / 10.5)
        canvas.rectangle(((place + 0.1) * width, top, (place + 0.9) * width, size), fill=COLOURS[colour])
    return _encoded(image)


def _encoded(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
