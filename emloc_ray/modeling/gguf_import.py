"""A GGUF file as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from emloc_ray.io.store.atomic import atomic_directory
from emloc_ray.modeling.architecture import auto_class, empty_model
from emloc_ray.modeling.gguf_weights import NeedsWhole, write_weights
from emloc_ray.modeling.loading import ModelSource, read_model_config


def import_gguf(source: ModelSource, directory: Path, dtype: str = "auto", max_shard_bytes: int = 2 * 10**9) -> None:
    """Writes a GGUF file as a plain sharded safetensors checkpoint with tokenizer and chat template, atomically.

    The weights are dequantized once, into float32 by default, tensor by tensor, but where :func:`write_weights` cannot; no
    trace of quantization stays in the config.
    """
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    config = read_model_config(source)
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
        AutoTokenizer.from_pretrained(source.directory, gguf_file=source.gguf_file).save_pretrained(temporary)


def _save_whole(source: ModelSource, config: Any, directory: Path, dtype: torch.dtype, max_shard_bytes: int) -> Any:
    # With the config that is read: each reading of the header takes seconds.
    model = auto_class(config).from_pretrained(source.directory, gguf_file=source.gguf_file, config=config, dtype=dtype)
    for holder in (model, model.config):
        for attribute in ("quantization_config", "hf_quantizer", "is_quantized", "quantization_method"):
            if attribute in vars(holder):
                delattr(holder, attribute)
    model.save_pretrained(directory, max_shard_size=max_shard_bytes)
    return model
