"""Token shards: Arrow files with fixed boundaries, read by row number through a memory map."""

import bisect
import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from emloc_ray.data.formats import RowImage, Tokens
from emloc_ray.errors import ArtifactError, DamagedArtifactError
from emloc_ray.io.formats.arrow_schemas import check_as_written
from emloc_ray.io.store.atomic import atomic_file, write_json
from emloc_ray.io.store.node_cache import ListedFiles, open_newest

_INDEX = "index.json"
_COUNTS = b"counts"
_ROWS_PER_BATCH = 256
BATCH_BYTES = 2**25  # of images
_CONNECTIONS = 8  # by which shards are fetched at once
TOKEN_BYTES = 5  # at most: its id and its bit of the mask
_LISTED_BYTES = 50  # of a token in Python's lists, as measured
_TYPES = {
    "input_ids": pa.list_(pa.int32()),
    "completion_mask": pa.list_(pa.bool_()),
    "images": pa.list_(pa.struct([("content", pa.large_binary()), ("end", pa.int32())])),
}
_ALWAYS = ("input_ids", "completion_mask")
_SCHEMAS = tuple(pa.schema([(name, _TYPES[name]) for name in names]) for names in (_ALWAYS, _TYPES))


def shard_name(number: int) -> str:
    """The file of one shard."""
    return f"shard-{number:05d}.arrow"


def write_shard(
    path: Path,
    rows: Iterable[Tokens],
    counts: Mapping[str, int] | None = None,
    with_images: bool = False,
    batch_bytes: int = BATCH_BYTES,
) -> int:
    """Writes rows as one Arrow IPC file, atomically, with ``counts``; returns the number of rows.

    ``counts`` is read after the rows, so that their iterator may count. At most 256 rows are held at once, or
    ``batch_bytes`` of images and a row. ``with_images``: whether rows may show images.
    """
    empty = to_table([], with_images)
    written = 0
    with atomic_file(path) as file, pa.ipc.new_file(file, empty.schema) as writer:
        for group in _groups(rows, batch_bytes):
            writer.write_table(to_table(group, with_images))
            written += len(group)
        [last] = empty.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], empty.schema)]
        writer.write_batch(last, custom_metadata={_COUNTS: json.dumps(dict(counts or {}))})
    return written


def _groups(rows: Iterable[Tokens], batch_bytes: int) -> Iterator[list[Tokens]]:
    group: list[Tokens] = []
    size = 0
    for row in rows:
        group.append(row)
        size += sum(len(image.content) for image in row.images)
        if len(group) == _ROWS_PER_BATCH or size >= batch_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def written_counts(path: Path) -> dict[str, int] | None:
    """The counts that a shard was written with; None where there is no whole shard."""
    try:
        with open_newest(path) as (stream, *_), pa.ipc.open_file(stream) as reader:
            check_as_written(reader.schema, _SCHEMAS, path)
            metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1).custom_metadata
            return json.loads(metadata[_COUNTS])
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError, DamagedArtifactError):
        return None


def write_index(directory: Path, rows_per_shard: Sequence[int], counts: dict[str, Any]) -> None:
    """Writes the split's index: how many rows each shard holds, and the counts."""
    write_json(directory / _INDEX, {"rows_per_shard": list(rows_per_shard), **counts})


