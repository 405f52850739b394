"""What a config makes of the stages' jobs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bare_runs import tiny_run

from emloc_ray.data.token_shards import write_index
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.job import CorrectionJob
from emloc_ray.stages.correct.stage import correction_job


@pytest.fixture
def correction(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Callable[..., CorrectionJob]:
    """The correction of a run of twelve training rows of 40 tokens together, 3 steps of 2 · 4 · 2 rows."""
    model_dir = tiny_model_dir("llama")
    steps = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_workers": 2,
    }

    def make(steps_done: int | None = None, **section: Any) -> CorrectionJob:
        prepared = tiny_run(tmp_path, model_dir, finetune=steps, correction=section)
        write_index(prepared.run.path("data", "tokens", "train"), [8, 4], {"tokens": 40})
        results = {} if steps_done is None else {"finetune": {"steps": steps_done}}
        found = correction_job(Context(prepared, model_dir, results=results))
        shutil.rmtree(tmp_path / "run")
        return found

    return make


def test_what_choosing_may_read_is_a_share_of_what_training_reads(correction: Callable[..., CorrectionJob]) -> None:
    assert correction().max_tokens == 16  # a tenth of 48 rows of 10/3 tokens
    assert correction(max_share=2.5).max_tokens == 400
    assert correction(max_share=None).max_tokens is None


def test_a_training_that_ended_early_has_read_less(correction: Callable[..., CorrectionJob]) -> None:
    assert correction(steps_done=2, max_share=2.5).max_tokens == 266


def test_none_is_measured_first(correction: Callable[..., CorrectionJob]) -> None:
    assert [c.method for c in correction().candidates] == ["none", "covariance", "adapted", "adapted"]
    assert [c.method for c in correction(method="projection").candidates] == ["projection"]
