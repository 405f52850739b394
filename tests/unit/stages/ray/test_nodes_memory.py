"""What workers ask of their nodes' memory, for nodes that are and nodes that may be added; without Ray."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError, StageError
from emloc_ray.stages.ray import nodes
from emloc_ray.stages.ray.nodes import check_workers, grown_cluster, memory_to_ask, unseen_gpus
from emloc_ray.stages.ray.tasks import Resources

GIB = 2**30
_VALUES: dict[str, Any] = {"run_dir": "r", "model": {"source": "m"}, "data": {"train": {"path": "a.jsonl"}}}
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


def test_a_cluster_that_grows_without_a_word_is_asked_for_what_is_planned() -> None:
    memory, remark = memory_to_ask("calibrate", 20 * GIB, Resources(4, 2), False, [HEAD], grows=True)
    assert memory == 20 * GIB
    assert remark == (
        "calibrate asks for 20.0 GiB of memory a worker: where no node that joins has that, lower memory_budget."
    )
    assert memory_to_ask("calibrate", 20 * GIB, Resources(4, 2), False, [LARGE], grows=True) == (20 * GIB, None)
    memory, remark = memory_to_ask("correct", 40 * GIB, Resources(1, 1), False, [HEAD, SMALL], grows=True)
    assert memory == 40 * GIB
    assert "more than any node has: it waits for one that fits; where none will come, lower" in str(remark)
    memory, remark = memory_to_ask("finetune", 14 * GIB, Resources(3, 1), True, [SMALL, LARGE], grows=True)
    assert memory == 14 * GIB
    assert "it waits until more have joined; where none will" in str(remark)
    memory, _ = memory_to_ask("merge", 30 * GIB, Resources(1, 1), False, [LARGE], grows=True)
    assert memory == 28 * GIB  # a whole node


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
    assert grown_cluster() == {"CPU": 32.0, "memory": memory, "node:1": 1.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``cluster(nodes, kinds, labels)``: makes Ray say that it has these nodes, and an autoscaler these kinds of them."""

    def make(there: list[Any], kinds: list[tuple[Any, int]] | None = None, labels: tuple[str, ...] = ()) -> None:
        groups = [SimpleNamespace(resources=node, max_count=count) for node, count in kinds or ()]
        config = None if kinds is None else SimpleNamespace(node_group_configs=groups)
        monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: config)
        monkeypatch.setattr(
            nodes.ray,
            "nodes",
            lambda: [{"Alive": True, "Resources": n, "Labels": dict.fromkeys(labels)} for n in there],
        )

    return make


def test_a_worker_that_no_node_can_take_is_refused(cluster: Callable[..., None]) -> None:
    there = [HEAD, SMALL, {"CPU": 2.0, "GPU": 1.0}]
    cluster(there, [({"CPU": 6.0}, 1)])
    check_workers([("merge", Resources(99, 6), False), ("finetune", Resources(4, 2, 1), False)])
    with pytest.raises(ConfigError) as refused:
        check_workers(
            [
                ("calibrate", Resources(1, 1), False),
                ("merge", Resources(1, 7), False),
                ("finetune", Resources(1, 3, 1), False),
            ]
        )
    largest = "and the cluster's largest nodes have 6 CPUs and 0 GPUs or 2 CPUs and 1 GPUs: ask for less, or add a node first."
    assert str(refused.value).splitlines() == [
        f"merge asks for 7 CPUs and 0 GPUs a worker, {largest}",
        f"finetune asks for 3 CPUs and 1 GPUs a worker, {largest}",
    ]
    cluster(there, [({"CPU": 8.0, "GPU": 1.0}, 1)])
    check_workers([("merge", Resources(1, 7), False), ("finetune", Resources(1, 3, 1), False)])


def test_a_worker_that_no_node_s_memory_holds_is_refused_where_there_are_several(cluster: Callable[..., None]) -> None:
    asked = [("merge", Resources(1, 1, memory_per_worker=41 * GIB), False)]
    cluster([SMALL, LARGE])
    with pytest.raises(
        ConfigError, match=r"^merge is planned to hold 41.0 GiB a worker, the largest node .* has 40.0 GiB"
    ):
        check_workers(asked)
    cluster([SMALL])
    check_workers(asked)


GPUS = {"CPU": 8.0, "GPU": 2.0, "memory": 28.0 * GIB, "object_store_memory": 12.0 * GIB}
CPUS = {"CPU": 64.0, "memory": 90.0 * GIB}


@pytest.mark.parametrize(
    ("asked", "kinds", "held"),
    [
        (Resources(4, 2, 1), None, None),
        (Resources(5, 2, 1), None, 4),
        (Resources(4, 5, 1), None, 2),  # the CPUs that are left are on nodes without GPUs
        (Resources(4, 2, 1, 21 * GIB), None, 2),
        (Resources(8, 2, 0.5), None, None),
        (Resources(9, 2, 0.5), None, 8),
        (Resources(7, 2, 1), [(GPUS, 1)], 6),
        (Resources(99, 2, 1), [(GPUS, -1), (CPUS, -1)], None),
        (Resources(9, 2, 1, 90 * GIB), [({"CPU": 8.0, "GPU": 1.0}, 9)], None),  # which do not say their memory
    ],
)
def test_a_group_that_the_nodes_never_hold_at_once_is_refused(
    asked: Resources, kinds: list[Any] | None, held: int | None, cluster: Callable[..., None]
) -> None:
    cluster([HEAD, GPUS, GPUS, CPUS], kinds)
    check_workers([("evaluate", asked, False)])
    if held is None:
        check_workers([("finetune", asked, True)])
        return
    with pytest.raises(
        ConfigError, match=rf"^finetune starts {asked.num_workers} workers at once, .* hold {held} of them"
    ):
        check_workers([("finetune", asked, True)])


def test_where_nobody_tells_ray_how_far_a_cluster_grows_a_stage_waits(cluster: Callable[..., None]) -> None:
    asked = [("factorize", Resources(1, 4), False), ("finetune", Resources(99, 2, 1), True)]
    cluster([HEAD], labels=("ray.io/node-group",))
    check_workers(asked)
    cluster([HEAD], labels=("ray.io/node-id",))
    with pytest.raises(ConfigError):
        check_workers(asked)


def test_gpus_that_an_autoscaler_does_not_tell_of_are_asked_for_by_hand(
    cluster: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KubeRay's worker groups begin with no node, and ``auto`` would take CPUs for days."""
    gpus = {"GPU": 0.0}
    monkeypatch.setattr(nodes.ray, "cluster_resources", lambda: gpus)
    keys = RunConfig.model_validate(_VALUES | {"evaluation": {"gpus_per_worker": 0}}).undecided_gpus
    assert keys == ["calibration.gpus_per_worker", "emulator.gpus_per_worker", "finetune.gpus_per_worker"]
    cluster([HEAD], labels=("ray.io/node-group",))
    assert f"set {', '.join(keys)} to 1" in str(unseen_gpus(keys))
    assert unseen_gpus([]) is None
    gpus["GPU"] = 4.0
    assert unseen_gpus(keys) is None
    gpus["GPU"] = 0.0
    cluster([HEAD])
    assert unseen_gpus(keys) is None
