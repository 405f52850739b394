"""Our lazy reader against what safetensors itself writes and reads, and what it says of damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_artifacts import tensors_in
from tiny import make_config
from transformers import LlamaForCausalLM

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import DTYPES, INDEX_NAME, SINGLE_NAME, Checkpoint, read_shard, write_index


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(0))
    return values.to(torch.float32).to(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / SINGLE_NAME, {"format": "pt"})
    return directory / SINGLE_NAME


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_reads_what_safetensors_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": sample(dtype, 5, 3),
        "vector": sample(dtype, 7),
        "cube": sample(dtype, 2, 3, 4),
        "scalar": sample(dtype, 1)[0],
        "empty": sample(dtype, 0, 4),
    }
    save(tmp_path, tensors)
    checkpoint = Checkpoint(tmp_path)
    assert {entry.name for entry in checkpoint} == set(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(checkpoint.read(name), tensor), name
    assert checkpoint.num_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(("begin", "end"), [(0, None), (0, 1), (2, 5), (4, 99), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_slices(tmp_path: Path, dtype: torch.dtype, begin: int, end: int | None) -> None:
    tensor = sample(dtype, 7, 3, 2)
    save(tmp_path, {"other": sample(dtype, 11), "t": tensor})
    rows = Checkpoint(tmp_path).entry("t").read_rows(begin, end)
    assert same_bytes(rows, tensor[begin:end])


def test_what_is_read_is_ours_to_change(tmp_path: Path) -> None:
    file = save(tmp_path, {"t": torch.zeros(4)})
    Checkpoint(tmp_path).read("t").fill_(1)
    assert not load_file(file)["t"].any()


def test_header_is_verbatim(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.ones(3), "b": torch.ones(2, 2)})
    length = int.from_bytes(file.read_bytes()[:8], "little")
    assert read_shard(file).header == file.read_bytes()[8 : 8 + length]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_transformers_checkpoint(tiny_model_dir: Callable[..., Path], dtype: str) -> None:
    directory = tiny_model_dir(dtype=dtype)
    checkpoint = Checkpoint(directory)
    expected = tensors_in(directory)
    assert len(checkpoint.shards) > 1
    assert set(checkpoint.entries) == set(expected)
    assert all(same_bytes(checkpoint.read(name), tensor) for name, tensor in expected.items())
    assert checkpoint.num_bytes == json.loads((directory / INDEX_NAME).read_text())["metadata"]["total_size"]
    assert all(shard.entries[0].start == 8 + len(shard.header) for shard in checkpoint.shards)


def test_unknown_tensor(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.zeros(4)})
    checkpoint = Checkpoint(tmp_path)
    assert "t" in checkpoint
    assert "u" not in checkpoint
    with pytest.raises(ArtifactError, match="holds no tensor u"):
        checkpoint.read("u")


# Damage. Every error names the file.


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=SINGLE_NAME) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_shard(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    shutil.copytree(tiny_model_dir(), tmp_path / "m")
    victim = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ArtifactError, match="is missing") as caught:
        Checkpoint(tmp_path / "m")
    assert str(victim) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_cut_short_anywhere(tmp_path: Path, keep: int) -> None:
    file = save(tmp_path, {"a": torch.ones(30), "b": torch.ones(20)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="cut short") as caught:
        Checkpoint(tmp_path)
    assert str(file) in str(caught.value)


def test_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.ones(30), "b": torch.ones(20)})
    checkpoint = Checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:-4])
    last = max(checkpoint, key=lambda entry: entry.stop)
    with pytest.raises(ArtifactError, match=f"cut short in tensor {last.name}"):
        checkpoint.read(last.name)


def with_header(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"t": 3}',
        b'{"t": {"dtype": "F32", "shape": [1]}}',
        b'{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, "x"]}}',
        b'{"t": {"dtype": "F32", "shape": "a", "data_offsets": [0, 4]}}',
        b'{"t": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    ],
)
def test_bad_header(tmp_path: Path, header: bytes) -> None:
    file = with_header(tmp_path / SINGLE_NAME, header, b"\0" * 64)
    with pytest.raises(ArtifactError, match="header") as caught:
        Checkpoint(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("shape", "offsets"), [([1], [-4, 0]), ([-1, -1], [0, 4])])
def test_no_tensor_begins_before_the_data_or_has_a_negative_side(
    tmp_path: Path, shape: list[int], offsets: list[int]
) -> None:
    header = json.dumps({"t": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    (tmp_path / SINGLE_NAME).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match=r"tensor t has 4 bytes for shape \["):
        Checkpoint(tmp_path)


def test_sizes_that_disagree(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    file = with_header(tmp_path / SINGLE_NAME, header, b"\0" * 8)
    with pytest.raises(ArtifactError, match=r"tensor t has 8 bytes for shape \[3\]") as caught:
        Checkpoint(tmp_path)
    assert str(file) in str(caught.value)


def test_unknown_dtype(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    with_header(tmp_path / SINGLE_NAME, header, b"\0")
    with pytest.raises(ArtifactError, match="tensor t has dtype F4"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": [1]}', "[" * 100_000])
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=INDEX_NAME):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/../../x",
        "a\\..\\x",
        "C:\\x",
        "C:x",
        "a//x",
        "./x",
        "..",
        "",
        "a\0b",
    ],
)
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": name}}))
    with pytest.raises(ArtifactError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / INDEX_NAME} names {name!r} as a file of weights, which leads out")


def test_an_index_names_no_files_in_folders_below(tmp_path: Path) -> None:
    save(tmp_path / "part..1", {"a": sample(torch.float32, 2)})
    write_index(tmp_path, {"a": f"part..1/{SINGLE_NAME}"}, 8, 2)
    with pytest.raises(ArtifactError, match=r"names 'part\.\.1/model\.safetensors', .*: move it beside its index, and"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("sizes", [("1GB", "100KB"), ("100KB", "1GB")])
def test_of_a_whole_file_and_an_index_the_file_is_read_as_in_transformers(
    tmp_path: Path, sizes: tuple[str, str]
) -> None:
    for size in sizes:  # the second leaves what the first wrote, but for its shards
        LlamaForCausalLM(make_config("llama")).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX_NAME).is_file()
    assert (tmp_path / SINGLE_NAME).is_file()
    checkpoint, opened = Checkpoint(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert checkpoint.entries.keys() == opened.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in opened.items())


def test_index_as_transformers_writes_it(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    theirs = json.loads((tiny_model_dir() / INDEX_NAME).read_text())
    total = theirs["metadata"]
    write_index(tmp_path, theirs["weight_map"], total["total_size"], total["total_parameters"])
    ours = json.loads((tmp_path / INDEX_NAME).read_text())
    assert ours["weight_map"] == theirs["weight_map"]
    assert {key: int(value) for key, value in total.items()} == ours["metadata"]
