"""Reads, formats and tokenizes every split into token shards with fixed boundaries: by Ray Data, small data by one process."""

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emloc_ray.data.chats import Segment
from emloc_ray.data.formats import MOST_CHARACTERS, Tokens, check_row, encode, pack, sequences, truncate
from emloc_ray.data.image_places import NOWHERE_ELSE, ImagePlaces, is_remote
from emloc_ray.data.images import load_images, sources
from emloc_ray.data.polling import polled
from emloc_ray.data.processors import counts_apart, open_processor
from emloc_ray.data.reading import BadRow, Row, each, value_errors
from emloc_ray.data.row_formats import CHATS, converted
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import shard_name, write_index, write_shard, written_counts
from emloc_ray.data.units import Unit, mapped, shard_units
from emloc_ray.errors import DataError
from emloc_ray.io.runs.fingerprint import Looks, looks_in
from emloc_ray.io.store.node_cache import ensure, sizes

_COUNTS = (
    "rows",
    "tokens",
    "truncated_rows",
    "truncated_tokens",
    "dropped_rows",
    "skipped_rows",
    "images",
    "image_bytes",
)
ROWS_PER_SHARD = 1024  # of text
ROWS_PER_BATCH = 256
IMAGE_ROWS_PER_BATCH = 32
LEAST_CHARACTERS = 2
"""Of a token, on average, as memory is planned; one beyond ASCII counts as three, its bytes in UTF-8."""


@dataclass(frozen=True)
class TokenizeOptions:
    """How rows become tokens; equal options and equal rows give equal shards."""

    tokenizer: str
    format: str
    max_seq_length: int
    packing: bool = False
    trust_remote_code: bool = False
    has_encoder: bool = False
    skip_bad_rows: bool = False
    image_places: ImagePlaces = NOWHERE_ELSE
    columns: tuple[tuple[str, str], ...] = ()  # our names of the file's columns
    embedded: int = 0  # tokens that the model embeds; 0: not known

    @property
    def may_show_images(self) -> bool:
        """Whether rows' images are read: the model has a processor for them, and messages show some."""
        return self._may_show and open_processor(self.tokenizer, self.trust_remote_code) is not None

    @property
    def _may_show(self) -> bool:
        return self.format in {*CHATS, "auto"}

    def tokens(self, rows: Iterable[tuple[str, Row]], whole: bool = False) -> Iterator[list[Tokens] | None]:
        """Checks rows, each with the place that errors name, and gives their tokens before they are cut: one sequence a row,
        several of a chat whose template rewrites earlier turns; None for a bad row that is skipped. Holds at most 256 rows, or
        32 with their images, and of longer rows fewer. Of a text that is many times too long the end is left out unless
        ``whole``."""
        tokenizer = _tokenizer(self.tokenizer, self.trust_remote_code)
        processor = open_processor(self.tokenizer, self.trust_remote_code)
        takes_images = self._may_show and processor is not None
        most = IMAGE_ROWS_PER_BATCH if takes_images else ROWS_PER_BATCH
        for batch in _batches(rows, most, LEAST_CHARACTERS * ROWS_PER_BATCH * self.max_seq_length):
            asks = takes_images and any(_asks_a_server(row, where) for where, row in batch)
            parts = each(functools.partial(self._sequences, tokenizer, processor), batch, asks)
            made_of = [segments for row in parts for segments in row or ()]
            encoded = iter(encode(made_of, tokenizer) if whole else _encoded(made_of, tokenizer, self.max_seq_length))
            for (where, _), row in zip(batch, parts, strict=True):
                made = None if row is None else list(itertools.islice(encoded, len(row)))
                self._check_embedded(made or (), tokenizer, where)
                yield made

    def _check_embedded(self, sequences_of_row: Sequence[Tokens], tokenizer: Any, where: str) -> None:
        """Raises DataError where the model embeds no such token, whatever is skipped: other rows will have it too. Of rows with
        images some tokens only stand for these."""
        for tokens in sequences_of_row:
            last = max(tokens.input_ids, default=0)
            if self.embedded and last >= self.embedded and not tokens.images:
                raise DataError(
                    f"{where}: token {last} ({tokenizer.decode([last])!r}) is beyond the {self.embedded} that the model embeds:"
                    " resize its embedding (model.resize_token_embeddings), or take the token out of its tokenizer."
                )

    def _sequences(self, tokenizer: Any, processor: Any, item: tuple[str, Row]) -> list[list[Segment]] | None:
        where, row = item
        chats = any(getattr(owner, "chat_template", None) for owner in (tokenizer, processor))
        form = getattr(where, "row_format", "") or self.format
        try:
            if isinstance(row, BadRow):
                raise row.error
            with value_errors(where):
                row, kind = converted(row, form, dict(self.columns), where, chats)
                check_row(row, kind, where, self.packing)
                shows = self._may_show and processor is not None
                images = load_images(row, where, self.image_places) if shows else []
                made = sequences(row, kind, tokenizer, where, self.has_encoder, processor, images)
                _check_turns(made, processor, where)
                return made
        except DataError:
            if self.skip_bad_rows:
                return None
            raise


