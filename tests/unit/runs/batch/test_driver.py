"""What of a batch the cluster could never run, node by node; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emloc_ray.errors import ConfigError
from emloc_ray.planning.plan import StagePlan
from emloc_ray.runs.batch import driver
from emloc_ray.runs.batch.config import LimitsConfig
from emloc_ray.runs.batch.driver import check_fit

NODE = {"CPU": 3.0, "memory": 2.0**34}


@pytest.mark.parametrize(
    ("together", "limits", "fits"),
    [(True, {}, False), (False, {}, True), (True, {"cpus": 6}, True)],
    ids=["a training", "slots, which take turns", "a cluster that grows"],
)
def test_workers_of_a_training_have_to_fit_on_the_nodes_at_once(
    together: bool, limits: dict[str, Any], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = StagePlan("finetune", {"weights": 2.0**30}, 0, 1.0, 3, 2.0, 0.0, together=together)
    tasks, config = [SimpleNamespace(name="a")], SimpleNamespace(limits=LimitsConfig(**limits))
    prepared: Any = SimpleNamespace(
        batch=SimpleNamespace(tasks=tasks, config=config), work=SimpleNamespace(stages=lambda task: (stage,))
    )
    monkeypatch.setattr(driver, "reachable_nodes", lambda: [(NODE, 2.0)])
    monkeypatch.setattr(driver, "grown_cluster", lambda: {name: 2 * amount for name, amount in NODE.items()})
    if fits:
        check_fit(prepared)
        return
    with pytest.raises(
        ConfigError, match=r"^task a: finetune needs 2 CPUs and 1.00 GiB for each of its 3 workers at once,"
    ):
        check_fit(prepared)
