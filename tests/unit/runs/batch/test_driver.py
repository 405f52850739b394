"""What of a batch the cluster could never run, node by node; without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.cache import ArtifactCache
from emloc_ray.planning.plan import StagePlan
from emloc_ray.runs.batch.admission import Amount
from emloc_ray.runs.batch.config import LimitsConfig
from emloc_ray.runs.batch.driver import check_fit, cluster_capacity, lacking_cache, largest_stage, run_batch
from emloc_ray.stages.ray import nodes

NODE = {"CPU": 3.0, "memory": 2.0**34}
TRAINING = StagePlan("finetune", {"weights": 2.0**30}, 0, 1.0, 3, 2.0, 0.0, together=True)
SLOTS = StagePlan("calibrate", {"weights": 2.0**30}, 0, 1.0, 3, 2.0, 0.0)
ON_GPU = StagePlan("evaluate", {"weights": 2.0**30}, 0, 1.0, 1, 16.0, 1.0, divisible=True)
ADVICE = "; if the cluster is to grow, name how far in the batch's limits.$"


@pytest.mark.parametrize(
    ("stage", "live", "limits", "refused"),
    [
        (TRAINING, [NODE, NODE], {}, f"finetune starts 3 workers at once, .* hold 2 of them.*{ADVICE}"),
        (SLOTS, [NODE, NODE], {}, None),
        (TRAINING, [NODE, NODE], {"cpus": 6}, None),
        (
            SLOTS,
            [NODE, NODE],
            {"cpus": 4},
            r"calibrate needs 6 CPUs and 3.00 GiB at once: .* raise the batch's limits\.$",
        ),
        (
            ON_GPU,
            [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 64.0}],
            {},
            f"evaluate asks for 16 CPUs and 1 GPUs a worker, .*{ADVICE}",
        ),
        (ON_GPU, [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 64.0}], {"cpus": 16, "gpus": 1}, None),
        (TRAINING, [{"CPU": 1.0, "KubeRay": 1.0}], {}, None),
    ],
    ids=[
        "together",
        "in turns",
        "within limits",
        "beyond limits",
        "of two nodes",
        "on a node to come",
        "only a head up",
    ],
)
def test_what_no_nodes_can_take_is_refused(
    stage: StagePlan, live: list[Any], limits: dict[str, Any], refused: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, config = [SimpleNamespace(name="a")], SimpleNamespace(limits=LimitsConfig(**limits))
    prepared: Any = SimpleNamespace(
        batch=SimpleNamespace(tasks=tasks, config=config), work=SimpleNamespace(stages=lambda task: (stage,))
    )
    monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: None)
    labels = [{"ray.io/node-group": "head"} if "KubeRay" in node else {} for node in live]
    listed = [{"Alive": True, "Resources": node, "Labels": of} for node, of in zip(live, labels, strict=True)]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: listed)
    if refused is None:
        check_fit(prepared)
        return
    with pytest.raises(ConfigError, match=f"^task a: {refused}"):
        check_fit(prepared)


@pytest.mark.parametrize(("label", "expected"), [(None, Amount(8, 0, 3e9)), ("worker", Amount(16, 1, 6e9))])
def test_a_cluster_that_may_grow_unseen_is_asked_for_more_than_it_has(
    label: str | None, expected: Amount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its autoscaler adds nodes for what waits in Ray alone, the first GPU too."""
    monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: None)
    monkeypatch.setattr(nodes.state, "get_max_resources_from_cluster_config", lambda: None)
    labels = {} if label is None else {"ray.io/node-group": label}
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [{"Alive": True, "Labels": labels}])
    now = {"CPU": 8.0, "memory": 2e9, "object_store_memory": 1e9}
    monkeypatch.setattr(nodes.ray, "cluster_resources", lambda: now)
    training = StagePlan("finetune", {"weights": 1e9}, 0, 1.0, 2, 3.0, 0.5, together=True)
    bag = StagePlan("factorize", {"weights": 1e8}, 0, 1.0, 100, 1.0, 0.0, divisible=True)
    work = SimpleNamespace(stages=lambda task: (training, bag))
    prepared: Any = SimpleNamespace(batch=SimpleNamespace(tasks=["a", "b"]), work=work)
    least = largest_stage(prepared)
    assert least == Amount(6, 1, 2 * training.host_bytes)
    assert cluster_capacity(LimitsConfig(), least) == expected
    assert cluster_capacity(LimitsConfig(cpus=64), least) == replace(expected, cpus=64)


@pytest.mark.parametrize(("most", "is_said"), [(None, False), (2**30, True), (2**40, False)])
def test_a_cache_that_is_smaller_than_what_a_task_shares_is_told(
    tmp_path: Path, most: int | None, is_said: bool
) -> None:
    work = SimpleNamespace(cache=ArtifactCache(str(tmp_path), most), shared_bytes=lambda task: 2**33)
    prepared: Any = SimpleNamespace(batch=SimpleNamespace(tasks=["a", "b"]), work=work)
    said = lacking_cache(prepared)
    assert (said is not None) is is_said
    if said is not None:
        assert said.startswith("cache.max_size 1.00 GiB is less than the 8.")


def test_a_batch_asks_for_its_machine_s_gpus_before_it_starts_ray() -> None:
    def lacking() -> None:
        raise ConfigError("task a: there are none.")

    run = SimpleNamespace(lock=lambda tell: None, unlock=lambda: None)
    prepared: Any = SimpleNamespace(batch=None, run=run, work=SimpleNamespace(check_num_gpus=lacking))
    with pytest.raises(ConfigError, match="there are none"):
        run_batch(prepared)