class TokenShards:
    """A split's rows by their position; shards are mapped, not read, so that any order costs the same."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / _INDEX
        self._files = ListedFiles(self.directory)
        self._files.ensure(path)
        if not path.is_file():
            raise ArtifactError(f"{self.directory} holds no {_INDEX}: the data stage did not finish; run again.")
        self.index: dict[str, Any] = json.loads(path.read_text())
        self._present: set[int] = set()
        self._starts = list(itertools.accumulate(self.index["rows_per_shard"], initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def has_images(self) -> bool:
        """Whether any row shows an image."""
        return bool(self.index.get("images"))

    @property
    def row_bytes(self) -> float:
        """The mean bytes of a row as it is read: of its tokens, in lists, and of its encoded images."""
        counts = [self.index.get(name, 0) for name in ("tokens", "image_bytes")]
        return (_LISTED_BYTES * counts[0] + counts[1]) / max(1, len(self))

    @property
    def num_shards(self) -> int:
        """How many shard files there are."""
        return len(self._starts) - 1

    def row(self, position: int) -> Tokens:
        """The row at a position of the whole split."""
        number = self._shard_of(position)
        return _row(self._table(number), position - self._starts[number])

    def rows(self, positions: Iterable[int]) -> dict[int, Tokens]:
        """The rows at some positions, by these, ascending; of a store several of their shards are fetched at once."""
        ascending = sorted(set(positions))  # each shard is opened once
        self._fetch_all(dict.fromkeys(map(self._shard_of, ascending)))
        return {position: self.row(position) for position in ascending}

    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each row ``(rows,)``."""
        self._fetch_all(range(self.num_shards))
        columns = [self._table(number)["input_ids"] for number in range(self.num_shards)]
        counts = [pc.list_value_length(column).to_numpy() for column in columns]
        return np.concatenate(counts).astype(np.int64) if counts else np.zeros(0, np.int64)

    def first_position(self, number: int) -> int:
        """The position of a shard's first row in the whole split."""
        return self._starts[number]

    def shard(self, number: int) -> list[Tokens]:
        """All rows of one shard."""
        table = self._table(number)
        return [_row(table, position) for position in range(table.num_rows)]

    def _shard_of(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    def _fetch_all(self, numbers: Iterable[int]) -> None:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(self._fetch, numbers))

    def _fetch(self, number: int) -> Path:
        path = self.directory / shard_name(number)
        if number not in self._present or not path.is_file():  # a node short of room drops what it can fetch again
            with contextlib.suppress(FileNotFoundError):  # gone from the store since it was listed
                self._files.ensure(path)
            self._present.add(number)
        return path

    def _table(self, number: int) -> pa.Table:
        path = self._fetch(number)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, though the index names it: run the data stage again.")
        status = path.stat()
        return _open(str(path), status.st_ino, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _open(path: str, inode: int, modified: int) -> pa.Table:
    # Inode and time are part of the cache's key: a worker may outlive the shards that it has mapped.
    reader = pa.ipc.open_file(pa.memory_map(path))
    check_as_written(reader.schema, _SCHEMAS, Path(path))
    return reader.read_all()


def to_table(rows: Sequence[Tokens], with_images: bool = False) -> pa.Table:
    """Rows as columns; ``with_images``: with a column of images. Of joined rows one holds their lengths."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _TYPES}
    columns["images"] = [[{"content": bytes(i.content), "end": i.end} for i in row.images] for row in rows]
    names = _TYPES if with_images else _ALWAYS
    table = pa.table({name: pa.array(columns[name], _TYPES[name]) for name in names})
    if not any(row.row_lengths for row in rows):
        return table
    return table.append_column("row_lengths", pa.array([row.row_lengths for row in rows], pa.list_(pa.int32())))


def from_table(table: pa.Table) -> list[Tokens]:
    """The rows of :func:`to_table`."""
    return [_row(table, position) for position in range(table.num_rows)]


def _row(table: pa.Table, position: int) -> Tokens:
    """Copies the tokens; the images stay in the mapped file."""
    ids, mask = (table[name][position].as_py() for name in _ALWAYS)
    shown = table["images"][position].values if "images" in table.column_names else ()
    images = tuple(RowImage(memoryview(i["content"].as_buffer()).cast("B"), i["end"].as_py()) for i in shown)
    lengths = table["row_lengths"][position].as_py() if "row_lengths" in table.column_names else ()
    return Tokens(ids, mask, images, tuple(lengths))


# Gives a model's inputs for the images of a batch's rows, from these and the batch's token ids.
ImagesToInputs = Callable[[Sequence[Sequence[bytes | memoryview]], Tensor], dict[str, Tensor]]


PAD_MULTIPLE = 8


def padded_length(length: int, multiple: int = PAD_MULTIPLE) -> int:
    """The length of a batch whose longest row has ``length`` tokens."""
    return -(-length // multiple) * multiple


def collate(
    rows: Sequence[Tokens], pad_token_id: int, images: ImagesToInputs | None = None, multiple: int = PAD_MULTIPLE
) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``completion_mask``, each ``(rows, length)``, and what ``images``
    makes of the rows' images; of joined rows also ``position_ids``, which begin again at each, and at the padding."""
    length = padded_length(max(len(row) for row in rows), multiple)
    ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=bool)
    completion = np.zeros((len(rows), length), dtype=bool)
    for line, row in enumerate(rows):
        ids[line, : len(row)] = row.input_ids
        mask[line, : len(row)] = True
        completion[line, : len(row)] = row.completion_mask
    batch: dict[str, Tensor] = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask).long(),
        "completion_mask": torch.from_numpy(completion),
    }
    if any(row.row_lengths for row in rows):
        batch["position_ids"] = torch.stack([_positions(row.row_lengths or (len(row),), length) for row in rows])
    shown = [[image.content for image in row.images] for row in rows]
    return batch if images is None else batch | images(shown, batch["input_ids"])


def _positions(row_lengths: Sequence[int], length: int) -> Tensor:
    return torch.cat([torch.arange(count) for count in (*row_lengths, length - sum(row_lengths))])
