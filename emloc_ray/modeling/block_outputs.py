"""What blocks give to the blocks after them, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc_ray.errors import StageError
from emloc_ray.io.formats.checkpoint import read_shard
from emloc_ray.io.formats.shards import write_tensors
from emloc_ray.modeling.block_flow import tensors_of
from emloc_ray.modeling.inputs import on_device


@dataclass(frozen=True)
class BlockOutput:
    """What a block gave: a tensor, or several and ``None``, as a tuple; on the meta device where only its shape is kept."""

    tensors: tuple[Tensor | None, ...]
    is_tuple: bool

    @classmethod
    def of(cls, output: Any, block: str) -> BlockOutput:
        """Raises StageError where the block gives something else."""
        parts = tensors_of(output)
        if parts is None:
            raise StageError(f"{block} returns {type(output).__name__}: set model.hold to offloaded.")
        return cls(parts, not isinstance(output, Tensor) and output is not None)

    def value(self, device: torch.device | str) -> Any:
        """As the block gave it. NaN stands for what was not kept: if it were read after all, its Grams would say so."""
        made = tuple(None if part is None else _materialized(part, device) for part in self.tensors)
        return made if self.is_tuple else made[0]

    def shapes(self) -> BlockOutput:
        """The same without its values."""
        return BlockOutput(tuple(None if t is None else t.to("meta") for t in self.tensors), self.is_tuple)

    def on_host(self) -> BlockOutput:
        """The same with its values in the host's memory, where they wait for others or for the disk."""
        return BlockOutput(tuple(t if t is None or t.is_meta else t.cpu() for t in self.tensors), self.is_tuple)


def _materialized(part: Tensor, device: torch.device | str) -> Tensor:
    if not part.is_meta:
        return on_device(part, device)
    empty = torch.empty(part.shape, dtype=part.dtype, device=device)
    return empty.fill_(float("nan")) if part.dtype.is_floating_point else empty.zero_()


# Batches of one token shard, each with every finished block's output by the block's position.
Outputs = Sequence[dict[int, BlockOutput]]


def write_outputs(path: Path, batches: Outputs) -> None:
    """Writes one safetensors file, atomically: the values that are kept, and the shapes of all."""
    tensors: dict[str, Tensor] = {}
    shapes: list[dict[str, Any]] = []
    for number, outputs in enumerate(batches):
        described: dict[str, Any] = {}
        for position, output in outputs.items():
            parts = [
                None if t is None else [str(t.dtype).removeprefix("torch."), list(t.shape)] for t in output.tensors
            ]
            described[str(position)] = [output.is_tuple, parts]
            for place, tensor in enumerate(output.tensors):
                if tensor is not None and not tensor.is_meta:
                    tensors[f"{number}.{position}.{place}"] = tensor.cpu()
        shapes.append(described)
    write_tensors(path, tensors, {"shapes": json.dumps(shapes)})


def read_outputs(path: Path) -> list[dict[int, BlockOutput]]:
    """What :func:`write_outputs` wrote."""
    shard = read_shard(path)
    stored = {entry.name: entry for entry in shard.entries}
    batches = []
    for number, described in enumerate(json.loads(json.loads(shard.header)["__metadata__"]["shapes"])):
        outputs = {}
        for position, (is_tuple, parts) in described.items():
            tensors: list[Tensor | None] = []
            for place, part in enumerate(parts):
                entry = stored.get(f"{number}.{position}.{place}")
                empty = None if part is None else torch.empty(part[1], dtype=getattr(torch, part[0]), device="meta")
                tensors.append(empty if entry is None else entry.read_rows())
            outputs[int(position)] = BlockOutput(tuple(tensors), is_tuple)
        batches.append(outputs)
    return batches
