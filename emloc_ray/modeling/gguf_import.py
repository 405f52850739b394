"""A GGUF file as a plain checkpoint, one tensor at a time, by the tables of transformers' own loader, which holds all tensors.

The tables are private names, and of some architectures a tensor is made of several (experts): where that is so, or the names
are gone, the model is opened whole.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from emloc_ray.io.formats.checkpoint import SINGLE_NAME, TensorEntry, write_index
from emloc_ray.io.formats.shards import make_header, stream_shard
from emloc_ray.io.store.atomic import atomic_directory
from emloc_ray.modeling.architecture import auto_class, empty_model
from emloc_ray.modeling.loading import ModelSource, read_model_config, tokenizer_dir
from emloc_ray.modeling.stored_names import stored_parameters

_CHUNK_ROWS = 1024  # dequantized at a time, and written at a time
_TRANSPOSED = ("gpt2",)  # whose head the loader's table puts aside itself


class NeedsWhole(Exception):
    """The model cannot be converted tensor by tensor."""


class Header(NamedTuple):
    """What a file says before its weights: the config, and the files of the tokenizer by name. Reading either takes seconds."""

    config: Any
    tokenizer: dict[str, bytes]


def read_header(source: ModelSource, config: Any = None) -> Header:
    """A file's header; ``config`` where that is read already. Raises ConfigError where there is no tokenizer that opens."""
    files = tokenizer_dir(source).iterdir()
    return Header(config or read_model_config(source), {file.name: file.read_bytes() for file in files})


def import_gguf(
    source: ModelSource,
    directory: Path,
    dtype: str = "auto",
    header: Header | None = None,
    max_shard_bytes: int = 2 * 10**9,
) -> None:
    """Writes a GGUF file as a plain sharded safetensors checkpoint with tokenizer and chat template, atomically.

    Weights are dequantized once, into float32 by default, tensor by tensor where :func:`write_weights` can; no trace of
    quantization stays in the config.
    """
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    config, tokenizer = header or read_header(source)
    with atomic_directory(directory) as temporary:
        try:
            model = empty_model(config)
            write_weights(source.directory / str(source.gguf_file), model, temporary, wanted, max_shard_bytes)
        except NeedsWhole:
            for file in temporary.iterdir():
                file.unlink()
            model = _save_whole(source, config, temporary, wanted, max_shard_bytes)
        model.config.architectures, model.config.dtype = [type(model).__name__], wanted
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        del model
        for name, content in tokenizer.items():
            (temporary / name).write_bytes(content)


def _save_whole(source: ModelSource, config: Any, directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> Any:
    # With the config that is read: each reading of the header takes seconds.
    model = auto_class(config).from_pretrained(source.directory, gguf_file=source.gguf_file, config=config, dtype=dtype)
    for holder in (model, model.config):
        for attribute in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            if attribute in vars(holder):
                delattr(holder, attribute)
    model.save_pretrained(directory, max_shard_size=max_shard_bytes)
    return model


def converted_names(model: Any) -> dict[str, str]:
    """The model's name of each tensor, by its name in a GGUF file; tensors that another is tied to are left out. ``model`` may
    be on the meta device. Raises NeedsWhole where the loader's tables do not give each tensor of the model one of the file."""
    try:
        from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

        if model.config.model_type in _TRANSPOSED:
            raise NeedsWhole
    except ImportError as error:
        raise NeedsWhole from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = dict(model.all_tied_weights_keys)
    stored = stored_parameters(model, shapes)
    kept = [name for name in shapes if name not in tied]
    if any(name not in stored or stored[name].own_name != name for name in kept):
        raise NeedsWhole
    # By the model's own names first: for each module that it is asked about, the loader makes its table of all names anew.
    alone = SimpleNamespace(config=model.config, state_dict=lambda: shapes, named_children=tuple)
    for asked in (alone, model):
        try:
            names: dict[str, str] = get_gguf_hf_weights_map(asked, TensorProcessor())
        except (ImportError, NotImplementedError) as error:
            raise NeedsWhole from error
        names = {theirs: ours for theirs, ours in names.items() if ours not in tied}
        if sorted(names.values()) == sorted(kept):
            return names
    raise NeedsWhole


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
    """Writes the weights of ``model``, which may be on the meta device, as shards of at most so many bytes, named as
    transformers names them. Held at a time: one tensor in float32, or two of it where the model lays it out otherwise. Raises
    NeedsWhole, as :func:`converted_names`, or where the file does not hold those tensors in the model's shapes."""
    names = converted_names(model)
    processor, tensors = _opened(file, model)
    kept = any(getattr(model, key, None) for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    # The loader leaves the ``kept`` modules in float32.
    if not set(names) <= set(tensors) or (kept and dtype != torch.float32):
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
        chunks = ((e, _rows(processor, tensors[t], e.shape, dtype)) for e, t in zip(entries, shard, strict=True))
        stream_shard(path, make_header(entries), chunks)
        weight_map.update((entry.name, name) for entry in entries)
    if len(shards) > 1:
        total = sum(sizes.values())
        write_index(directory, weight_map, total, total // dtype.itemsize)


def _opened(file: Path, model: Any) -> tuple[Any, dict[str, Any]]:
    """What lays out the tensors of a file as the model has them, and the tensors by name."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, read_field

    reader = _reader(file)
    architecture = read_field(reader, "general.architecture")[0]
    # The loader lays out queries by it, or not at all.
    if f"{architecture}.attention.head_count_kv" not in reader.fields:
        raise NeedsWhole
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    return processor, {tensor.name: tensor for tensor in reader.tensors}


def _reader(file: Path) -> Any:
    """A GGUFReader that passes over lists, such as the vocabulary: it makes an array of each token, in 5 s of 50,000 tokens."""
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            content, size = self.data.data, struct.calcsize("<IQ")
            kind, count = (
                struct.unpack_from("<IQ", content, orig_offs) if raw_type == GGUFValueType.ARRAY else (None, 0)
            )
            if self.byte_order != "S" and kind in self.gguf_scalar_to_np:
                size += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            elif self.byte_order != "S" and kind == GGUFValueType.STRING:
                for _ in range(count):
                    size += struct.calcsize("<Q") + struct.unpack_from("<Q", content, orig_offs + size)[0]
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return size, [], [], [GGUFValueType.ARRAY]

    return Reader(file)


def _rows(processor: Any, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A tensor's rows, some at a time; raises NeedsWhole where it does not become one of this shape."""
    result = processor.process(
        weights=_dequantized(tensor), name=tensor.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
    )
    weights: np.ndarray[Any, Any] = result.weights
    if result.name != tensor.name or weights.shape != shape:
        raise NeedsWhole
    for begin in range(0, len(weights), _CHUNK_ROWS):
        yield torch.from_numpy(np.array(weights[begin : begin + _CHUNK_ROWS], order="C")).to(dtype)


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
