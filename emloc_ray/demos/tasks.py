"""The tasks that ``data.generate`` names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from emloc_ray.demos import docstrings, return_types, vqa
from emloc_ray.demos.python_sources import SourceTask


def write_generated(name: str, out_dir: Path, seed: int, max_rows: int | None = None) -> dict[str, int]:
    """Writes a task's splits as Parquet files into ``out_dir``; returns the number of rows of each.

    ``max_rows``: as few rows in all, which are found without reading every source; left out, the whole task.

    Raises:
        DataError: where the sources yield too few rows, or Pillow is missing.
    """
    if name == "vqa":
        pictures = vqa.VqaTask(seed=seed)
        return vqa.generate(out_dir, pictures if max_rows is None else dataclasses.replace(pictures, num_rows=max_rows))
    functions = dataclasses.replace(return_types.TASK if name == "return_types" else SourceTask(), seed=seed)
    if max_rows is not None:
        functions = dataclasses.replace(functions, max_rows=max_rows)
    return (return_types if name == "return_types" else docstrings).generate(out_dir, functions)
