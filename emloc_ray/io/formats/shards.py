"""safetensors shards written in a stream: the header first, then each tensor's bytes in chunks."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import DTYPES, TensorEntry
from emloc_ray.io.store.atomic import atomic_file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_SHARE = 8
_LEAST_CHUNK = 2**16


def chunk_limit(chunk_bytes: int, largest: int) -> int:
    """Bytes of a row chunk: ``chunk_bytes``, but at most an eighth of the ``largest`` tensor's bytes."""
    return min(chunk_bytes, max(largest // _LARGEST_SHARE, _LEAST_CHUNK))


def make_header(entries: Sequence[TensorEntry], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors header for tensors laid out in the order given, padded to 8 bytes as the format asks."""
    described: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        stop = offset + entry.num_bytes
        described[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(described, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def stream_shard(path: Path, header: bytes, tensors: Iterable[tuple[TensorEntry, Iterator[torch.Tensor]]]) -> None:
    """Writes a shard atomically: ``header``, then for each entry its row chunks, in the header's order. Raises ArtifactError
    where the chunks of a tensor do not add up to its entry's bytes, or the tensors to the header's."""
    described = json.loads(header)
    asked = max((item["data_offsets"][1] for name, item in described.items() if name != "__metadata__"), default=0)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        total = 0
        for entry, chunks in tensors:
            written = 0
            for chunk in chunks:
                written += file.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del chunk  # before the next is made
            if written != entry.num_bytes:
                raise ArtifactError(f"{path}: tensor {entry.name} got {written} of {entry.num_bytes} bytes: run again.")
            total += written
        if total != asked:
            raise ArtifactError(f"{path} got {total} of the {asked} bytes that its header asks for: run again.")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file, atomically, from the tensors' own memory: no second copy is made."""
    entries = [TensorEntry(name, path, t.dtype, tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()]
    # As safetensors orders them: wide types first, so that every tensor is aligned.
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    stream_shard(
        path, make_header(entries, metadata), ((entry, iter([tensors[entry.name].detach().cpu()])) for entry in entries)
    )


def row_chunks(entry: TensorEntry, chunk_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields ``(first row, rows)`` of a tensor, each of at most about ``chunk_bytes`` in its own dtype, and keeps none."""
    if not entry.shape or entry.num_bytes <= chunk_bytes:
        yield 0, entry.read_rows()
        return
    step = max(1, chunk_bytes // max(1, entry.num_bytes // entry.shape[0]))
    for begin in range(0, entry.shape[0], step):
        yield begin, entry.read_rows(begin, begin + step)


def copy_chunks(entry: TensorEntry, chunk_bytes: int) -> Iterator[torch.Tensor]:
    """Yields a tensor's rows unchanged, in chunks, and keeps none."""
    for _, rows in row_chunks(entry, chunk_bytes):
        yield rows
        del rows
