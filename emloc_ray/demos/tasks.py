"""The tasks that ``data.generate`` names."""

import dataclasses
from pathlib import Path

from emloc_ray.demos import docstrings, return_types, vqa
from emloc_ray.demos.python_sources import write_task

_OF_SOURCES = {"docstrings": docstrings.TASK, "return_types": return_types.TASK}

ROW_TOKENS = {"docstrings": (80.0, 256.0), "return_types": (48.0, 115.0)}
"""Tokens of a row of tasks without images, for planning: the mean, and at least a quarter more than the longest; with
SmolLM2's tokenizer and the packages of one machine."""


def write_generated(name: str, out_dir: Path, seed: int, max_rows: int | None = None) -> dict[str, int]:
    """Writes a task's splits as Parquet files into ``out_dir``; returns the number of rows of each.

    ``max_rows``: as few rows in all, which are found without reading every source; left out, the whole task. Raises DataError
    where the sources yield too few rows, or Pillow is missing.
    """
    if name == "vqa":
        pictures = vqa.VqaTask(seed=seed)
        return vqa.generate(out_dir, pictures if max_rows is None else dataclasses.replace(pictures, num_rows=max_rows))
    task = _OF_SOURCES[name]
    rows = task.max_rows if max_rows is None else max_rows
    return write_task(out_dir, dataclasses.replace(task, seed=seed, max_rows=rows))
