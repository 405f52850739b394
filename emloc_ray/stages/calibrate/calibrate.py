"""Calibrate: stage → slots (one Ray task each, ``stages/ray/slots.py``) → token shards → hooks on the model
(``modeling/gram_hooks.py``) → ``core/gram.py``. Slots commit, then are summed in slot order."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.data.processors import example
from emloc_ray.io.formats.grams import (
    INDEX,
    GramStore,
    gram_counts,
    last_shard,
    reduce_slots,
    write_gram_index,
    write_gram_shard,
)
from emloc_ray.io.store.node_cache import discard, exists, is_stored, local_only, sizes
from emloc_ray.modeling.architecture import load_config
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.stages.calibrate.job import BLOCKS, MAX_LEAD, CalibrationJob, by_blocks
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot, smaller_batch
from emloc_ray.stages.calibrate.streamed_slot import StreamedSlot, grams_file, last_node, part_file
from emloc_ray.stages.calibrate.thin_experts import Gathered, clear_thin, describe, gather_for_thin_experts
from emloc_ray.stages.calibrate.tokens_read import tokens_read
from emloc_ray.stages.ray.losses import Losses, Tell, causes, is_out_of_memory, unheard
from emloc_ray.stages.ray.slots import begun_on, run_slots, start_slot
from emloc_ray.stages.ray.tasks import LOOK_S, Flight, FlightTask, Progress, Resources, run_tasks, set_threads, silent

_GRAMS_PER_FILE = 4


def calibrate(
    job: CalibrationJob, out_dir: Path, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """Gathers every group's Gram over the job's token shards into ``out_dir``; each shard counts exactly once.

    The shards go to slots in turn; a lost task is restarted and goes on from its slot's commit. Every task holds the model as
    ``job.hold`` says, with the same Grams, up to rounding. Experts that were sent too few tokens get theirs in a second pass
    (:mod:`emloc_ray.stages.calibrate.thin_experts`). Raises NumericsError where activations are NaN or Inf, naming the layer,
    StageError where a slot is lost more often than retries allow.
    """
    if not _is_whole(out_dir):

        def gather(job: CalibrationJob, out_dir: Path) -> Gathered:
            gather_grams = _gather_block_by_block if job.hold == BLOCKS else _gather_whole_model
            return gather_grams(job, out_dir, resources, progress, tell)

        def gather_again(job: CalibrationJob, out_dir: Path) -> Gathered:
            return gather_or_go_by_block(job, out_dir, gather, tell)[1]

        job, first = gather_or_go_by_block(job, out_dir, gather, tell)
        (counts, weight_map), routed = gather_for_thin_experts(job, out_dir, first, gather_again)
        orders = {name: order for name, order in job.experts if name not in weight_map}
        write_gram_index(out_dir, job.groups, weight_map, counts, routed_tokens=routed, orders=orders)
    for left in (out_dir / "slots", local_only(out_dir) / "hidden"):
        discard(left)
    clear_thin(out_dir)
    index = GramStore(out_dir).index
    return {
        "num_workers": _num_slots(job, resources),
        "num_shards": job.shards[1] - job.shards[0],
        "num_tokens": tokens_read(job, index["num_tokens"]),
        "hold": job.hold,
        "waves": len(job.waves or (job.groups,)),
        **describe(job, index["num_tokens"], index.get("routed_tokens", {})),
    }


def _is_whole(out_dir: Path) -> bool:
    """Whether the index is there, and all files that it names."""
    files = sizes(out_dir)
    return out_dir / INDEX in files and all(
        out_dir / file in files for file in GramStore(out_dir).index["weight_map"].values()
    )


def gather_or_go_by_block(
    job: CalibrationJob, out_dir: Path, gather: Callable[[CalibrationJob, Path], Gathered], tell: Tell
) -> tuple[CalibrationJob, Gathered]:
    """Calls ``gather`` with the job; again block by block where a worker ran out of memory with one row at a time."""
    try:
        return job, gather(job, out_dir)
    except Exception as error:
        if job.hold == BLOCKS or not job.may_stream or not any(map(is_out_of_memory, causes(error))):
            raise
    tell(
        f"{job.step}: a worker ran out of memory with the model held {job.hold}; it continues block by block,"
        " a row at a time."
    )
    job = by_blocks(job, out_dir)
    return job, gather(job, out_dir)


def _num_slots(job: CalibrationJob, resources: Resources) -> int:
    return min(resources.num_workers, job.shards[1] - job.shards[0])


def _gather_whole_model(
    job: CalibrationJob, out_dir: Path, resources: Resources, progress: Progress, tell: Tell
) -> Gathered:
    """One pass over the shards for each wave of Grams, with a budget of losses of its own; none for a wave that an earlier try
    has summed. A wave's slots go once it is summed."""
    counts: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    waves, num_shards = job.waves or (job.groups,), job.shards[1] - job.shards[0]
    files_before = sizes(out_dir)
    for number, groups in enumerate(waves):
        wave, losses = dataclasses.replace(job, groups=groups), Losses(job.step, tell)
        prefix = f"grams-{number + 1:05d}" if len(waves) > 1 else "grams"
        files = _grams_of([group[0] for group in groups], prefix)
        folder = out_dir / "slots" / f"wave-{number:04d}-of-{len(waves):04d}"
        slots = _slot_ends(job, folder, _num_slots(job, resources))
        of_all_waves = functools.partial(_progress_of_waves, progress, number, len(waves))
        if not all(out_dir / file in files_before for file in files):
            _fill_slots(wave, folder, slots, resources, losses, of_all_waves)
        counts |= _reduce(
            slots, files, out_dir, resources, losses, functools.partial(of_all_waves, num_shards, num_shards)
        )
        weight_map |= {name: file for file, names in files.items() for name in names}
        discard(folder)
    return counts, weight_map


