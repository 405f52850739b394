"""A calibration slot whose model is larger than its worker: one block's weights at a time, hidden states on disk."""

import contextlib
import shutil
from pathlib import Path

import ray
import torch
from torch import Tensor

from emloc_ray.data.ahead import batches_by_length
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.grams import write_gram_shard, write_slot
from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.node_cache import ensure, exists, local_only
from emloc_ray.modeling.block_outputs import BlockOutput, read_outputs, write_outputs
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.replay import BlockReplay
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.ray.tasks import set_threads


def grams_file(out_dir: Path, position: int, num_blocks: int) -> Path:
    """Where a block's Grams over all slots are."""
    return out_dir / f"grams-{position + 1:05d}-of-{num_blocks:05d}.safetensors"


def part_file(out_dir: Path, slot: int, num_slots: int, position: int) -> Path:
    """Where a slot's Grams of a block wait to be summed; those of a single slot are the sums."""
    return out_dir / "slots" / f"slot-{slot:04d}-of-{num_slots:04d}" / f"block-{position:05d}.safetensors"


def last_node(out_dir: Path, slot: int, num_slots: int) -> str | None:
    """The node, by Ray's id, that a slot was begun on last; None where it never was. Of a run on an object store, its disk has
    the slot's hidden states."""
    path = _node_file(out_dir, slot, num_slots)
    ensure(path)
    return path.read_text() if path.is_file() else None


def _node_file(out_dir: Path, slot: int, num_slots: int) -> Path:
    return out_dir / "slots" / f"slot-{slot:04d}-of-{num_slots:04d}" / "node"


def outputs_file(out_dir: Path, position: int, shard: int, inputs: str = "") -> Path:
    """The file of one token shard's outputs: those of a block, and of earlier blocks that later ones read. Its name has the
    ``inputs``: on other nodes nobody removes the files of an earlier calibration."""
    return _hidden(out_dir) / inputs / f"block-{position:05d}" / f"shard-{shard:05d}.safetensors"


def _hidden(out_dir: Path) -> Path:
    return local_only(out_dir) / "hidden"


class StreamedSlot:
    """Takes its shards through one block after another; a block is safe once its Grams are written. The disk holds the hidden
    states of two blocks for the slot's shards, and whatever earlier outputs later blocks read."""

    def __init__(
        self, job: CalibrationJob, out_dir: Path, slot: int, num_slots: int, num_blocks: int, threads: int
    ) -> None:
        set_threads(threads)
        self.job, self.out_dir, self.slot, self.num_slots, self.num_blocks = job, out_dir, slot, num_slots, num_blocks
        self.shards = TokenShards(job.tokens_dir)
        self.numbers = job.shards_of(slot, num_slots)
        self.replay = BlockReplay(job.model_dir, **dict(job.model_options))
        if ray.is_initialized():
            write_text(_node_file(out_dir, slot, num_slots), ray.get_runtime_context().get_node_id())
        for other in _hidden(out_dir).glob("*") if job.inputs else ():
            if other.name != job.inputs:
                shutil.rmtree(other, ignore_errors=True)

    def position(self) -> int:
        """The last block up to which all Grams are written, by this slot or summed over all, and whose hidden states, which go
        with their node, are here; or -1. The last block of all needs none."""
        last = next((block - 1 for block in range(self.num_blocks) if not self._is_done(block)), self.num_blocks - 1)
        if last == self.num_blocks - 1:
            return last
        return next(filter(self._has_outputs, range(last, -1, -1)), -1)

    def _is_done(self, position: int) -> bool:
        # In this order: a part goes once the sum is there, perhaps between the two looks.
        has_part = self.num_slots > 1 and exists(self._part(position))
        return has_part or exists(grams_file(self.out_dir, position, self.num_blocks))

    def _has_outputs(self, position: int) -> bool:
        return all(self._outputs(position, number).is_file() for number in self.numbers)

    def _part(self, position: int) -> Path:
        return part_file(self.out_dir, self.slot, self.num_slots, position)

    def _outputs(self, position: int, number: int) -> Path:
        return outputs_file(self.out_dir, position, number, self.job.inputs)

    def accumulate(self, position: int) -> int:
        """Takes all the slot's shards through the block at ``position``, and counts them unless its Grams are written; returns
        that."""
        self.replay.load_block(position)
        hooks = None if self._is_done(position) else self._hooks(position)
        for number in self.numbers:
            self._pass_shard(position, number, hooks)
        if hooks is not None:
            self._write(position, hooks)
        for number in self.numbers if position else ():
            self._outputs(position - 1, number).unlink(missing_ok=True)
        return position

    def _hooks(self, position: int) -> GramHooks:
        groups = self.job.groups_of(self.replay.flow.order[position])
        return GramHooks(self.replay.model, groups, dict(self.job.streams), reread=self.job.reread)

    def _write(self, position: int, hooks: GramHooks) -> None:
        hooks.remove()
        hooks.check_finite()
        summed = grams_file(self.out_dir, position, self.num_blocks)
        if self.num_slots > 1:
            write_slot(self._part(position), hooks.grams, position)
        elif not exists(summed):  # not by a task that counted as lost, over what its successor wrote
            write_gram_shard(summed, hooks.grams)

    def _pass_shard(self, position: int, number: int, hooks: GramHooks | None) -> None:
        """Takes one token shard through the block; its hidden states before and after are all that is held of any, on the host
        but for a batch's."""
        before = read_outputs(self._outputs(position - 1, number)) if position else None
        rows = self.shards.shard(number)
        batches = batches_by_length(rows, self.job.batch_size, self.job.pad_token_id, self.job.images)
        after = [
            self._forward(position, batch, {} if before is None else before[index], hooks)
            for index, (_, batch) in enumerate(batches)
        ]
        if position + 1 < self.num_blocks:
            write_outputs(self._outputs(position, number), after)

    def _forward(
        self, position: int, batch: dict[str, Tensor], outputs: dict[int, BlockOutput], hooks: GramHooks | None
    ) -> dict[int, BlockOutput]:
        call = model_call(self.replay.model.config, batch, tokens=self.job.tokens).to(self.replay.device)
        with hooks.counting(call.counted) if hooks else contextlib.nullcontext():
            given = self.replay.forward(position, call.inputs, outputs)
        flow = self.replay.flow
        known = outputs if given is None else {**outputs, position: given}
        return {k: v.on_host() if flow.last_use(k) > position else v.shapes() for k, v in known.items()}

    def commit(self) -> None:
        """Every block was committed when it was done."""
        self.replay.drop_blocks()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
