"""A run within inference's memory trains on the same rows a step, and ends in the same losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from plain_runs import PlainRun, plain_run
from small_runs import make_values

from emloc_ray.stages.finetune.session import own_environment
from emloc_ray.stages.finetune.stage import finetune_job, learned


@pytest.mark.slow
def test_smaller_batches_change_nothing(tiny_model_dir: Callable[..., Path], tmp_path: Path, task_file: Path) -> None:
    def run(name: str, budget: Mapping[str, Any]) -> PlainRun:
        changes = {"finetune": {"max_steps": 3}, "evaluation": {"num_exact_match": 0, "num_generations": 0}}
        values = make_values(
            tmp_path / name, tiny_model_dir("llama"), task_file, model={"hold": "offloaded"}, **changes
        )
        with own_environment():
            del values["memory_budget"]
            return plain_run({**values, **budget}, tiny_model_dir("llama"))

    free, bounded = run("free", {"memory_budget": None}), run("bounded", {})  # the default
    assert finetune_job(free.context, "x").batch_size == 8
    assert finetune_job(bounded.context, "x").batch_size < 8
    assert finetune_job(bounded.context, "x").training_arguments["gradient_accumulation_steps"] > 1
    asked = [learned(done.context.prepared.for_fingerprints.config.finetune) for done in (free, bounded)]
    assert asked[0] == asked[1]  # what is finished under the one is so under the other
    assert bounded.step_losses == pytest.approx(free.step_losses, rel=1e-4)
    assert bounded.losses == pytest.approx(free.losses, rel=1e-4)
