"""How a training is led and what is said of it, as far as it can be told without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.stages.finetune.finetune import _mean_loss, _way, run_alone, run_group
from emloc_ray.stages.finetune.training import FinetuneJob, leaves_traces
from emloc_ray.stages.ray.tasks import Resources

JOB = FinetuneJob(Path("e"), Path("t"), Path("o"), Path("s"), "name", {}, None, "base", 4, 1)


def test_one_worker_runs_alone_unless_deepspeed_wants_a_group() -> None:
    assert _way(JOB, Resources(1)) is run_alone
    assert _way(JOB, Resources(2)) is run_group
    assert _way(dataclasses.replace(JOB, zero_config={"zero_optimization": {}}), Resources(1)) is run_group


def test_a_resumed_training_s_loss_is_that_of_all_its_steps() -> None:
    # Steps of losses 1 to 5, logged after the second, the third and the fifth.
    history = [{"step": 2, "loss": 1.5}, {"step": 3, "loss": 3.0}, {"step": 5, "loss": 4.5}]
    assert _mean_loss(history) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("arguments", "ends"),
    [
        ({}, False),
        ({"report_to": "none"}, False),
        ({"report_to": ["tensorboard"]}, False),
        ({"report_to": ["tensorboard", "wandb"]}, True),
        ({"report_to": "mlflow"}, True),
        ({"full_determinism": True}, True),
        ({"tf32": True}, True),
        ({"weight_decay": 0.1}, False),
    ],
)
def test_a_process_that_the_next_training_would_find_changed_ends(arguments: dict[str, Any], ends: bool) -> None:
    assert leaves_traces(dataclasses.replace(JOB, training_arguments=arguments)) == ends
