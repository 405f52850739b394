"""Streamed shards are what safetensors itself reads, byte for byte what was put in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import DTYPES, Checkpoint, TensorEntry, read_shard
from emloc_ray.io.formats.shards import chunk_limit, copy_chunks, make_header, row_chunks, stream_shard, write_tensors


def entry(name: str, dtype: torch.dtype, *shape: int) -> TensorEntry:
    """A tensor yet to be written."""
    count = 1
    for size in shape:
        count *= size
    return TensorEntry(name, Path("nowhere"), dtype, shape, 0, count * dtype.itemsize)


def test_safetensors_reads_what_we_stream(tmp_path: Path) -> None:
    tensors = {
        f"{name}.weight": (torch.arange(15).reshape(5, 3) % 2).to(torch.float32).to(dtype)
        for name, dtype in DTYPES.items()
    }
    tensors["scalar"] = torch.tensor(2.5)
    tensors["no.rows"] = torch.zeros(0, 3)
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    entries = [entry(name, tensor.dtype, *tensor.shape) for name, tensor in tensors.items()]
    path = tmp_path / "s.safetensors"
    stream_shard(path, make_header(entries), ((e, iter([tensors[e.name]])) for e in entries))
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == tensor.dtype
            assert torch.equal(got.float(), tensor.float()), name


def test_header_is_padded_to_eight_bytes() -> None:
    for length in range(1, 12):
        assert len(make_header([entry("n" * length, torch.float32, 2)])) % 8 == 0


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_under_the_verbatim_header_is_the_same_file(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], dtype: str, chunk_bytes: int
) -> None:
    for shard in Checkpoint(tiny_model_dir(dtype=dtype)).shards:
        target = tmp_path / shard.file.name
        stream_shard(target, shard.header, ((e, copy_chunks(e, chunk_bytes)) for e in shard.entries))
        assert target.read_bytes() == shard.file.read_bytes()


@given(rows=st.integers(0, 9), columns=st.integers(1, 5), chunk_bytes=st.integers(1, 200))
def test_chunks_cover_all_rows_once_and_stay_small(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, chunk_bytes: int
) -> None:
    tensor = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    path = tmp_path_factory.mktemp("chunks") / "a.safetensors"
    save_file({"t": tensor}, path)
    chunks = list(row_chunks(read_shard(path).entries[0], chunk_bytes))
    assert torch.equal(torch.cat([part for _, part in chunks]), tensor)
    assert [begin for begin, _ in chunks] == [sum(len(part) for _, part in chunks[:i]) for i in range(len(chunks))]
    assert all(part.numel() * 4 <= max(chunk_bytes, 4 * columns) for _, part in chunks)


def test_one_chunk_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"t": torch.randn(64, 16), "u": torch.randn(32, 16)}, tmp_path / "a.safetensors")
    shard = read_shard(tmp_path / "a.safetensors")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, read = 0, TensorEntry.read_rows

    def watched(entry: TensorEntry, *rows: int) -> torch.Tensor:
        nonlocal most
        assert not list(alive)
        alive.add(chunk := read(entry, *rows))
        most = max(most, chunk.nbytes)
        return chunk

    monkeypatch.setattr(TensorEntry, "read_rows", watched)
    stream_shard(tmp_path / "b", shard.header, ((e, copy_chunks(e, 512)) for e in shard.entries))
    assert most == 512
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_chunks_are_a_fraction_of_the_largest_tensor() -> None:
    assert chunk_limit(2**25, 2**30) == 2**25
    assert chunk_limit(2**25, 2**27) == 2**24
    assert chunk_limit(2**25, 10) == 2**16
    assert chunk_limit(4096, 2**30) == 4096


@pytest.mark.parametrize("given_rows", [1, 3])
def test_a_wrong_number_of_bytes_raises_and_leaves_nothing(tmp_path: Path, given_rows: int) -> None:
    wanted = entry("t", torch.float32, 2, 2)
    path = tmp_path / "s.safetensors"
    with pytest.raises(ArtifactError, match=f"tensor t got {8 * given_rows} of 16 bytes"):
        stream_shard(path, make_header([wanted]), [(wanted, iter([torch.zeros(given_rows, 2)]))])
    assert not list(tmp_path.iterdir())


def test_a_tensor_left_out_raises(tmp_path: Path) -> None:
    first, second = entry("a", torch.float32, 2), entry("b", torch.float32, 2)
    path = tmp_path / "s.safetensors"
    with pytest.raises(ArtifactError, match=r"s\.safetensors"):
        stream_shard(path, make_header([first, second]), [(first, iter([torch.zeros(2)]))])
    assert not list(tmp_path.iterdir())


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"t": torch.arange(6.0).reshape(2, 3).T, "p": torch.nn.Parameter(torch.ones(2)), "s": torch.tensor(3)}
    tensors |= {"odd": torch.ones(3, dtype=torch.bfloat16), "flag": torch.tensor([True]), "none": torch.empty(0, 4)}
    write_tensors(path, tensors, {"k": "v"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "v"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
