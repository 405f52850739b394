"""A GGUF file's weights as safetensors, one tensor at a time, by the tables of transformers' own loader.

That loader holds all tensors before it writes any. Its tables are private names, and of some architectures a tensor is made of
several (experts): where that is so, or the names are gone, :class:`NeedsWhole` is raised and the model is opened whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emloc_ray.io.formats.checkpoint import SINGLE_NAME, TensorEntry, write_index
from emloc_ray.io.formats.shards import make_header, stream_shard
from emloc_ray.modeling.architecture import empty_model

_CHUNK_ROWS = 1024  # dequantized at a time, and written at a time
_TRANSPOSED = ("gpt2",)  # whose head the loader's table puts aside itself


class NeedsWhole(Exception):
    """The model cannot be converted tensor by tensor."""


def converted_names(model: Any) -> dict[str, str]:
    """The model's name of each tensor, by its name in a GGUF file; tensors that another is tied to are left out.

    ``model`` may be on the meta device.

    Raises:
        NeedsWhole: where the loader's tables do not give each tensor of the model one of the file.
    """
    from emloc_ray.modeling.stored_names import stored_parameters

    try:
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

        if model.config.model_type in _TRANSPOSED:
            raise NeedsWhole
        names: dict[str, str] = get_gguf_hf_weights_map(model, TensorProcessor())
    except (ImportError, NotImplementedError) as error:
        raise NeedsWhole from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = dict(model.all_tied_weights_keys)
    names = {theirs: ours for theirs, ours in names.items() if ours not in tied}
    stored = stored_parameters(model, shapes)
    kept = [name for name in shapes if name not in tied]
    if sorted(names.values()) != sorted(kept) or any(
        name not in stored or stored[name].own_name != name for name in kept
    ):
        raise NeedsWhole
    return names


def needs_whole(model_config: Any) -> bool:
    """Whether the weights of models of this config have to be opened whole to be converted."""
    key = model_config.to_json_string(use_diff=False)
    if key not in _WHOLE:
        try:
            converted_names(empty_model(model_config))
            _WHOLE[key] = False
        except NeedsWhole:
            _WHOLE[key] = True
    return _WHOLE[key]


_WHOLE: dict[str, bool] = {}  # by the config, which is asked about several times while a run is planned


def write_weights(file: Path, model: Any, directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Writes the weights of ``model``, which may be on the meta device, as shards of at most so many bytes, named as transformers
    names them. Held at a time: one tensor in float32, or two of it where the model lays it out otherwise.

    Raises:
        NeedsWhole: as :func:`converted_names`, or where the file does not hold those tensors in the model's shapes.
    """
    names, convert = converted_names(model), _opened(file, model, dtype)
    if not set(names) <= set(convert) or _keeps_float32(model, dtype):
        raise NeedsWhole
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sizes = {theirs: dtype.itemsize * int(np.prod(shapes[ours], dtype=np.int64)) for theirs, ours in names.items()}
    shards: list[list[str]] = [[]]
    held = 0
    for theirs in names:
        if shards[-1] and held + sizes[theirs] > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(theirs)
        held += sizes[theirs]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path = directory / name
        entries = [TensorEntry(names[t], path, dtype, shapes[names[t]], 0, sizes[t]) for t in shard]
        chunks = ((entry, convert[t](entry.shape)) for entry, t in zip(entries, shard, strict=True))
        stream_shard(path, make_header(entries), chunks)
        weight_map.update((entry.name, name) for entry in entries)
    if len(shards) > 1:
        total = sum(sizes.values())
        write_index(directory, weight_map, total, total // dtype.itemsize)


def _opened(
    file: Path, model: Any, dtype: torch.dtype
) -> dict[str, Callable[[tuple[int, ...]], Iterator[torch.Tensor]]]:
    """For each tensor of the file what yields its rows, given the shape that the model has it in."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, read_field

    reader = GGUFReader(file)
    architecture = read_field(reader, "general.architecture")[0]
    # The loader lays out queries by it, or not at all.
    if f"{architecture}.attention.head_count_kv" not in reader.fields:
        raise NeedsWhole
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    reader.fields.clear()  # the vocabulary, an array for each of its tokens

    def rows_of(tensor: Any) -> Callable[[tuple[int, ...]], Iterator[torch.Tensor]]:
        def rows(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
            weights = _processed(processor, tensor)
            if weights.shape != shape:
                raise NeedsWhole
            for begin in range(0, len(weights), _CHUNK_ROWS):
                yield torch.from_numpy(np.array(weights[begin : begin + _CHUNK_ROWS], order="C")).to(dtype)

        return rows

    return {tensor.name: rows_of(tensor) for tensor in reader.tensors}


def _processed(processor: Any, tensor: Any) -> np.ndarray[Any, Any]:
    """The tensor in float32, laid out as the model has it."""
    result = processor.process(
        weights=_dequantized(tensor), name=tensor.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
    )
    if result.name != tensor.name:
        raise NeedsWhole
    weights: np.ndarray[Any, Any] = result.weights
    return weights


def _dequantized(tensor: Any) -> np.ndarray[Any, Any]:
    """In float32: by rows, as a whole matrix takes twice its size on the way."""
    from gguf import dequantize

    data = tensor.data
    if data.ndim < 2:
        return np.asarray(dequantize(data, tensor.tensor_type))
    weights = np.empty(tuple(int(size) for size in reversed(tensor.shape)), dtype=np.float32)
    for begin in range(0, len(data), _CHUNK_ROWS):
        part = slice(begin, begin + _CHUNK_ROWS)
        weights[part] = dequantize(data[part], tensor.tensor_type)
    return weights


def _keeps_float32(model: Any, dtype: torch.dtype) -> bool:
    """Whether the loader would leave modules in float32 where the model is narrower."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return dtype != torch.float32 and any(getattr(model, name, None) for name in names)
