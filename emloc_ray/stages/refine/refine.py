"""Refine: one block after another of the emulator is fitted to what the original's gives, by one worker.

Original and emulator go through the calibration rows side by side, a block's weights of each at a time, hidden states on
disk. A block is safe once what was fitted of it is written; then all is put into the emulator's shards.
"""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.core.precision import exact_float32
from emloc_ray.core.refinement import token_error
from emloc_ray.data.ahead import pinned
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint, TensorEntry, read_shard
from emloc_ray.io.formats.shards import copy_chunks, make_header, stream_shard, write_tensors
from emloc_ray.io.store.atomic import copy_file
from emloc_ray.io.store.node_cache import exists, local_only, sizes
from emloc_ray.modeling.block_outputs import BlockOutput, read_outputs, write_outputs
from emloc_ray.modeling.inputs import ModelCall, Stream, model_call, on_device
from emloc_ray.modeling.loading import copy_tokenizer
from emloc_ray.modeling.refining import Fit, fit_block, refined_in, store, stored_in
from emloc_ray.modeling.replay import BlockReplay
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, run_tasks, silent

_HELD_OUT = 8  # of so many rows one only says whether a block's fit is kept
_CHUNK_BYTES = 2**25
_FIT = "fit"


@dataclass(frozen=True)
class RefinementJob:
    """Artifact paths and flat settings; ``work_dir`` is where a killed try is continued from. ``inputs`` hashes what hidden
    states depend on, for old ones may lie on other nodes. ``tokens``: which count for the error; ``decoder_blocks`` are those
    that pass an encoder-decoder's answers on. A step is of ``batch_size`` rows, of which ``rows_at_once`` are read together,
    all by default."""

    model_dir: Path
    emulator_dir: Path
    tokens_dir: Path
    work_dir: Path
    out_dir: Path
    steps: int
    learning_rate: float
    tokens: str = "all"
    batch_size: int = 8
    rows_at_once: int | None = None
    pad_token_id: int = 0
    seed: int = 0
    inputs: str = ""
    model_options: tuple[tuple[str, Any], ...] = ()
    images: ImageInputs | None = None
    decoder_blocks: tuple[str, ...] = ()

    def block_file(self, position: int) -> Path:
        """Where what was fitted of a block is, and its :class:`Fit`."""
        return self.work_dir / f"block-{position:05d}.safetensors"


@dataclass(frozen=True)
class _Batch:
    """A batch as a block's fit reads it, on the host: the output of the original's block, where it runs, and that of the
    emulator's blocks before."""

    call: ModelCall
    wanted: BlockOutput | None
    before: dict[int, BlockOutput]