def _progress_of_waves(progress: Progress, wave: int, num_waves: int, done: int, total: int) -> None:
    progress(wave * total + done, num_waves * total)


def _slot_ends(job: CalibrationJob, folder: Path, num_slots: int) -> dict[Path, int]:
    """The file of each slot, with the last of its shards."""
    return {
        folder / f"slot-{slot:04d}-of-{num_slots:04d}.safetensors": job.shards_of(slot, num_slots)[-1]
        for slot in range(num_slots)
    }


def _fill_slots(
    job: CalibrationJob, folder: Path, slots: dict[Path, int], resources: Resources, losses: Losses, progress: Progress
) -> None:
    """Runs the slots until each has committed its last shard; reports those that went on with a smaller batch."""
    files, ends = list(slots), list(slots.values())
    work = [job.shards_of(slot, len(files)) for slot in range(len(files))]

    def start(slot: int) -> Any:
        name = f"{job.step}: slot {slot}"
        return start_slot(resources, name, work[slot], ResidentSlot, job, files[slot], resources.threads)

    own = {file.stem for file in files}
    for file in sizes(folder):
        if file.name.partition(".")[0] not in own:  # of a run with another number of slots
            discard(file)
    # A task that counted as lost, and was restarted, may still have committed after its successor did.
    while (safe := [last_shard(file) if exists(file) else -1 for file in files]) != ends:
        run_slots(start, work, "token shard", losses, progress, safe=safe, planned_s=resources.planned_s)
    for slot, file in enumerate(files):
        if (rows := smaller_batch(file, job.batch_size)) < job.batch_size:
            losses.tell(
                f"{job.step}: slot {slot} ran out of memory with {job.batch_size} rows a batch and went on with {rows}."
            )


def _grams_of(names: Sequence[str], prefix: str) -> dict[str, list[str]]:
    """The files of a wave's sums, each with the Grams that it holds."""
    parts = [list(names[start : start + _GRAMS_PER_FILE]) for start in range(0, len(names), _GRAMS_PER_FILE)]
    return {f"{prefix}-{number + 1:05d}-of-{len(parts):05d}.safetensors": part for number, part in enumerate(parts)}


