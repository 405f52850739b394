"""How long rows are: what memory, disk and time are predicted from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the memory model, which takes lengths, runs without pydantic and pyarrow
    from emloc_ray.config.schema import DataConfig
    from emloc_ray.data.reading import BadRow, SourceFile
    from emloc_ray.data.text_rows import Row

PACKED_SHARE = 0.97  # of a sequence's length that the rows packed into it fill
_CHARACTERS_PER_TOKEN = 3.5  # where there is no tokenizer
_TURN_TOKENS = 5  # of a chat template around a turn, as in ChatML
_VQA_TOKENS = 24.0  # of a question and its answer
_VQA_BYTES = 2000.0  # of its image
_ROWS_READ, _FILES_READ = 200, 8
_IMAGE_BYTES = 100e3  # of a photograph that was not read


@dataclass(frozen=True)
class Lengths:
    """Tokens a row: the mean, and the longest to be expected after truncation; its images, and their bytes as encoded.
    ``scored``: the longest to be expected of rows in files of their own that are scored."""

    mean: float
    longest: float
    images: float = 0.0
    image_bytes: float = 0.0
    scored: float = 0.0

    @property
    def longest_scored(self) -> float:
        """The longest row to be expected of all that are scored."""
        return max(self.longest, self.scored)


def row_lengths(
    data: DataConfig,
    sources: Mapping[SourceFile, float],
    image_tokens: int,
    count_tokens: Callable[[Sequence[str]], int] | None = None,
    elsewhere: float = 0,
) -> Lengths:
    """Tokens a row, by the texts and images, of ``image_tokens`` each, of the first rows of each of ``sources``, each with the
    rows that it stands for (:func:`files_read`). Rows of a task that the run makes are as long as its rows were; those of the
    hub, not here before the run, as long as rows may be: ``elsewhere`` of them beside those of ``sources``.
    ``count_tokens``: how many tokens texts have; 3.5 characters are one by default."""
    from emloc_ray.data.formats import MOST_CHARACTERS
    from emloc_ray.data.images import encoded_bytes, image_parts
    from emloc_ray.data.reading import BadRow, Place, value_errors
    from emloc_ray.data.row_formats import CHATS, converted
    from emloc_ray.demos.tasks import ROW_TOKENS
    from emloc_ray.errors import DataError

    limit = data.max_seq_length
    if data.generate == "vqa":
        question = _VQA_TOKENS + image_tokens
        return Lengths(min(question, limit), min(question + _VQA_TOKENS, limit), 1.0, _VQA_BYTES)
    chats = data.row_format in {*CHATS, "auto"} and not data.packing
    most_images = limit // image_tokens if image_tokens and chats else 0
    # As many images as fit count for memory, which may run out; one counts for the disk.
    unread = (float(limit), most_images, _IMAGE_BYTES if most_images else 0.0)
    if data.packing or (not sources and (elsewhere or data.generate is None)):
        mean, *of_images = unread
        return Lengths(mean, mean, *of_images)
    if not sources:
        assert data.generate is not None
        mean, longest = ROW_TOKENS[data.generate]
        return Lengths(min(mean, limit), min(longest, limit))
    weights: list[float] = []
    counts: list[tuple[float, int, float]] = []  # of each row: its tokens, its images, and their bytes
    if elsewhere:
        weights.append(elsewhere)
        counts.append(unread)
    for weight, source, number, row in _first_rows(data, sources):
        place, kind, images, size = Place.of(source, number), "text", 0, 0
        form = source.format or data.row_format
        with contextlib.suppress(DataError), value_errors(place):  # a bad row, which is skipped
            row, kind = (row, kind) if isinstance(row, BadRow) else converted(row, form, data.columns, place)
            if kind == "messages":
                images = sum(1 for _ in image_parts(row))
                size = encoded_bytes(row, place.folder)
        texts = [text[: limit * MOST_CHARACTERS] for text in _texts(row)]
        read = sum(map(len, texts)) / _CHARACTERS_PER_TOKEN if count_tokens is None else count_tokens(texts)
        turns = row.get("messages")
        read += _TURN_TOKENS * len(turns) if isinstance(turns, list) else 0
        weights.append(weight)
        counts.append((min(read + image_tokens * images, limit), images, size))
    mean, *of_images = (sum(map(mul, weights, column)) / sum(weights) for column in zip(*counts, strict=True))
    return Lengths(mean, min(1.25 * max(tokens for tokens, _, _ in counts), limit), *of_images)


def files_read(files: Sequence[SourceFile], taken: Mapping[int, int]) -> dict[SourceFile, float]:
    """Eight of a split's files or, where it has more parts, one of each: the largest of some neighbours, each with the rows that
    it stands for, which are its and their share of the rows ``taken`` of their part."""
    read = {}
    for part, count in taken.items():
        every = [file for file in files if file.part == part]
        step = min(len(every), -(-len(every) * len(taken) // _FILES_READ))
        for begin in range(0, len(every), step):
            near = every[begin : begin + step]
            rows = sum(file.num_rows for file in near) / sum(file.num_rows for file in every)
            read[max(near, key=lambda file: file.num_rows)] = count * rows
    return read


def _first_rows(
    data: DataConfig, sources: Mapping[SourceFile, float]
) -> Iterator[tuple[float, SourceFile, int, Row | BadRow]]:
    """Some two hundred rows, as many of each file, with the rows that each stands for, their file and number."""
    from emloc_ray.data.reading import read_rows
    from emloc_ray.data.row_formats import columns_of

    for source, rows in sources.items():
        numbers = range(min(-(-_ROWS_READ // len(sources)), source.num_rows))
        columns = columns_of(source.format or data.row_format, data.columns)
        for number, row in read_rows(source, numbers, *columns, data.on_error == "skip"):
            yield rows / len(numbers), source, number, row


def _texts(row: Row) -> list[str]:
    """A row's texts; images inside messages have none."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return [value for value in row.values() if isinstance(value, str)]
    contents = [turn.get("content") for turn in turns]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return [str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in parts]
