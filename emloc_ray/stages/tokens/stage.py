"""Data as a step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emloc_ray.config.schema import RunConfig
from emloc_ray.data.hub_splits import content_of_folders
from emloc_ray.data.source_versions import check_stored, fingerprint_sources
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import TOKEN_BYTES
from emloc_ray.data.units import is_small
from emloc_ray.errors import DataError
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.costs import StageCost
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared, splits_of
from emloc_ray.planning.work import tokens_stored
from emloc_ray.stages.context import Context, Inputs, Result
from emloc_ray.stages.stage import Stage

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Progress, Resources

_TOKENS_A_SECOND = 3e5  # of a worker: 2.3e5 of rows of 55 tokens, 6.3e5 of 790


def split_inputs(prepared: Prepared) -> Inputs:
    """What the token shards depend on beside the model's tokenizer."""
    config = prepared.config
    splits = splits_of(config)
    unused = {"healing", "validation"} - {*splits}
    unused |= {key for key in ("image_hosts", "image_roots", "columns") if not getattr(config.data, key)}
    data, formats = config.data.model_dump(mode="json", exclude=unused), _formats(prepared)
    return {
        # What auto took counts: a config that names it gives the same tokens.
        "data": data | ({"format": formats[0]} if len(formats) == 1 else {"formats": formats}),
        "files": _row_files(prepared),
        "counts": [
            config.calibration.num_calibration_samples,
            config.calibration.num_calibration_tokens,
            config.correction.num_selection_samples,
            config.evaluation.num_samples,
            *([config.finetune.num_validation_samples] if "validation" in splits else []),
        ],
        "rows_per_shard": config.calibration.rows_per_shard,
        "seed": config.seed,
        # A tokenizer's own code may make other tokens than the class that stands for it without.
        **({"trust_remote_code": True} if config.model.trust_remote_code else {}),
    }


def _row_files(prepared: Prepared) -> dict[str, str]:
    files = {name: fingerprint_sources(sources) for name, sources in prepared.files.items()}
    splits = {name: getattr(prepared.config.data, name) for name in splits_of(prepared.config)}
    folders = content_of_folders({name: split.hub for name, split in splits.items() if split is not None})
    return files | {name: fingerprint([files.get(name), content]) for name, content in folders.items()}


def _check_rows(prepared: Prepared, files: dict[str, str]) -> None:
    """Raises DataError where the splits' files are others than when they gave the fingerprints ``files``."""
    for name, now in _row_files(prepared).items():
        if files[name] != now:
            raise DataError(f"Files of data.{name} were changed while the run read them: run the same command again.")
    check_stored(source for sources in prepared.files.values() for source in sources)


def _formats(prepared: Prepared) -> list[str]:
    made = prepared.config.data.row_format
    taken = {source.format for files in prepared.files.values() for source in files}
    return sorted(taken) if made == "auto" else [made]


def may_change(prepared: Prepared) -> bool:
    """Whether the rows may change under the same names: a data set of the hub, images that rows name."""
    data, names = prepared.config.data, splits_of(prepared.config)
    hub = any(split.hub for name in names if (split := getattr(data, name)) is not None)
    return hub or any(source.images for files in prepared.files.values() for source in files)


def _tokenize(context: Context, inputs: Inputs, granted: Resources, progress: Progress) -> Result:
    from emloc_ray.stages.tokens.tokens import tokenize_data

    prepared, out_dir = context.prepared, context.path("data")
    _check_rows(prepared, inputs["files"])  # after the wait for its turn
    made = tokenize_data(prepared, context.model_dir, out_dir, progress, inputs, context.note, granted)
    _check_rows(prepared, inputs["files"])  # for they may have changed between two workers
    return {**made, "formats": _formats(prepared)}


def _num_workers(prepared: Prepared) -> int:
    """One where all rows are small enough for a single process; else the calibration's."""
    splits = [getattr(prepared.config.data, name) for name in splits_of(prepared.config)]
    from_hub = any(split.hub for split in splits if split is not None)  # whose size is not known yet
    small = not from_hub and is_small(RowSelection.all_rows(files) for files in prepared.files.values())
    return 1 if small else prepared.config.calibration.num_workers


def _cost(memory: MemoryModel) -> StageCost:
    tokens, images = tokens_stored(memory.prepared)
    return StageCost(
        memory.tokenization_parts(),
        disk_bytes=int(TOKEN_BYTES * tokens + images),
        start_seconds=5 + tokens / _TOKENS_A_SECOND / _num_workers(memory.prepared),
    )


def _remarks(context: Context, result: Result) -> list[str | None]:
    config, remarks = context.prepared.config, (skipped_rows, cut_rows, too_few_rows)
    return [remark(config, split, count) for split, count in result["splits"].items() for remark in remarks]


def cut_rows(config: RunConfig, split: str, count: dict[str, int]) -> str | None:
    """How many rows of a split were longer than ``max_seq_length``."""
    if not count["truncated_rows"]:
        return None
    return (
        f"data.{split}: {count['truncated_rows']} rows cut to {config.data.max_seq_length} tokens"
        f" (at least {count['truncated_tokens']} tokens left out), {count['dropped_rows']} dropped with no completion"
        " or not all of an image left."
    )


def skipped_rows(config: RunConfig, split: str, count: dict[str, int]) -> str | None:
    """How many bad rows ``data.on_error: skip`` left out of a split."""
    skipped = count.get("skipped_rows", 0)
    return f"data.{split}: {skipped} bad rows skipped; data.on_error: fail names the first." if skipped else None


def too_few_rows(config: RunConfig, split: str, count: dict[str, int]) -> str | None:
    """Says where a split holds less than was asked for."""
    calibration = config.calibration
    asked = {
        "calibration": calibration.num_calibration_samples,
        "selection": config.correction.num_selection_samples,
        "eval": config.evaluation.num_samples,
    }.get(split)
    tokens = calibration.num_calibration_tokens if split == "calibration" else None
    if tokens is not None and count["tokens"] >= tokens:
        return None
    seen = count["rows"] + count["dropped_rows"] + count.get("skipped_rows", 0)
    few = asked is not None and seen < asked and not config.data.packing
    if few:
        return f"data.{split}: {count['rows']} rows instead of the {asked} asked for: there are no more."
    if asked is None and tokens is not None:
        return f"data.{split}: {count['tokens']} tokens instead of the {tokens} asked for: there are no more rows."
    return None


DATA = Stage(
    name="data",
    title="Making token shards",
    verb="calibrate",
    workers=lambda config: config.calibration.model_copy(update={"cpus_per_worker": 1, "gpus_per_worker": 0.0}),
    working=_num_workers,
    divisible=True,
    inputs=lambda context: {"model": context.model_key, **split_inputs(context.prepared)},
    outputs=("data/tokens",),
    run=_tokenize,
    cost=_cost,
    resumes=True,
    redone_by_from=False,
    is_shared=lambda context: not may_change(context.prepared),
    summary=lambda result: (
        "rows: " + ", ".join(f"{split} {count['rows']:,}" for split, count in result["splits"].items())
    ),
    remarks=_remarks,
    metrics=lambda prepared, results: {"data": results["data"]["splits"]},
    metrics_keys=("data",),
)
