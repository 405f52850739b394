"""Grams on disk: packed triangles in sharded safetensors, with an index of groups and token counts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emloc_ray.core.gram import Gram, packed_triangle, unpack_triangle
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Shard, TensorEntry, check_inside, open_shard, read_shard
from emloc_ray.io.formats.shards import make_header, row_chunks, stream_shard, write_tensors
from emloc_ray.io.store.atomic import read_json, write_json

INDEX = "grams.index.json"
_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class StoredGram:
    """One Gram in a file of :func:`write_gram_shard`; without a file the identity ``(order, order)``, over no token."""

    file: Path | None
    name: str
    order: int = 0

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The symmetric Gram ``(in, in)``, float32, unpacked on ``device``, to which half of its bytes go."""
        return unpack_triangle(self.packed().to(device))

    def packed(self) -> Tensor:
        """Its lower triangle as stored, ``(in (in + 1) / 2,)``; raises ArtifactError where the file does not hold it."""
        if self.file is None:
            return torch.cat([*packed_triangle(torch.eye(self.order))])
        entry = next((entry for entry in read_shard(self.file).entries if entry.name == self.name), None)
        if entry is None:
            raise ArtifactError(f"{self.file} holds no Gram of {self.name}: run the calibrate stage again.")
        return entry.read_rows()

    @property
    def num_tokens(self) -> int:
        """Tokens summed in it."""
        return 0 if self.file is None else gram_counts(self.file)[self.name]


class GramStore:
    """The calibration's Grams; one Gram stands for every linear of its group. Raises ArtifactError where the index is missing,
    or names a file that is not below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        path = self.directory / INDEX
        self.index: dict[str, Any] = read_json(path)
        if self.index is None:
            raise ArtifactError(f"{self.directory} holds no {INDEX}: run the calibrate stage again.")
        for file in dict.fromkeys(self.index["weight_map"].values()):
            check_inside(file, path)
        self._gram_of = {name: gram for gram, names in self.index["groups"].items() for name in names}

    def __contains__(self, linear: str) -> bool:
        return linear in self._gram_of

    def num_tokens(self, linear: str) -> int:
        """Tokens summed in the linear's Gram."""
        return int(self.index["num_tokens"][self._gram_of[linear]])

    def read(self, linear: str) -> Tensor:
        """The symmetric Gram ``(in, in)`` of the inputs of ``linear``, float32."""
        return self.stored(linear).read()

    def stored(self, linear: str) -> StoredGram:
        """Where the Gram of the inputs of ``linear`` is."""
        name, orders = self._gram_of[linear], self.index.get("orders", {})
        if name in orders:
            return StoredGram(None, name, orders[name])
        return StoredGram(self.directory / self.index["weight_map"][name], name)


def write_gram_shard(path: Path, grams: Mapping[str, Gram]) -> None:
    """Writes some Grams as packed triangles, their token counts beside them."""
    counts = {name: gram.num_tokens for name, gram in grams.items()}
    sizes = {name: len(gram.matrix) * (len(gram.matrix) + 1) // 2 for name, gram in grams.items()}
    entries = [TensorEntry(name, path, torch.float32, (size,), 0, 4 * size) for name, size in sorted(sizes.items())]
    header = make_header(entries, {"num_tokens": json.dumps(counts)})
    stream_shard(path, header, ((e, map(Tensor.float, packed_triangle(grams[e.name].matrix))) for e in entries))


def gram_counts(path: Path) -> dict[str, int]:
    """The token counts of the Grams that :func:`write_gram_shard` wrote."""
    return _written(read_shard(path)).num_tokens


class _Written(NamedTuple):
    """What a shard's metadata says of its sums: the tokens in each, and, of a slot's, the last token shard they hold."""

    num_tokens: dict[str, int]
    last_shard: int


def _written(shard: Shard) -> _Written:
    metadata = json.loads(shard.header)["__metadata__"]
    return _Written(json.loads(metadata["num_tokens"]), int(metadata.get("last_shard", -1)))


def write_gram_index(
    directory: Path,
    groups: Sequence[Sequence[str]],
    weight_map: dict[str, str],
    num_tokens: dict[str, int],
    routed_tokens: dict[str, int] | None = None,
    orders: dict[str, int] | None = None,
) -> None:
    """Writes the index, last: Grams without it do not count. ``weight_map`` holds paths from ``directory`` on;
    ``routed_tokens`` how many tokens experts were sent whose Gram is over others; ``orders`` those of the Grams over no token,
    which lie in no file."""
    named = {group[0]: list(group) for group in groups}
    index: dict[str, Any] = {"groups": named, "weight_map": weight_map, "num_tokens": num_tokens}
    more = {"routed_tokens": routed_tokens, "orders": orders}
    write_json(directory / INDEX, index | {key: value for key, value in more.items() if value})


def write_slot(path: Path, grams: dict[str, Gram], last_shard: int) -> None:
    """Commits a slot's sums so far together with the last shard they hold: both or neither."""
    counts = {name: gram.num_tokens for name, gram in grams.items()}
    metadata = {"last_shard": str(last_shard), "num_tokens": json.dumps(counts)}
    write_tensors(path, {name: gram.matrix for name, gram in grams.items()}, metadata)


def add_slot(path: Path, grams: Mapping[str, Gram]) -> int:
    """Adds a slot's committed sums to those of ``grams`` in place, some rows at a time; returns the last shard they hold."""
    with open_shard(path) as shard:
        return _add(shard, grams)


def _add(shard: Shard, grams: Mapping[str, Gram]) -> int:
    written = _written(shard)
    for entry in shard.entries:
        if entry.name in grams:
            gram = grams[entry.name]
            for begin, rows in row_chunks(entry, _CHUNK_BYTES):
                gram.matrix[begin : begin + len(rows)] += rows.to(gram.matrix.device)
            gram.num_tokens += written.num_tokens[entry.name]
    return written.last_shard


def last_shard(path: Path) -> int:
    """The last shard that a slot's committed sums hold."""
    return _written(read_shard(path)).last_shard


def reduce_slots(slots: Sequence[Path], names: Sequence[str], ends: Sequence[int] | None = None) -> dict[str, Gram]:
    """The sums over all slots of the Grams named, in slot order, so that the rounding is always the same. Raises ArtifactError
    where a slot's last shard is not its one of ``ends``, where these are given."""
    total: dict[str, Gram] = {}
    wanted: Sequence[int | None] = ends or [None] * len(slots)
    for path, end in zip(slots, wanted, strict=True):
        with open_shard(path) as shard:
            if end is not None and (last := _written(shard).last_shard) != end:
                raise ArtifactError(f"{path} holds the sums to {last}, not to {end}: run the same command again.")
            if not total:
                orders = {entry.name: entry.shape[0] for entry in shard.entries}
                total = {name: Gram.zero(orders[name]) for name in names}
            _add(shard, total)
    for gram in total.values():
        gram.matrix.tril_()
    return total
