"""What workers ask of their nodes' memory, for nodes that are and nodes that may be added; without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emloc_ray.errors import ConfigError, StageError
from emloc_ray.stages.ray import nodes
from emloc_ray.stages.ray.nodes import check_workers, memory_to_ask, most
from emloc_ray.stages.ray.tasks import Resources

GIB = 2**30
HEAD = {"memory": 6.0 * GIB}  # no CPU
SMALL = {"CPU": 4.0, "memory": 7.0 * GIB, "object_store_memory": 3.0 * GIB}
LARGE = {"CPU": 8.0, "memory": 28.0 * GIB, "object_store_memory": 12.0 * GIB}


def test_workers_ask_for_what_they_are_planned_to_hold() -> None:
    asked = int(20.2 * GIB)
    memory, remark = memory_to_ask("merge", asked, Resources(2, 1), False, [HEAD, SMALL, LARGE])
    assert asked <= memory < asked + GIB
    assert remark is None
    assert Resources(2, 1, 0, memory).options() == {"num_cpus": 1, "num_gpus": 0, "memory": memory}
    assert "memory" not in Resources(2, 1).options()


@pytest.mark.parametrize(
    ("there", "more"),
    [([SMALL], []), ([HEAD], [{"CPU": 16.0}]), ([HEAD, {"CPU": 2.0, "memory": GIB}], [])],
    ids=["a laptop", "an autoscaler that says no memory", "no node with the CPUs"],
)
def test_nothing_is_asked_where_it_would_decide_nothing(there: list[Any], more: list[Any]) -> None:
    assert memory_to_ask("merge", 50 * GIB, Resources(1, 3), False, there, more) == (0, None)


def test_a_cluster_that_is_empty_is_judged_by_what_may_be_added() -> None:
    added = {"CPU": 8.0, "memory": 32.0 * GIB}
    assert memory_to_ask("merge", 20 * GIB, Resources(9, 1), True, [HEAD], [added]) == (20 * GIB, None)
    with pytest.raises(
        StageError, match=r"merge is planned to hold 40.0 GiB a worker, the largest node .* has 32.0 GiB: add"
    ):
        memory_to_ask("merge", 40 * GIB, Resources(1, 1), False, [HEAD], [added])


def test_above_what_ray_gives_out_a_worker_takes_a_whole_node() -> None:
    memory, remark = memory_to_ask("merge", 30 * GIB, Resources(1, 1), False, [SMALL, LARGE])
    assert memory == 28 * GIB
    assert "--object-store-memory" in str(remark)
    with pytest.raises(StageError, match=r"41.0 GiB a worker, the largest node that could take one has 40.0 GiB"):
        memory_to_ask("merge", 41 * GIB, Resources(1, 1), False, [SMALL, LARGE])


def test_workers_that_start_together_never_wait_for_memory() -> None:
    assert memory_to_ask("finetune", 14 * GIB, Resources(2, 1), True, [SMALL, LARGE]) == (14 * GIB, None)
    memory, remark = memory_to_ask("finetune", 14 * GIB, Resources(3, 1), True, [SMALL, LARGE])
    assert memory == 0
    assert "may run out of memory" in str(remark)


@pytest.mark.parametrize(
    ("added", "memory"), [({"CPU": 8.0, "memory": 9.0}, 36.0), ({"CPU": 8.0}, float("inf"))], ids=["known", "unknown"]
)
def test_all_that_a_cluster_may_have(added: dict[str, float], memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(node_group_configs=[SimpleNamespace(resources=added, max_count=4)])
    grown = {name: 4 * amount for name, amount in added.items()}
    monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: config)
    monkeypatch.setattr(nodes.state, "get_max_resources_from_cluster_config", lambda: grown)
    monkeypatch.setattr(nodes.ray, "cluster_resources", lambda: {"memory": 5.0, "node:1": 1.0})
    assert most() == {"CPU": 32.0, "memory": memory, "node:1": 1.0}


def test_a_worker_that_no_node_can_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "alive", lambda: [HEAD, SMALL, {"CPU": 2.0, "GPU": 1.0}])
    monkeypatch.setattr(nodes, "addable", lambda: [{"CPU": 6.0}])
    check_workers([("merge", Resources(99, 6)), ("finetune", Resources(4, 2, 1))])
    with pytest.raises(ConfigError) as refused:
        check_workers([("calibrate", Resources(1, 1)), ("merge", Resources(1, 7)), ("finetune", Resources(1, 3, 1))])
    there = "and the cluster's largest nodes have 6 CPUs and 0 GPUs or 2 CPUs and 1 GPUs: ask for less, or add a node first."
    assert str(refused.value).splitlines() == [
        f"merge asks for 7 CPUs and 0 GPUs a worker, {there}",
        f"finetune asks for 3 CPUs and 1 GPUs a worker, {there}",
    ]
    monkeypatch.setattr(nodes, "addable", lambda: [{"CPU": 8.0, "GPU": 1.0}])
    check_workers([("merge", Resources(1, 7)), ("finetune", Resources(1, 3, 1))])
