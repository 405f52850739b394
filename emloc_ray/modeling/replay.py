"""A model that no process holds whole, run block by block through its own forward pass.

The pass is replayed for every block: finished blocks give back what they gave before, the current block computes, and
then the pass stops. Masks, rotary tables and whatever else a model makes between its blocks are thus its own code's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from emloc_ray.errors import StageError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.architecture import (
    auto_class,
    block_names,
    load_config,
)
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.modeling.block_outputs import BlockOutput
from emloc_ray.modeling.experts import unfuse
from emloc_ray.modeling.stored_names import require, stored_parameters


class _BlockSkipped(Exception):
    """Ends a pass that goes on to a later block without the current one."""


class _BlockDone(Exception):
    """Ends a pass once the current block has given its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class BlockReplay:
    """A checkpoint's model with the weights outside its blocks, and those of one block at a time.

    Attributes:
        model: the model; weights that are not loaded are on the meta device.
        flow: in which order its blocks run, and what each reads.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
    ) -> None:
        """Raises ArtifactError where the checkpoint lacks a weight that the pass needs."""
        from emloc_ray.data.processors import example

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.checkpoint = Checkpoint(directory)
        config = load_config(directory, trust_remote_code=trust_remote_code)
        self.dtype = _dtype(dtype, config, self.checkpoint)
        self.flow = block_flow(config, trust_remote_code, example(directory, trust_remote_code))
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(
                config, dtype=self.dtype, trust_remote_code=trust_remote_code, **options
            )
            self.model: Any = unfuse(model)
        self.model.tie_weights()  # again: what is made empty is made anew, and tied to nothing
        self.model.eval().requires_grad_(False)
        self.body = getattr(self.model, self.model.base_model_prefix, self.model)
        self._stored = stored_parameters(self.model, (entry.name for entry in self.checkpoint))
        self._current = -1
        self._outputs: Mapping[int, BlockOutput] = {}
        self._load_outside()
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            found, (owner, _, attribute) = self._stored.get(name), name.rpartition(".")
            placed = (found.read(self.checkpoint) if found is not None else buffer).to(self.device)
            self.model.get_submodule(owner)._buffers[attribute] = placed
        for position, name in enumerate(self.flow.order):
            block = self.model.get_submodule(name)
            block.forward = functools.partial(self._forward_block, position, block.forward)

    def _load_outside(self) -> None:
        """Reads the weights outside all blocks, but for the head, which the pass never reaches."""
        inside = tuple(f"{name}." for name in block_names(self.model))
        head = self.model.get_output_embeddings()
        aliases: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(inside):
                aliases.setdefault(id(parameter), []).append(name)
        owned = {name for name, module in self.model.named_modules(remove_duplicate=False) if module is head}
        for names in aliases.values():
            if not all(name.rpartition(".")[0] in owned for name in names):
                self._load(names)

    def _load(self, names: Sequence[str]) -> None:
        """Reads a weight, known by any of ``names`` in the checkpoint, into all of them."""
        stored = next((name for name in names if name in self._stored), names[0])
        weight = require(self._stored, stored, self.checkpoint).read(self.checkpoint)
        dtype = self._dtype_of(names) if weight.is_floating_point() else None
        placed = nn.Parameter(weight.to(self.device, dtype), False)
        for name in names:
            self._place(name, placed)

    def _dtype_of(self, names: Sequence[str]) -> torch.dtype:
        """The model's, but for what transformers keeps in float32 where that is narrower (``_keep_in_fp32_modules``)."""
        kept = self.model._get_dtype_plan(self.dtype)
        parts = {part for name in names for part in name.split(".")}
        return torch.float32 if any({*module.split(".")} <= parts for module in kept) else self.dtype

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, attribute = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[attribute] = parameter

    def load_block(self, position: int) -> None:
        """Reads the block's weights; those of every other block are dropped."""
        self.drop_blocks()
        for name, _ in self._parameters(position):
            self._load([name])

    def drop_blocks(self) -> None:
        """Drops the weights of all blocks."""
        for position in range(len(self.flow.order)):
            for name, parameter in self._parameters(position):
                if not parameter.is_meta:
                    self._place(name, nn.Parameter(parameter.to("meta"), False))

    def _parameters(self, position: int) -> list[tuple[str, nn.Parameter]]:
        name = self.flow.order[position]
        return list(self.model.get_submodule(name).named_parameters(prefix=name))

    @torch.no_grad()
    def forward(self, position: int, inputs: dict[str, Any], outputs: Mapping[int, BlockOutput]) -> BlockOutput | None:
        """What the block at ``position``, loaded before, gives for ``inputs``; ``outputs`` holds every earlier block's.

        None where it does not run for them, as a vision tower's does not without an image.

        Raises:
            StageError: where the model runs its blocks in another order than it was traced in, or not this one.
        """
        self._current, self._outputs = position, outputs
        try:
            self.body(**inputs, use_cache=False)
        except _BlockDone as done:
            return BlockOutput.of(done.output, self.flow.order[position])
        except _BlockSkipped:
            return None
        finally:
            self._outputs = {}
        raise StageError(f"{self.flow.order[position]} did not run: set calibration.mode to resident.")

    def _forward_block(self, position: int, compute: Any, *args: Any, **kwargs: Any) -> Any:
        if position > self._current and self._current in self.flow.optional:
            raise _BlockSkipped
        if position > self._current:
            raise StageError(f"{self.flow.order[position]} ran out of turn: set calibration.mode to resident.")
        if position < self._current:
            return self._outputs[position].value(self.device)
        raise _BlockDone(compute(*args, **kwargs))


def _dtype(wanted: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """What ``from_pretrained`` takes: as asked, else the config's, else the checkpoint's first floating dtype."""
    if wanted != "auto":
        found: torch.dtype = getattr(torch, wanted)
        return found
    stored = (entry.dtype for entry in checkpoint if entry.dtype.is_floating_point)
    return getattr(config, "dtype", None) or next(stored, torch.float32)
