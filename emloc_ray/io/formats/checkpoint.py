"""A transformers checkpoint in safetensors, read lazily: headers first, tensors by byte range."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import operator
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from emloc_ray.errors import ArtifactError
from emloc_ray.io.store.node_cache import ListedFiles, open_newest, open_version, replaced

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_CONNECTIONS = 8  # by which headers are read at once
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are: ``[start, stop)`` in ``file``, whose content is ``version`` (None in a file system); in
    ``stream`` where the file is open."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    version: str | None = None
    stream: IO[bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    def read_rows(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows ``[begin, end)`` of the first dimension (all by default), in the stored dtype, owning their memory."""
        if not self.shape:
            return self._bytes(self.start, self.stop).view(self.dtype).reshape(())
        rows = self.shape[0]
        end = rows if end is None else min(end, rows)
        row_bytes = self.num_bytes // max(rows, 1)
        flat = self._bytes(self.start + begin * row_bytes, self.start + end * row_bytes)
        return flat.view(self.dtype).reshape(end - begin, *self.shape[1:])

    def slice(self, index: int) -> TensorEntry:
        """Slice ``index`` along the first dimension, as a tensor of its own."""
        return replace(self.span(index, index + 1), shape=self.shape[1:])

    def span(self, begin: int, end: int) -> TensorEntry:
        """Rows ``[begin, end)`` of the first dimension, as a tensor of its own."""
        size = self.num_bytes // self.shape[0]
        ends = self.start + begin * size, self.start + end * size
        return replace(self, shape=(end - begin, *self.shape[1:]), start=ends[0], stop=ends[1])

    def _bytes(self, start: int, stop: int) -> torch.Tensor:
        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        buffer = np.empty(stop - start, dtype=np.uint8)
        with contextlib.nullcontext(self.stream) if self.stream else open_version(self.file, self.version) as stream:
            stream.seek(start)
            try:
                count = stream.readinto(buffer.data)  # type: ignore[attr-defined]
            except FileNotFoundError as error:  # of a store, whose files are read by ranges
                raise ArtifactError(replaced(self.file)) from error
        if count != buffer.size:
            raise ArtifactError(f"{self.file} is cut short in tensor {self.name}: copy the file again.")
        return torch.from_numpy(buffer)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its verbatim header and its tensors in file order."""

    file: Path
    header: bytes
    entries: tuple[TensorEntry, ...]


def read_shard(file: Path, listed: ListedFiles | None = None) -> Shard:
    """Reads one safetensors header (https://github.com/huggingface/safetensors#format). ``listed``: as for :func:`open_newest`.
    Raises ArtifactError where the file is missing, no safetensors file, or shorter than its header says."""
    with _open(file, listed) as (_, shard):
        return shard


@contextlib.contextmanager
def open_shard(file: Path) -> Iterator[Shard]:
    """As :func:`read_shard`; tensors are read from the one open file while the block runs, and by ranges from the store where
    this node has no copy."""
    with _open(file) as (stream, shard):
        yield replace(shard, entries=tuple(replace(entry, stream=stream) for entry in shard.entries))


@contextlib.contextmanager
def _open(file: Path, listed: ListedFiles | None = None) -> Iterator[tuple[IO[bytes], Shard]]:
    with contextlib.ExitStack() as stack:
        try:
            stream, size, version = stack.enter_context(open_newest(file, listed))
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ArtifactError(f"{file} is cut short or no safetensors file: copy it again.")
            header = stream.read(length)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ArtifactError(
                f"{file} is missing, though the checkpoint's index names it: copy the checkpoint again."
            ) from error
        yield stream, _shard(file, header, size, version)


def _shard(file: Path, header: bytes, size: int, version: str | None) -> Shard:
    try:
        described: dict[str, Any] = json.loads(header)
        described.pop("__metadata__", None)
        read = [_entry(file, name, item, 8 + len(header), version) for name, item in described.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file} has no readable safetensors header: copy it again.") from error
    entries = sorted(read, key=lambda entry: entry.start)
    if entries and entries[-1].stop > size:
        raise ArtifactError(f"{file} is cut short: its header asks for {entries[-1].stop} bytes, it has {size}.")
    return Shard(file, header, tuple(entries))


def _entry(file: Path, name: str, item: dict[str, Any], base: int, version: str | None) -> TensorEntry:
    start, stop = map(operator.index, item["data_offsets"])
    if item["dtype"] not in DTYPES:
        raise ArtifactError(f"{file}: tensor {name} has dtype {item['dtype']}, which is not supported.")
    dtype, shape = DTYPES[item["dtype"]], tuple(map(operator.index, item["shape"]))
    if min((start, *shape)) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ArtifactError(f"{file}: tensor {name} has {stop - start} bytes for shape {list(shape)}: copy it again.")
    return TensorEntry(name, file, dtype, shape, base + start, base + stop, version)


def read_index(directory: Path, listed: ListedFiles | None = None) -> dict[str, str]:
    """The file of every tensor, by the checkpoint's index; empty where it has none, or ``model.safetensors`` too, which
    transformers opens first. Raises ArtifactError where the index holds no such map, or it names a file that is not in
    ``directory`` itself. ``listed``: its files."""
    index, listed = directory / INDEX_NAME, listed or ListedFiles(directory)
    listed.ensure(index)
    if not index.is_file() or directory / SINGLE_NAME in listed:
        return {}
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index} holds no readable weight_map: copy the checkpoint again.") from error
    for file in dict.fromkeys(weight_map.values()):
        check_inside(file, index)
        if len(Path(file).parts) > 1:  # what is made of a checkpoint has its shards by their names alone
            raise ArtifactError(
                f"{index} names {file!r}, which lies in a folder below: move it beside its index, and name it so."
            )
    return weight_map


def check_inside(name: str, index: Path) -> None:
    """Raises ArtifactError where a file's name in a map of weights leads out of the folder that the map, ``index``, is in."""
    parts = name.replace("\\", "/").split("/")
    if {"", ".", ".."} & {*parts} or ":" in parts[0] or "\0" in name:
        raise ArtifactError(
            f"{index} names {name!r} as a file of weights, which leads out of its folder: name files below the folder."
        )


class Checkpoint:
    """The safetensors shards of a local model directory, opened by their headers alone. Raises ArtifactError where there are no
    weights, or a shard is missing or cut short."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        listed = ListedFiles(self.directory)
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            self.shards = list(pool.map(functools.partial(read_shard, listed=listed), self._files(listed)))
        self.entries = {entry.name: entry for shard in self.shards for entry in shard.entries}

    def _files(self, listed: ListedFiles) -> list[Path]:
        weight_map = read_index(self.directory, listed)
        if weight_map:
            return [self.directory / name for name in sorted(set(weight_map.values()))]
        if self.directory / SINGLE_NAME in listed:
            return [self.directory / SINGLE_NAME]
        pickled = next((file.name for kind in _PICKLES for file in sorted(self.directory.glob(kind))), None)
        if pickled is not None:
            raise ArtifactError(
                f"{self.directory} holds no {SINGLE_NAME}, and {pickled} is a pickle, which may run code and is not read: where"
                " you trust it, open it with transformers' from_pretrained and name what save_pretrained writes."
            )
        raise ArtifactError(
            f"{self.directory} holds no {SINGLE_NAME} and no {INDEX_NAME}: give a checkpoint saved as safetensors."
        )

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.entries.values())

    def entry(self, name: str) -> TensorEntry:
        """Where ``name`` is; raises ArtifactError where it is not."""
        if name not in self.entries:
            raise ArtifactError(f"{self.directory} holds no tensor {name}: the checkpoint does not fit its config.")
        return self.entries[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its stored dtype."""
        return self.entry(name).read_rows()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self)


def write_index(directory: Path, weight_map: dict[str, str], total_size: int, total_parameters: int) -> None:
    """Writes ``model.safetensors.index.json`` as transformers does."""
    from emloc_ray.io.store.atomic import write_json

    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    write_json(directory / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
