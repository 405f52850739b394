"""Data: the task's rows made or found, split, and tokenized into shards."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from emloc_ray.config.schema import RunConfig
from emloc_ray.data.hub import download
from emloc_ray.data.hub_splits import content_of_folders
from emloc_ray.data.reading import SourceFile, scan
from emloc_ray.data.splits import CALIBRATION_SEED, MIXTURE_SEED, SPLITS, RowSelection, assign_splits
from emloc_ray.data.token_budget import rows_within
from emloc_ray.data.tokenizing import ROWS_PER_SHARD, TokenizeOptions, first_unwritten, row_lengths, tokenize_splits
from emloc_ray.demos.tasks import write_generated
from emloc_ray.errors import DataError
from emloc_ray.io.runs.resume import discard_unless
from emloc_ray.io.store.node_cache import exists, hashes
from emloc_ray.planning.data_checks import with_format
from emloc_ray.planning.first_rows import tokenize_options
from emloc_ray.planning.prepared import Prepared, splits_of
from emloc_ray.stages.ray.losses import Losses, Tell, is_lost, unheard
from emloc_ray.stages.ray.pace import Overdue, WholePace
from emloc_ray.stages.ray.tasks import Progress, Resources, silent

_IMAGE_ROWS_PER_SHARD = 256
_ONE_WORKER = Resources()
Result = TypeVar("Result")


def tokenize_data(
    prepared: Prepared,
    tokenizer: Path,
    out_dir: Path,
    progress: Progress = silent,
    inputs: Any = None,
    tell: Tell = unheard,
    resources: Resources = _ONE_WORKER,
) -> dict[str, Any]:
    """Makes or finds the rows, splits them and writes ``out_dir/tokens/SPLIT``; returns the counts of each split. Shards that a
    killed run of the same ``inputs`` and rows finished are kept; with ``inputs`` left out, none are. Raises DataError, naming
    file, row and field of the first bad row. ``resources``: the workers, the memory of each, and the seconds that are
    planned."""
    config = prepared.config
    sources = split_sources(prepared, out_dir, progress)
    local = [Path(source.path) for files in sources.values() for source in files if not source.is_stored]
    # By content, not time: on an object store each node's copies have times of their own.
    made = {path.name: sha for file in local if out_dir in file.parents for path, sha in hashes(file).items()}
    discard_unless(out_dir / "tokens", time.time() if inputs is None else [inputs, made])
    every = [source for files in sources.values() for source in files]
    options = tokenize_options(prepared, tokenizer, every)
    losses = Losses("data", tell)
    splits = retried(
        lambda: rows_of_splits(config, sources, options, progress, resources), losses, lambda: "counting tokens"
    )
    # Rows that may show images are of 100 KB rather than a few.
    rows_per_shard = _IMAGE_ROWS_PER_SHARD if options.may_show_images else ROWS_PER_SHARD
    sizes = dict.fromkeys(splits, rows_per_shard) | {"calibration": config.calibration.rows_per_shard}
    counts = retried(
        lambda: tokenize_splits(
            splits,
            options,
            out_dir / "tokens",
            rows_per_shard=sizes,
            num_workers=resources.num_workers,
            progress=watched(progress, resources.planned_s),
            memory=resources.memory_per_worker,
        ),
        losses,
        lambda: first_unwritten(splits, out_dir / "tokens", sizes),
    )
    return {"splits": counts, "num_workers": resources.num_workers}


def watched(progress: Progress, planned_s: float) -> Progress:
    """The callback, which raises Overdue too where no more is done for too long."""
    pace = WholePace(planned_s)

    def look(done: int, total: int) -> None:
        progress(done, total)
        pace.check(done)

    return look


def retried(work: Callable[[], Result], losses: Losses, piece: Callable[[], str]) -> Result:
    """Calls ``work``, and again where Ray loses a worker, or gives nothing for too long: finished shards are kept."""
    while True:
        try:
            return work()
        except Overdue as error:
            time.sleep(losses.give_up_waiting(piece(), str(error), error))
        except Exception as error:  # noqa: BLE001  Ray Data raises kinds of its own around Ray's
            # To find the piece means to look at what is written, of a store too.
            time.sleep(losses.record_lost_worker(piece() if is_lost(error) else "", error))


def rows_of_splits(
    config: RunConfig,
    sources: dict[str, tuple[SourceFile, ...]],
    options: TokenizeOptions,
    progress: Progress = silent,
    resources: Resources = _ONE_WORKER,
) -> dict[str, RowSelection]:
    """The rows of every split; those of the calibration are counted in tokens where the config asks for that."""
    given = {name: RowSelection.all_rows(files) for name, files in sources.items()}
    for name, selection in given.items():
        split = getattr(config.data, name)
        if split is not None:
            weights = split.weights
            mixed = RowSelection.mixed(selection.sources, weights, config.seed + MIXTURE_SEED) if weights else selection
            given[name] = mixed.sample(split.num_samples, config.seed)
    splits = assign_splits(
        given,
        num_calibration_samples=config.calibration.num_calibration_samples,
        num_selection_samples=config.correction.num_selection_samples,
        num_eval_samples=config.evaluation.num_samples,
        seed=config.seed,
        num_validation_samples=config.finetune.num_validation_samples if config.finetune.validates else None,
    )
    empty = [name for name, rows in splits.items() if len(rows) == 0]
    if empty:
        raise DataError(f"data.{empty[0]} is left without rows: give it a path, or more training rows.")
    num_tokens = config.calibration.num_calibration_tokens
    if num_tokens is not None:
        seed = config.seed + CALIBRATION_SEED

        def lengths(part: RowSelection) -> NDArray[np.int64]:
            # Counting tokens makes nothing of what the stage's bar counts.
            look = watched(lambda done, total: progress(0, 1), resources.planned_s)
            return row_lengths(
                part, options, resources.num_workers, lambda done: look(done, 1), resources.memory_per_worker
            )

        rows = rows_within(splits["calibration"], num_tokens, seed, lengths)
        splits["calibration"] = splits["calibration"].sample(rows, seed)
    return splits


def split_sources(prepared: Prepared, out_dir: Path, progress: Progress = silent) -> dict[str, tuple[SourceFile, ...]]:
    """The files of every split that has its own, those made or downloaded for the run included."""
    config, directory = prepared.config, out_dir / "rows"
    named = {name: split for name in splits_of(config) if (split := getattr(config.data, name)) is not None}
    hub = {name: split.hub for name, split in named.items() if split.hub}
    if hub or config.data.generate is not None:
        # What was made for the run stays with it: neither the hub nor the installed sources need be as they were.
        made_of = [config.data.generate, config.seed if config.data.generate else None, _as_named(hub)]
        discard_unless(directory, [*made_of, *filter(None, [content_of_folders(hub)])])
    sources: dict[str, tuple[SourceFile, ...]] = dict(prepared.files)
    if config.data.generate is not None:
        sources |= _generate(config.data.generate, directory, config.seed)
    for name, places in hub.items():
        for number, place in enumerate(places):
            path = directory / f"{name}{f'-{number}' if number else ''}.parquet"
            file = _download(place, name, path, lambda: progress(0, 1))
            part = named[name].places.index(place) if named[name].weights else 0
            sources[name] = (*sources.get(name, ()), dataclasses.replace(file, part=part))
    return {
        name: tuple(file if file.format else with_format(file, config.data) for file in sorted(files, key=_part))
        for name, files in sources.items()
    }


def _part(file: SourceFile) -> int:
    return file.part


def _as_named(hub: dict[str, list[str]]) -> dict[str, str | list[str]]:
    """One data set of a split as it is named: so do runs of released versions keep what they downloaded."""
    return {name: places[0] if len(places) == 1 else places for name, places in hub.items()}


def _generate(task: str, directory: Path, seed: int) -> dict[str, tuple[SourceFile, ...]]:
    if not all(exists(directory / f"{name}.parquet") for name in SPLITS):
        write_generated(task, directory, seed)
    return {name: (scan(directory / f"{name}.parquet"),) for name in SPLITS}


def _download(place: str, split: str, path: Path, look: Callable[[], None]) -> SourceFile:
    """A data set of the hub as one Parquet file of the run."""
    if not exists(path):
        download(place, split, path, look=look)
    return scan(path)
