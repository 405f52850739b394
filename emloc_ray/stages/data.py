"""Data: the task's rows made or found, split, and tokenized into shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emloc_ray.data.reading import SourceFile, scan
from emloc_ray.data.splits import SPLITS, RowSelection, assign_splits
from emloc_ray.data.tokenizing import TokenizeOptions, tokenize_splits
from emloc_ray.errors import DataError
from emloc_ray.io.fingerprint import fingerprint_large_files
from emloc_ray.preparation import Prepared
from emloc_ray.stages.cluster import Progress, silent

_ROWS_PER_SHARD = 1024


def split_inputs(prepared: Prepared) -> dict[str, Any]:
    """What the token shards depend on."""
    config = prepared.config
    return {
        "data": config.data.model_dump(mode="json"),
        "files": {
            name: fingerprint_large_files(Path(source.path) for source in sources)
            for name, sources in prepared.files.items()
        },
        "counts": [
            config.calibration.num_calibration_samples,
            config.correction.num_selection_samples,
            config.evaluation.num_samples,
        ],
        "rows_per_shard": config.calibration.rows_per_shard,
        "seed": config.seed,
    }


def tokenize_data(prepared: Prepared, tokenizer: Path, out_dir: Path, progress: Progress = silent) -> dict[str, Any]:
    """Makes or finds the rows, splits them and writes ``out_dir/tokens/SPLIT``; returns the counts of each split.

    Raises:
        DataError: naming file, row and field of the first bad row.
    """
    config = prepared.config
    given = _rows(prepared, out_dir)
    splits = assign_splits(
        given,
        num_calibration_samples=config.calibration.num_calibration_samples,
        num_selection_samples=config.correction.num_selection_samples,
        num_eval_samples=config.evaluation.num_samples,
        seed=config.seed,
    )
    empty = [name for name in SPLITS if len(splits[name]) == 0]
    if empty:
        raise DataError(f"data.{empty[0]} is left without rows: give it a path, or more training rows.")
    options = TokenizeOptions(
        str(tokenizer),
        config.data.format,
        config.data.max_seq_length,
        config.data.packing,
        config.model.trust_remote_code,
    )
    sizes = dict.fromkeys(SPLITS, _ROWS_PER_SHARD) | {"calibration": config.calibration.rows_per_shard}
    counts = tokenize_splits(
        splits,
        options,
        out_dir / "tokens",
        rows_per_shard=sizes,
        num_workers=config.calibration.num_workers,
        progress=progress,
    )
    return {"splits": counts, "num_workers": config.calibration.num_workers}


def _rows(prepared: Prepared, out_dir: Path) -> dict[str, RowSelection]:
    config = prepared.config
    found: dict[str, tuple[SourceFile, ...]] = dict(prepared.files)
    if config.data.generate == "docstrings":
        found = _generate(out_dir / "rows", config.seed)
    for name in SPLITS:
        split = getattr(config.data, name)
        if split is not None and isinstance(split.path, str) and split.path.startswith("hf:"):
            found[name] = (_download(split.path.removeprefix("hf:"), name, out_dir / "rows"),)
    selections = {name: RowSelection.all_rows(sources) for name, sources in found.items()}
    for name, selection in selections.items():
        split = getattr(config.data, name)
        if split is not None:
            selections[name] = selection.sample(split.num_samples, config.seed)
    return selections


def _generate(directory: Path, seed: int) -> dict[str, tuple[SourceFile, ...]]:
    from emloc_ray.data.docstrings import DocstringTask, generate

    if not all((directory / f"{name}.parquet").is_file() for name in SPLITS):
        generate(directory, DocstringTask(seed=seed))
    return {name: (scan(directory / f"{name}.parquet"),) for name in SPLITS}


def _download(name: str, split: str, directory: Path) -> SourceFile:
    """A data set of the hub (or of a local folder that ``datasets`` reads) as one Parquet file of the run.

    ``NAME`` or ``NAME:SPLIT``; without a split, the training rows are ``train`` and the others the data set's own.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.{split}.path hf:{name} needs the datasets package: pip install 'emloc-ray[hub]'."
        ) from error
    name, _, part = name.partition(":")
    try:
        dataset = datasets.load_dataset(name, split=part or ("train" if split != "eval" else "test"))
    except Exception as error:
        detail = str(error).split("\n")[0][:200]
        raise DataError(
            f"data.{split}.path hf:{name} cannot be loaded ({detail}): mend the name or its split."
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{split}.parquet"
    dataset.to_parquet(str(path))
    return scan(path)
