"""Reads, formats and tokenizes every split into token shards with fixed boundaries: by Ray Data, small data by one process."""

import functools
import itertools
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emloc_ray.data.chats import Segment
from emloc_ray.data.formats import Tokens, check_row, encode, pack, sequences, truncate
from emloc_ray.data.image_places import NOWHERE_ELSE, ImagePlaces, is_remote
from emloc_ray.data.images import decode, load_images, sources
from emloc_ray.data.polling import polled
from emloc_ray.data.processors import open_processor
from emloc_ray.data.reading import BadRow, Row, each, value_errors
from emloc_ray.data.row_formats import CHATS, converted
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import shard_name, write_index, write_shard, written_counts
from emloc_ray.errors import DataError
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
ROWS_PER_BATCH = 256
IMAGE_ROWS_PER_BATCH = 32
# Of text that one process tokenizes in some 10 s: another takes as long to import transformers, and Ray Data 3 s to start.
SMALL_BYTES, SMALL_ROWS = 2**23, 2**14
_UNPACKED = 8  # times a compressed file's bytes, or more where its rows are much alike
_READS_PER_GROUP = 16

Unit = dict[str, Any]
Work = Callable[[dict[str, Any]], dict[str, Any]]


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

    @property
    def may_show_images(self) -> bool:
        """Whether rows' images are read: the model has a processor for them, and messages show some."""
        return self.format in {*CHATS, "auto"} and open_processor(self.tokenizer, self.trust_remote_code) is not None

    def tokens(
        self, rows: Iterable[tuple[str, Row]], decoder: Callable[[bytes], Any] = decode
    ) -> Iterator[list[Tokens] | None]:
        """Checks rows, each with the place that errors name, and gives their whole tokens: one sequence a row, several of a
        chat whose template rewrites earlier turns; None for a bad row that is skipped. Holds at most 256 rows, or 32 with their
        images, which ``decoder`` opens."""
        tokenizer = _tokenizer(self.tokenizer, self.trust_remote_code)
        stream = iter(rows)
        size = IMAGE_ROWS_PER_BATCH if self.may_show_images else ROWS_PER_BATCH
        while batch := list(itertools.islice(stream, size)):
            asks = self.may_show_images and any(_asks_a_server(row, where) for where, row in batch)
            parts = each(functools.partial(self._sequences, decoder), batch, asks)
            encoded = iter(encode([segments for row in parts for segments in row or ()], tokenizer))
            yield from (None if row is None else list(itertools.islice(encoded, len(row))) for row in parts)

    def _sequences(self, decoder: Callable[[bytes], Any], item: tuple[str, Row]) -> list[list[Segment]] | None:
        where, row = item
        tokenizer = _tokenizer(self.tokenizer, self.trust_remote_code)
        processor = open_processor(self.tokenizer, self.trust_remote_code)
        chats = any(getattr(owner, "chat_template", None) for owner in (tokenizer, processor))
        form = getattr(where, "row_format", "") or self.format
        try:
            if isinstance(row, BadRow):
                raise row.error
            with value_errors(where):
                row, kind = converted(row, form, dict(self.columns), where, chats)
                check_row(row, kind, where, self.packing)
                images = load_images(row, where, self.image_places, decoder) if self.may_show_images else []
                return sequences(row, kind, tokenizer, where, self.has_encoder, processor, images, decoder)
        except DataError:
            if self.skip_bad_rows:
                return None
            raise


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


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, trust_remote_code: bool) -> Any:
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
    ordered: NDArray[np.int64] = lengths[np.argsort(firsts, kind="stable")]
    return ordered


def shard_units(split: str, selection: RowSelection, rows_per_shard: int) -> Iterator[Unit]:
    """Units of work of neighbouring shards: of one shard each, where files can be entered at any row. A Parquet row group is
    read from its beginning: there a unit spans at least a sixteenth of the largest, so that it is read eight times in all."""
    bounds = selection.bounds(rows_per_shard).tolist()
    span = max(source.group_rows for source in selection.sources) / _READS_PER_GROUP
    first = 0
    for shard in range(1, len(bounds)):
        if bounds[shard] - bounds[first] >= span or shard == len(bounds) - 1:
            part = bounds[first : shard + 1]
            yield {"split": split, "first": first, "rows_per_shard": rows_per_shard, "bounds": part}
            first = shard


