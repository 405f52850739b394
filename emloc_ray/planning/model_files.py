"""What is seen of a model's files before they are read: the dtype of their numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emloc_ray.io.formats.checkpoint import SINGLE_NAME, read_index, read_shard
from emloc_ray.io.store.shared import Shared

if TYPE_CHECKING:
    from emloc_ray.config.schema import RunConfig
    from emloc_ray.modeling.loading import ModelSource


def file_dtype_of(source: ModelSource) -> torch.dtype | None:
    """The dtype of most numbers in the model's files: single tensors may be wider, as biases of routers are. None for a GGUF
    file, and before a model of the hub is fetched."""
    if source.gguf_file is not None:
        return None
    return _DTYPES.get((source, source.looks), lambda: _most_numbers(source.directory))


def named_dtype(
    config: RunConfig, source: ModelSource, model_config: Any, file_dtype: torch.dtype | None = None
) -> torch.dtype:
    """What ``model.dtype`` names; ``auto``: what the model's config does, else the dtype of its files, where it is known."""
    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    named = None if source.gguf_file else getattr(model_config, "dtype", None)
    return named or file_dtype or torch.float32


_DTYPES = Shared[torch.dtype | None](8)  # as most tasks of a batch have the same model


def _most_numbers(directory: Path) -> torch.dtype | None:
    files = {directory / name for name in read_index(directory).values() or (SINGLE_NAME,)}
    numbers: Counter[torch.dtype] = Counter()
    for file in filter(Path.is_file, files):
        for entry in read_shard(file).entries:
            numbers[entry.dtype] += entry.num_bytes // entry.dtype.itemsize if entry.dtype.is_floating_point else 0
    return max(+numbers, key=numbers.__getitem__, default=None)
