"""The stages as objects: in order, complete, and without Ray until they run."""

from __future__ import annotations

from emloc_ray.config import steps
from emloc_ray.config.base import StageConfig
from emloc_ray.config.reading import parse_config
from emloc_ray.stages.order import STEPS


def test_names_and_verbs_are_those_of_the_config() -> None:
    assert tuple(stage.name for stage in STEPS) == steps.STEP_NAMES
    assert tuple(dict.fromkeys(stage.verb for stage in STEPS)) == steps.VERBS


def test_no_two_stages_write_the_same() -> None:
    folders = [folder for stage in STEPS for folder in (*stage.outputs, *stage.scratch)]
    keys = [key for stage in STEPS for key in stage.metrics_keys]
    assert len(set(folders)) == len(folders)
    assert len(set(keys)) == len(keys)


def test_every_stage_asks_for_workers_of_a_section() -> None:
    values = {"run_dir": "runs/x", "model": {"source": "m"}, "data": {"train": {"path": "x.jsonl"}}}
    config = parse_config({**values, "evaluation": {"num_workers": 3, "cpus_per_worker": 2}})
    asked = {stage.name: stage.workers(config) for stage in STEPS}
    assert all(isinstance(section, StageConfig) for section in asked.values())
    assert (asked["evaluate"].num_workers, asked["correct"].num_workers) == (3, 3)
    assert asked["correct"].cpus_per_worker == 2
