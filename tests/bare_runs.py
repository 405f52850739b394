"""Runs of a model that has no files: enough to plan with."""

from __future__ import annotations

from typing import Any

from benchmarks.on_paper import bare_prepared

from emloc_ray.planning.prepared import Prepared


def bare_run(model_config: Any, **sections: Any) -> Prepared:
    """In bfloat16, unless a section says otherwise."""
    model = {"source": "unused", "dtype": "bfloat16"}
    return bare_prepared(
        {"run_dir": "unused", "model": model, "data": {"train": {"path": "unused"}}} | sections, model_config
    )