def _batches(rows: Iterable[tuple[str, Row]], most: int, characters: int) -> Iterator[list[tuple[str, Row]]]:
    """Rows in groups of at most ``most``, a group ended by the row with which it has so many ``characters``: memory is planned
    for rows of ``max_seq_length`` tokens, and rows may be of any length before they are cut."""
    batch: list[tuple[str, Row]] = []
    held = 0
    for where, row in rows:
        batch.append((where, row))
        held += _characters(row)
        if len(batch) == most or held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _characters(row: Row) -> int:
    """Of all texts in a row, however deep it is; see :data:`LEAST_CHARACTERS`."""
    count, left = 0, list[Any](row.values())
    while left:
        value = left.pop()
        if isinstance(value, str):
            count += len(value) if value.isascii() else 3 * len(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
    return count


def _encoded(rows: Sequence[list[Segment]], tokenizer: Any, limit: int) -> Iterator[Tokens]:
    """Sequences as tokens, the first ``limit`` as :func:`encode` gives them: of a sequence many times too long its beginning is
    encoded, and the whole where its tokens are so wide that these are few."""
    most = limit * MOST_CHARACTERS
    begun = [_beginning(parts, most) for parts in rows]
    for parts, first, tokens in zip(rows, begun, encode(begun, tokenizer), strict=True):
        yield encode([parts], tokenizer)[0] if first is not parts and len(tokens) < 2 * limit else tokens


def _beginning(parts: list[Segment], most: int) -> list[Segment]:
    """Pieces of a sequence that have its first ``most`` characters; the sequence itself where it has no more, or shows images,
    whose tokens are made."""
    if sum(len(part.text) for part in parts) <= most or any(part.images for part in parts):
        return parts
    begun: list[Segment] = []
    for part in parts:
        if most > 0:
            begun.append(part._replace(text=part.text[:most]))
            most -= len(part.text)
    return begun


def _check_turns(sequences_of_row: list[list[Segment]], processor: Any, where: str) -> None:
    """Raises DataError where images in several turns get other tokens than pixels: tokens are made turn by turn, pixels of all
    images together."""
    turns = max((sum(bool(segment.images) for segment in parts) for parts in sequences_of_row), default=0)
    if turns > 1 and not counts_apart(processor):
        raise DataError(
            f"{where}: it shows images in several turns, and the model's processor makes fewer tokens of an image beside"
            " others: show all in one turn."
        )


def _asks_a_server(row: Row, where: str) -> bool:
    folder = getattr(where, "folder", ".")
    return any(is_remote(str(source[1]), folder) for source in sources(row) if source[0] in ("path", "url"))


@dataclass(frozen=True)
class ShardTokenizer:
    """Turns units of work into shard files: a function without state, which may run again anywhere. A unit is a few
    neighbouring shards of a split: the number of the first, the rows a shard, and where each begins."""

    options: TokenizeOptions
    splits: dict[str, RowSelection]
    out_dir: Path

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One line for each shard: split, number and counts."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the work is shared out by Ray
        results = [result for unit in batch["unit"] for result in self._shards(json.loads(unit))]
        return {key: np.array([result[key] for result in results]) for key in results[0]}

    def _shards(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Keeps shards that are written already; reads the others as one stream."""
        selection, bounds = self.splits[unit["split"]], unit["bounds"]
        stream: Iterator[tuple[str, Row]] | None = None
        for shard, begin in enumerate(bounds[:-1], unit["first"]):
            path = self.out_dir / unit["split"] / shard_name(shard)
            counts = written_counts(path)
            if counts is not None:
                stream = None
            else:
                stream = stream or selection.read(begin, bounds[-1], self.options.format, dict(self.options.columns))
                counts = self._write(path, itertools.islice(stream, unit["rows_per_shard"]))
            yield {"split": unit["split"], "shard": shard, **counts}

    def _write(self, path: Path, rows: Iterable[tuple[str, Row]]) -> dict[str, int]:
        counts = dict.fromkeys(_COUNTS, 0)
        kept = self._kept(rows, counts)
        if self.options.packing:
            kept = pack(kept, self.options.max_seq_length)
        write_shard(path, _counted(kept, counts), counts, self.options.may_show_images)
        return counts

    def _kept(self, rows: Iterable[tuple[str, Row]], counts: dict[str, int]) -> Iterator[Tokens]:
        limit = self.options.max_seq_length
        for row in self.options.tokens(rows):
            counts["skipped_rows"] += row is None
            for tokens in row or ():
                cut = truncate(tokens, limit)
                counts["truncated_rows"] += len(tokens) > limit
                counts["truncated_tokens"] += max(0, len(tokens) - limit)
                counts["dropped_rows"] += cut is None
                if cut is not None:
                    yield cut


def _counted(rows: Iterable[Tokens], counts: dict[str, int]) -> Iterator[Tokens]:
    for row in rows:
        counts["rows"] += 1
        counts["tokens"] += len(row)
        counts["images"] += len(row.images)
        counts["image_bytes"] += sum(len(image.content) for image in row.images)
        yield row


@dataclass(frozen=True)
class RowLengths:
    """Counts the tokens that a shard would hold of each of a unit's rows, in all its sequences; 0 for a row that is dropped."""

    options: TokenizeOptions
    selection: RowSelection

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One line for each row, in order, with the unit's first shard."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        firsts, lengths = [], []
        for unit in map(json.loads, batch["unit"]):
            options = self.options
            rows = self.selection.read(unit["bounds"][0], unit["bounds"][-1], options.format, dict(options.columns))
            for row in options.tokens(rows):
                cut = (truncate(tokens, options.max_seq_length) for tokens in row or ())
                firsts.append(unit["first"])
                lengths.append(sum(len(tokens) for tokens in cut if tokens is not None))
        return {"first": np.array(firsts, dtype=np.int64), "length": np.array(lengths, dtype=np.int64)}


def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    return _open_tokenizer(path, trust_remote_code, looks_in(Path(path)))


@functools.lru_cache(maxsize=1)
def _open_tokenizer(path: str, trust_remote_code: bool, looks: Looks) -> Any:
    from transformers import AutoTokenizer

    ensure(Path(path), weights=False)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    # Rows are cut to max_seq_length here and counted, so the tokenizer's own warning would mislead.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def first_unwritten(splits: dict[str, RowSelection], out_dir: Path, rows_per_shard: dict[str, int]) -> str:
    """The first missing token shard, in words."""
    for split, selection in splits.items():
        written = {path.name for path in sizes(out_dir / split)}  # each appeared whole
        for number in range(len(selection.bounds(rows_per_shard[split])) - 1):
            if shard_name(number) not in written:
                return f"token shard {number} of {split}"
    return "the token shards' counts"


def tokenize_splits(
    splits: dict[str, RowSelection],
    options: TokenizeOptions,
    out_dir: Path,
    *,
    rows_per_shard: dict[str, int],
    num_workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: int = 0,
) -> dict[str, dict[str, int]]:
    """Writes ``out_dir/SPLIT/shard-*.arrow`` and an index for each split; returns the counts of each split.

    Keeps whole shards that are in ``out_dir`` already: the caller knows that they are of these rows. The driver holds a few
    numbers a shard, never a row's; workers hold a batch of rows and their tokens, for which each asks Ray for ``memory`` bytes.
    Raises DataError for the first bad row, with file, row and field; or where a split keeps no row. ``progress`` hears how many
    shards are done, and every second in which none is; what it raises ends the work.
    """
    work = [
        unit for split, selection in splits.items() for unit in shard_units(split, selection, rows_per_shard[split])
    ]
    total = sum(len(unit["bounds"]) - 1 for unit in work)
    results: list[dict[str, Any]] = []
    made = mapped(work, ShardTokenizer(options, splits, out_dir), splits.values(), num_workers, memory)
    with polled(made.blocks(), lambda: progress(len(results), total), made.end) as blocks:
        for block in blocks:
            results += (dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True))
            progress(len(results), total)
    return {split: _write_split_index(split, results, options, out_dir / split) for split in splits}


def row_lengths(
    selection: RowSelection,
    options: TokenizeOptions,
    num_workers: int,
    look: Callable[[int], None] = lambda done: None,
    memory: int = 0,
) -> NDArray[np.int64]:
    """The tokens that are kept of every row of the selection, in its order. ``look`` hears how many blocks of rows are done, and
    every second in which none is; what it raises ends the work. ``memory``: as for :func:`tokenize_splits`."""
    work = list(shard_units("", selection, ROWS_PER_BATCH))
    made = mapped(work, RowLengths(options, selection), [selection], num_workers, memory)
    blocks: list[Any] = []
    with polled(made.blocks(), lambda: look(len(blocks)), made.end) as given:
        for block in given:
            blocks.append(block)
            look(len(blocks))
    firsts, lengths = (np.concatenate([block[key] for block in blocks]) for key in ("first", "length"))
    return lengths[np.argsort(firsts, kind="stable")]


def _write_split_index(
    split: str, results: list[dict[str, Any]], options: TokenizeOptions, directory: Path
) -> dict[str, int]:
    shards = sorted((r for r in results if r["split"] == split), key=lambda r: r["shard"])
    counts = {key: int(sum(shard[key] for shard in shards)) for key in _COUNTS}
    if counts["rows"] == 0:
        skipped = f" of the good ones ({counts['skipped_rows']} are bad)" if counts["skipped_rows"] else ""
        kept = "its images and a completion token" if options.may_show_images else "a completion token"
        raise DataError(
            f"data.{split}: no row{skipped} keeps {kept} within data.max_seq_length {options.max_seq_length}: raise it."
        )
    # Without places, which may be the run's own: runs share the results of equal rows.
    shared = {key: value for key, value in asdict(options).items() if key not in ("tokenizer", "image_places")}
    shared["skip_bad_rows"] &= counts["skipped_rows"] > 0  # else the tokens are those of data.on_error: fail
    write_index(directory, [int(shard["rows"]) for shard in shards], {**counts, "options": shared})
    return counts
