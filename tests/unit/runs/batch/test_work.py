"""A batch's tasks are checked before any of them begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_values, task_rows, write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.planning import calibration_memory
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.work import PipelineWork

FLASH = {"attn_implementation": "flash_attention_2"}


@pytest.fixture
def task(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Task]:
    """``task(name, evaluation={…})``: of a machine with one GPU."""
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))

    def make(name: str, **sections: dict[str, Any]) -> Task:
        values = make_values(tmp_path / name, tiny_model_dir(), rows, **{"ray": {"num_gpus": 1}, **sections})
        return Task(name, parse_config(values))

    return make


def test_what_its_gpus_cannot_do_is_told_before_a_batch_begins(
    task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_memory, "gpu_bytes", lambda: 2**30)
    on_cpus = {section: {"gpus_per_worker": 0} for section in ("calibration", "finetune", "evaluation")}
    share = {"gpus_per_worker": 0.25, "num_workers": 1}
    tasks = [
        task("sound", **on_cpus),
        task("kernel", **on_cpus, model=FLASH),
        task("share", **{**on_cpus, "evaluation": share}),
        task("other-share", **{**on_cpus, "evaluation": share}),
    ]
    with pytest.raises(ConfigError) as caught:
        PipelineWork(None).prepare(tasks)
    kernel, shared = str(caught.value).split("\n")
    assert kernel.startswith("task kernel: model.attn_implementation: flash_attention_2 computes on GPUs alone, and")
    assert shared.startswith("task share, other-share: evaluation.gpus_per_worker is 0.25, of which 23")


def test_an_attention_that_a_joined_ray_cannot_compute_is_told_once_its_gpus_are_known(
    task: Callable[..., Task],
) -> None:
    work = PipelineWork(None)
    work.prepare([task("kernel", ray={"address": "a-cluster:6379"}, model=FLASH)])
    with pytest.raises(ConfigError, match=r"task kernel: .* computes on GPUs alone, and calibration has none"):
        work.with_gpus(0)
