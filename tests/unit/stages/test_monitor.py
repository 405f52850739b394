"""Processes by the names that people know them by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emloc_ray.stages.monitor import _kind


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::SlotActor.accumulate", "SlotActor"),
        ("ray::factorize: model.layers.3.mlp.gate_proj and model.layers.3.mlp.up_proj", "factorize"),
        ("ray::merge: model-00001-of-00004.safetensors", "merge"),
        ("ray::_add_task()", "_add_task"),
        ("ray::IDLE", "IDLE"),
    ],
)
def test_a_worker_is_known_by_its_actor_or_its_tasks_stage(title: str, kind: str) -> None:
    worker: Any = SimpleNamespace(pid=-1, cmdline=lambda: [title], name=lambda: "python")
    assert _kind(worker) == kind
    assert _kind(SimpleNamespace(pid=-1, cmdline=lambda: ["raylet"], name=lambda: "raylet")) == "raylet"  # type: ignore[arg-type]
