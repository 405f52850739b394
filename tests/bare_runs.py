"""Runs that are planned and never run: of a model without files, and of a tiny one on rows that are all alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.on_paper import bare_prepared

from emloc_ray.config.reading import parse_config
from emloc_ray.planning.prepared import Prepared, prepare


def bare_run(model_config: Any, **sections: Any) -> Prepared:
    """A run of a model that has no files, in bfloat16 unless a section says otherwise."""
    model = {"source": "unused", "dtype": "bfloat16"}
    return bare_prepared(
        {"run_dir": "unused", "model": model, "data": {"train": {"path": "unused"}}} | sections, model_config
    )


def alike_rows(folder: Path, count: int = 12) -> Path:
    """``folder/rows.jsonl``, of so many rows of 20 tokens unless it is there."""
    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text((json.dumps({"text": "x" * 20}) + "\n") * count)
    return path


def tiny_run(folder: Path, model_dir: Path, rows: int = 12, **sections: Any) -> Prepared:
    """The run ``folder/run`` of a saved model, on so many rows of 20 tokens."""
    values = {
        "run_dir": str(folder / "run"),
        "data": {"train": {"path": str(alike_rows(folder, rows))}, "max_seq_length": 64},
        **sections,
        "model": {"source": str(model_dir), **sections.get("model", {})},
    }
    return prepare(parse_config(values))