class InOneProcess:
    """Calls ``function`` on one unit after the other, in a task each. Ray runs them in one process: in one that is idle and has
    imported what they need, if there is one."""

    def __init__(self, work: Sequence[Unit], function: Work, memory: int) -> None:
        self._work, self._function, self._memory = work, function, memory
        self._at_work: Any = None
        self._turn, self._ended = threading.Lock(), False

    def blocks(self) -> Iterator[dict[str, Any]]:
        """What is made, by unit."""
        import ray

        function = ray.put(self._function)
        options = {"num_cpus": 1, "max_retries": 0, **({"memory": self._memory} if self._memory else {})}
        task: Any = ray.remote(_made).options(name=type(self._function).__name__, **options)
        for unit in self._work:
            with self._turn:
                if self._ended:
                    return
                self._at_work = task.remote(function, unit)
            try:
                block = ray.get(self._at_work)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            finally:
                self._at_work = None
            yield block

    def end(self) -> None:
        """Ends the process of the task at work, and begins no other."""
        import ray

        with self._turn:
            self._ended = True
        # To cancel a task whose result has just come ends this process: a check of Ray's fails (2.60).
        if (task := self._at_work) is not None and not ray.wait([task], timeout=0)[0]:
            ray.cancel(task, force=True)


def _made(function: Work, unit: Unit) -> dict[str, Any]:
    return function({"unit": [json.dumps(unit)]})


class ByRayData:
    """Calls ``function`` on all units, in a task each, some at a time."""

    def __init__(self, work: Sequence[Unit], function: Work, num_workers: int, memory: int) -> None:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.raise_original_map_exception = True  # its own, around ours, would lose it
        context.enable_progress_bars = context.print_on_execution_start = False  # our progress shows it
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log of an error it also raises
        # Its tasks' retries can be bounded in no other way.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        workers = ray.data.TaskPoolStrategy(size=min(num_workers, len(work)))
        # No retries: a row that kills its worker would kill one after another. The caller counts tries.
        self._dataset: Any = ray.data.from_items([{"unit": json.dumps(unit)} for unit in work]).map_batches(
            function, batch_size=1, num_cpus=1, memory=memory or None, compute=workers, max_retries=0
        )

    def blocks(self) -> Iterator[dict[str, Any]]:
        """What is made, by unit, in any order."""
        yield from self._dataset.iter_batches(batch_size=None, batch_format="numpy")

    def end(self) -> None:
        """Ends the processes of the tasks: Ray Data itself does so only where one that takes its rows leaves, and that one may be
        waiting for ever."""
        executor = getattr(self._dataset, "_current_executor", None)  # known from the first row on
        if executor is not None:
            executor.shutdown(force=True)


def mapped(
    work: Sequence[Unit], function: Work, selections: Iterable[RowSelection], num_workers: int, memory: int
) -> InOneProcess | ByRayData:
    """Calls ``function`` on each unit of the selections, in tasks that ask for a CPU and ``memory`` bytes of their node. It runs
    ``num_workers`` tasks at a time; of small data one, which is done sooner."""
    if is_small(selections):
        return InOneProcess(work, function, memory)
    return ByRayData(work, function, num_workers, memory)


def is_small(selections: Iterable[RowSelection]) -> bool:
    """Whether the local files of these rows are small, and show no images, which are other files."""
    sources = {source for selection in selections for source in selection.sources}
    if any(source.is_stored or source.images for source in sources):
        return False
    rows, text = sum(source.num_rows for source in sources), 0
    for source in sources:
        packed = _UNPACKED if source.path.lower().endswith((".parquet", ".gz", ".zst")) else 1
        text += packed * sum(sizes(Path(source.path)).values())  # of a file of the run, a store may have the only copy
    return rows <= SMALL_ROWS and text <= SMALL_BYTES


def _write_split_index(
    split: str, results: list[dict[str, Any]], options: TokenizeOptions, directory: Path
) -> dict[str, int]:
    shards = sorted((r for r in results if r["split"] == split), key=lambda r: r["shard"])
    counts = {key: int(sum(shard[key] for shard in shards)) for key in _COUNTS}
    if counts["rows"] == 0:
        skipped = f" of the good ones ({counts['skipped_rows']} are bad)" if counts["skipped_rows"] else ""
        raise DataError(
            f"data.{split}: no row{skipped} keeps its images and a completion token within data.max_seq_length"
            f" {options.max_seq_length}: raise it."
        )
    # Without places, which may be the run's own: runs share the results of equal rows.
    shared = {key: value for key, value in asdict(options).items() if key not in ("tokenizer", "image_places")}
    write_index(directory, [int(shard["rows"]) for shard in shards], {**counts, "options": shared})
    return counts
