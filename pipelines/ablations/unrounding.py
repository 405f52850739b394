"""A model from a file of 4 or 5 bits as it may have been before it was rounded.

Weights that lie on a grid of 4 bits are nearly restored by any other grid of 4 bits, so that emulators of 4 bits look better
than they are. Noise within half a step of that grid is what rounding may have taken away.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emloc_ray.errors import ConfigError
from emloc_ray.io.store.atomic import write_json
from emloc_ray.modeling.gguf_import import import_gguf
from emloc_ray.modeling.loading import resolve_source

_BLOCK = 32  # inputs that share a grid in llama.cpp's Q4_0, Q4_1, Q4_K, Q5_0 and Q5_1
_LEVELS = 32  # of 5 bits; what is rounded to 6 or 8 bits moves a grid of 4 too little to matter
_TOLERANCE = 1e-2  # in steps: weights are read back in float32, steps were stored in float16
_SEED = 0


def make_unrounded(source: str, out_dir: Path) -> None:
    """Writes a ``.gguf`` model as a bfloat16 checkpoint, each linear with noise within half a step of its grid.

    Raises:
        ConfigError: no weight of the source lies on a grid of 4 or 5 bits.
    """
    generator = torch.Generator().manual_seed(_SEED)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent) as folder:
        model_dir = Path(folder) / out_dir.name
        import_gguf(resolve_source(source), model_dir, "float32")
        changed = 0
        for file in sorted(model_dir.glob("*.safetensors")):
            tensors = load_file(file)
            noisy = {name: with_noise(tensor, generator) for name, tensor in tensors.items()}
            changed += sum(tensor is not None for tensor in noisy.values())
            whole = {name: tensors[name] if tensor is None else tensor for name, tensor in noisy.items()}
            narrow = {name: tensor.to(torch.bfloat16) for name, tensor in whole.items()}
            save_file(narrow, file, metadata={"format": "pt"})
        if not changed:
            raise ConfigError(f"unrounded: no weight of {source} lies on a grid of 4 or 5 bits: take unrounded out.")
        config_path = model_dir / "config.json"
        write_json(config_path, {**json.loads(config_path.read_text()), "dtype": "bfloat16"})
        model_dir.rename(out_dir)


def with_noise(weight: Tensor, generator: torch.Generator) -> Tensor | None:
    """``w + u``, ``u`` uniform within half a step, where each 32 inputs of an output hold 32 evenly spaced values at most.

    A step is the smallest distance between two values of the 32. None where a weight is off that grid.
    """
    if weight.dim() != 2 or weight.shape[1] % _BLOCK:
        return None
    blocks = weight.float().unflatten(1, (-1, _BLOCK))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    gaps = blocks.sort(-1).values.diff(dim=-1)
    step = torch.where(gaps > (high - low) / (2 * _LEVELS), gaps, torch.inf).amin(-1, keepdim=True)
    levels = (blocks - low) / step  # all 0 where the 32 are equal, whose step is infinite
    if (levels - levels.round()).abs().max() > _TOLERANCE or levels.max() > _LEVELS - 1 + _TOLERANCE:
        return None
    noise = (torch.rand(blocks.shape, generator=generator) - 0.5) * torch.where(step.isinf(), 0, step)
    return (blocks + noise).flatten(1).to(weight.dtype)
