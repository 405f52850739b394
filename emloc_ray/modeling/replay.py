"""A model that no process holds whole, run block by block through its own forward pass.

The pass is replayed for every block: finished blocks give back what they gave before, the current one computes, and the pass
stops. Masks, rotary tables and whatever else a model makes between its blocks are thus its own code's.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_ray.errors import StageError
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.modeling.block_outputs import BlockOutput
from emloc_ray.modeling.block_weights import BlockWeights
from emloc_ray.modeling.packing import packs_known


class _BlockSkipped(Exception):
    """Ends a pass that goes on to a later block without the current one."""


class _BlockDone(Exception):
    """Ends a pass once the current block has given its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class BlockReplay:
    """A checkpoint's model with the weights outside its blocks, and those of one block at a time; others are on the meta
    device.

    ``flow``: in which order its blocks run, and what each reads.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False, **options: Any) -> None:
        """``options`` as :class:`BlockWeights` has them. Raises ArtifactError where the checkpoint lacks a weight that the pass
        needs."""
        from emloc_ray.data.processors import example

        self.weights = BlockWeights(directory, trust_remote_code=trust_remote_code, integers=False, **options)
        self.model, self.device = self.weights.model, self.weights.device
        self.flow = block_flow(self.weights.config, trust_remote_code, example(directory, trust_remote_code))
        self.body = getattr(self.model, self.model.base_model_prefix, self.model)
        self._loaded: str | None = None
        self._current = -1
        self._outputs: Mapping[int, BlockOutput] = {}
        head = self.model.get_output_embeddings()
        unread = {name for name, module in self.model.named_modules(remove_duplicate=False) if module is head}
        for names in self.weights.outside():  # the pass never reaches the head
            if not all(name.rpartition(".")[0] in unread for name in names):
                self.weights.load(names)
        for position, name in enumerate(self.flow.order):
            block = self.model.get_submodule(name)
            block.forward = functools.partial(self._forward_block, position, block.forward)

    def load_block(self, position: int) -> None:
        """Reads the block's weights; those of every other block are dropped."""
        self.drop_blocks()
        self._loaded = name = self.flow.order[position]
        self.weights.load_integers(name)
        for parameter, _ in self.weights.parameters_of(name):
            self.weights.load([parameter])

    def drop_blocks(self) -> None:
        """Drops the weights of the block that was read."""
        if self._loaded is None:
            return
        self.weights.drop_integers(self._loaded)
        for name, parameter in self.weights.parameters_of(self._loaded):
            self.weights.place(name, nn.Parameter(parameter.to("meta"), False))
        self._loaded = None

    @torch.no_grad()
    def forward(self, position: int, inputs: dict[str, Any], outputs: Mapping[int, BlockOutput]) -> BlockOutput | None:
        """:meth:`compute` without gradients."""
        return self.compute(position, inputs, outputs)

    def compute(self, position: int, inputs: dict[str, Any], outputs: Mapping[int, BlockOutput]) -> BlockOutput | None:
        """What the block at ``position``, loaded before, gives for ``inputs``; ``outputs`` holds every earlier block's.

        None where it does not run for them, as a vision tower's does not without an image. Raises StageError where the model
        runs its blocks in another order than it was traced in, or not this one.
        """
        self._current, self._outputs = position, outputs
        try:
            with packs_known(inputs):
                self.body(**inputs, use_cache=False)
        except _BlockDone as done:
            return BlockOutput.of(done.output, self.flow.order[position])
        except _BlockSkipped:
            return None
        finally:
            self._outputs = {}
        raise StageError(f"{self.flow.order[position]} did not run: set model.hold to offloaded.")

    def _forward_block(self, position: int, compute: Any, *args: Any, **kwargs: Any) -> Any:
        if position > self._current and self._current in self.flow.optional:
            raise _BlockSkipped
        if position > self._current:
            raise StageError(f"{self.flow.order[position]} ran out of turn: set model.hold to offloaded.")
        if position < self._current:
            return self._outputs[position].value(self.device)
        raise _BlockDone(compute(*args, **kwargs))