def _reduce(
    slots: dict[Path, int],
    files: dict[str, list[str]],
    out_dir: Path,
    resources: Resources,
    losses: Losses,
    look: Callable[[], None],
) -> dict[str, int]:
    """Sums the slots, each with its last shard, a file a task, without GPUs; gives the Grams' tokens. As many tasks run at once
    as there are slots: their processes are idle by then. ``look`` is called every second; what it raises ends them."""
    pieces = [(f"the sum {file}", (names, out_dir / file)) for file, names in files.items()]
    own = dataclasses.replace(resources, num_workers=len(slots), gpus_per_worker=0)
    results = run_tasks(_reduce_part, slots, pieces, own, losses, lambda done, total: look())
    return {name: count for result in results for name, count in result.items()}


def _reduce_part(slots: dict[Path, int], names: list[str], path: Path) -> dict[str, int]:
    """Sums a file's Grams over the slots, where no earlier try has; gives their tokens."""
    if exists(path):
        return gram_counts(path)
    set_threads(1)
    grams = reduce_slots(list(slots), names, list(slots.values()))
    write_gram_shard(path, grams)
    return {name: gram.num_tokens for name, gram in grams.items()}


def _gather_block_by_block(
    job: CalibrationJob, out_dir: Path, resources: Resources, progress: Progress, tell: Tell
) -> Gathered:
    """Every slot through the blocks, none far ahead of the slowest or of the sums; a block's Grams are summed once all slots have
    passed it. Those of a single slot are the sums."""
    num_slots, losses = _num_slots(job, resources), Losses(job.step, tell)
    options = dict(job.model_options)
    trusted = options.get("trust_remote_code", False)
    config, shown = load_config(job.model_dir, trust_remote_code=trusted), example(job.model_dir, trusted)
    order = block_flow(config, trusted, shown).order
    names = [[group[0] for group in job.groups_of(block)] for block in order]
    num_blocks = 1 + max(position for position, inside in enumerate(names) if inside)
    files = [grams_file(out_dir, block, num_blocks) for block in range(num_blocks)]
    reduce = Resources(cpus_per_worker=0).task(_reduce_block)  # the slots may hold every CPU of their nodes
    passed = dict.fromkeys(range(num_slots), -1)

    def start(slot: int) -> Any:
        arguments = job, out_dir, slot, num_slots, num_blocks, resources.threads
        node = last_node(out_dir, slot, num_slots) if is_stored(out_dir) else None  # else all see its hidden states
        return start_slot(resources, f"calibrate: slot {slot}", range(num_blocks), StreamedSlot, *arguments, node=node)

    def start_sum(block: int) -> Any:
        parts = {part_file(out_dir, slot, num_slots, block): block for slot in range(num_slots)}
        node = last_node(out_dir, block % num_slots, num_slots)  # in turn: Ray would take the driver's for each
        task = reduce.options(name=f"calibrate: {files[block].name}", **begun_on(node))
        return task.remote(parts, names[block], files[block])

    def done(slot: int, position: int) -> None:
        if num_slots == 1:
            return
        before = min(passed.values())
        passed[slot] = max(passed[slot], position)
        for block in range(before + 1, min(passed.values()) + 1):
            sums.add(FlightTask(f"the sum of block {block}", functools.partial(start_sum, block)))

    work, planned_s = [range(num_blocks)] * num_slots, resources.planned_s
    with Flight(min(num_slots, MAX_LEAD), losses, planned_s) as sums:  # each holds a block's Grams
        run_slots(start, work, "block", losses, progress, done, planned_s=planned_s, max_lead=MAX_LEAD, beside=sums)
        while sums.pump(LOOK_S):
            progress(num_slots * num_blocks, num_slots * num_blocks)
    counts = {name: count for file in files for name, count in gram_counts(file).items()}
    return counts, {name: files[block].name for block in range(num_blocks) for name in names[block]}


def _reduce_block(parts: dict[Path, int], names: list[str], path: Path) -> None:
    """Sums a block's Grams over the slots and removes what they were summed from; done once, however often it is asked."""
    _reduce_part(parts, names, path)
    for part in parts:
        discard(part)