class Refiner:
    """Both models, a block of each at a time, and the batches of the rows: those to fit, then those that are held out."""

    def __init__(self, job: RefinementJob) -> None:
        self.job = job
        options = dict(job.model_options)
        self.replays = {
            "original": BlockReplay(job.model_dir, **options),
            "emulator": BlockReplay(job.emulator_dir, **options),
        }
        self.flow, self.device = self.replays["emulator"].flow, self.replays["emulator"].device
        self.shards = TokenShards(job.tokens_dir)
        rows = self._by_length()
        shown = {row for row in rows if self.shards.row(row).images} if self.shards.has_images else set()
        # Of each kind, as blocks of a tower run for rows that show an image alone.
        kinds = [row for row in rows if row not in shown], [row for row in rows if row in shown]
        held_out = [row for kind in kinds for row in kind[_HELD_OUT // 2 :: _HELD_OUT] or kind[:1]]
        apart = {*held_out}
        fitted = [row for row in rows if row not in apart] or rows
        self.batches: list[list[int]] = []
        self.fitted = [self._add(step) for step in _cut(fitted, job.batch_size)]
        self.held_out = self._add(held_out)

    def _by_length(self) -> list[int]:
        lengths = self.shards.lengths()
        return sorted(range(len(lengths)), key=lengths.__getitem__)

    def _add(self, rows: list[int]) -> range:
        """Cuts rows into batches; returns their numbers."""
        first = len(self.batches)
        self.batches += _cut(rows, self.job.rows_at_once or self.job.batch_size)
        return range(first, len(self.batches))

    def begin(self) -> int:
        """The first block to take: none where all were fitted; after the last one whose hidden states are here; else the first
        of all."""
        numbers = range(len(self.flow.order))
        if all(exists(self.job.block_file(k)) for k in numbers):
            return len(numbers)
        last = max((k for k in numbers if (self._hidden(k) / "whole").is_file()), default=-1)
        return last + 1 if all(exists(self.job.block_file(k)) for k in range(last + 1)) else 0

    def _hidden(self, position: int) -> Path:
        # By batches: a memory budget, which is no input, may have a later try take fewer rows at once.
        rows = self.job.rows_at_once or self.job.batch_size
        folder = local_only(self.job.work_dir) / "hidden" / self.job.inputs / f"rows-{rows}"
        return folder / f"block-{position:05d}"

    def take(self, position: int) -> None:
        """Refines the block at ``position``, unless a killed try has, and passes the rows through it."""
        self._pass("original", position)
        emulator, name = self.replays["emulator"], self.flow.order[position]
        emulator.load_block(position)
        block, file = emulator.model.get_submodule(name), self.job.block_file(position)
        if not exists(file):
            self._fit(position, block, name, file)
        _put(block, name, file)
        self._pass("emulator", position)
        (self._hidden(position) / "whole").touch()
        if position:
            shutil.rmtree(self._hidden(position - 1))

    def _fit(self, position: int, block: nn.Module, name: str, file: Path) -> None:
        job = self.job
        fit = fit_block(
            block,
            functools.partial(self._read, position),
            functools.partial(self._error, position),
            self.fitted,
            self.held_out,
            steps=job.steps,
            learning_rate=job.learning_rate,
            seed=job.seed + position,
            name=name,
        )
        kept = refined_in(block) if fit.is_better else {}
        weights = {f"{name}.{own}.{key}": t for own, linear in kept.items() for key, t in stored_in(linear).items()}
        stored_dtype = self.replays["emulator"].weights.stored_dtype  # which model.dtype need not be
        tensors = {key: weight.to(stored_dtype(key)) for key, weight in weights.items()}
        write_tensors(file, tensors, {_FIT: json.dumps([fit.before, fit.after])})

    def _call(self, number: int) -> ModelCall:
        rows = [self.shards.row(row) for row in self.batches[number]]
        batch = pinned(collate(rows, self.job.pad_token_id, self.job.images))
        config = self.replays["emulator"].model.config
        return model_call(config, batch, tokens=self.job.tokens)

    def _file(self, model: str, position: int, number: int) -> Path:
        return self._hidden(position) / f"{model}-{number:05d}.safetensors"

    def _before(self, model: str, position: int, number: int) -> dict[int, BlockOutput]:
        return read_outputs(self._file(model, position - 1, number))[0] if position else {}

    def _pass(self, model: str, position: int) -> None:
        """Takes all batches through a block; what they give is on disk then, with whatever later blocks read."""
        replay = self.replays[model]
        if model == "original":
            replay.load_block(position)
        for number in range(len(self.batches)):
            outputs = self._before(model, position, number)
            given = replay.forward(position, self._call(number).to(self.device).inputs, outputs)
            known = outputs if given is None else {**outputs, position: given}
            after = {
                k: v if k == position or self.flow.last_use(k) > position else v.shapes() for k, v in known.items()
            }
            write_outputs(self._file(model, position, number), [after])
        replay.drop_blocks()  # the other model's pass or fit comes next

    def _read(self, position: int, number: int) -> _Batch:
        wanted = read_outputs(self._file("original", position, number))[0].get(position)
        return _Batch(self._call(number), wanted, self._before("emulator", position, number))

    def _error(self, position: int, batch: _Batch) -> tuple[Tensor, int]:
        """A batch's error at what the block gives first, its hidden states, and the number of tokens."""
        call, wanted, given = batch.call.to(self.device), batch.wanted, None
        if wanted is not None:
            given = self.replays["emulator"].compute(position, call.inputs, batch.before)
        if wanted is None or given is None or given.tensors[0] is None or wanted.tensors[0] is None:
            return torch.zeros((), requires_grad=True), 0
        ours, theirs = given.tensors[0], on_device(wanted.tensors[0], self.device)
        inside = self.flow.order[position] in self.job.decoder_blocks
        streams: tuple[Stream, ...] = ("decoder" if inside else "row", "other")  # an image's blocks read its patches
        masks = [call.counted[stream] for stream in streams if stream in call.counted]
        counted = next((mask for mask in masks if mask.shape == ours.shape[:-1]), None)
        if counted is None or bool(counted.all()):  # asked on the host
            return token_error(ours, theirs), ours[..., 0].numel()
        return token_error(ours, theirs, on_device(counted, self.device)), int(counted.sum())


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _put(block: nn.Module, name: str, file: Path) -> None:
    """Puts what a file has of a refined block into it."""
    linears = refined_in(block)
    for entry in read_shard(file).entries:
        owner, _, key = entry.name.removeprefix(f"{name}.").rpartition(".")
        store(linears[owner], {key: entry.read_rows()})


@exact_float32()
def refine_blocks(job: RefinementJob) -> None:
    """Writes what is fitted of every block, in order, then the emulator that has it; what is there stays."""
    refiner = Refiner(job)
    for position in range(refiner.begin(), len(refiner.flow.order)):
        refiner.take(position)
    write_refined(job)
    shutil.rmtree(local_only(job.work_dir) / "hidden", ignore_errors=True)


def written_blocks(job: RefinementJob) -> list[Path]:
    """The files of the blocks that are done, in order; the hidden states that go on from them lie in a folder beside them."""
    return sorted(file for file in sizes(job.work_dir) if file.name.startswith("block-"))


def fits(job: RefinementJob) -> dict[str, Fit]:
    """How each block's fit ended, by the number of the block."""
    headers = {file.stem: json.loads(read_shard(file).header) for file in written_blocks(job)}
    return {block: Fit(*json.loads(header["__metadata__"][_FIT])) for block, header in headers.items()}


def write_refined(job: RefinementJob) -> None:
    """Writes the refined emulator: the emulator's shards with what was fitted in them, its config and tokenizer."""
    checkpoint, refined = Checkpoint(job.emulator_dir), dict[str, TensorEntry]()
    for file in written_blocks(job):
        refined |= {entry.name: entry for entry in read_shard(file).entries}
    for shard in checkpoint.shards:
        target = job.out_dir / shard.file.name
        if not exists(target):
            chunks = ((e, copy_chunks(refined.get(e.name, e), _CHUNK_BYTES)) for e in shard.entries)
            stream_shard(target, make_header(shard.entries), chunks)
    for name in (INDEX_NAME, "config.json"):
        copy_file(job.emulator_dir / name, job.out_dir / name)
    copy_tokenizer(job.emulator_dir, job.out_dir)


def refine(
    job: RefinementJob, num_blocks: int, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """Writes the refined emulator to ``job.out_dir``; returns each block's held-out error before and after, and their mean
    relative to that before. Raises NumericsError where a block gives NaN or Inf, naming it."""
    losses = Losses("refine", tell, files={"the blocks": [job.block_file(at) for at in range(num_blocks)]})
    run_tasks(refine_blocks, job, [("the blocks", ())], resources, losses, progress)
    every_fit = list(fits(job).values())
    errors = [[fit.before, min(fit)] for fit in every_fit]
    blocks = [fit for fit in every_fit if fit.before > 0]
    kept = [fit.after / fit.before for fit in blocks if fit.is_better]
    left = (sum(kept) + len(blocks) - len(kept)) / max(1, len(blocks))
    return {"num_workers": 1, "blocks": len(blocks), "blocks_refined": len(kept), "error_left": left, "errors": errors}
