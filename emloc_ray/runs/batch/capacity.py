"""What a cluster has, and whether what tasks ask for can be had on it at all."""

from __future__ import annotations

from collections.abc import Iterable

import ray

from emloc_ray.runs.batch.admission import Amount
from emloc_ray.runs.batch.config import LimitsConfig
from emloc_ray.planning.plan import StagePlan

_ADVICE = "lower what it asks for, or name in the batch's limits what the cluster grows to."


def cluster_capacity(limits: LimitsConfig) -> Amount:
    """All CPUs, GPUs and memory that Ray may place work on now, or what the batch may hold of them."""
    have = ray.cluster_resources()
    memory = _physical(have)
    return Amount(
        have.get("CPU", 0.0) if limits.cpus is None else limits.cpus,
        have.get("GPU", 0.0) if limits.gpus is None else limits.gpus,
        memory if limits.memory is None else float(limits.memory),
    )


def unfit(stages: Iterable[StagePlan], limits: LimitsConfig) -> list[str]:
    """A sentence for each stage that the cluster could never run: a worker that fits no node, or workers that must be there
    together and do not fit; empty where all fits. What ``limits`` name the cluster is taken to grow to."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    whole = cluster_capacity(limits)
    largest = Amount(
        max([whole.cpus if limits.cpus else 0.0, *(n.get("CPU", 0.0) for n in nodes)]),
        max([whole.gpus if limits.gpus else 0.0, *(n.get("GPU", 0.0) for n in nodes)]),
        max([whole.memory if limits.memory else 0.0, *(_physical(n) for n in nodes)]),
    )
    problems = []
    for stage in stages:
        worker = Amount(stage.cpus_per_worker, stage.gpus_per_worker, stage.host_bytes)
        together = worker if stage.divisible else worker * stage.num_workers
        if not worker.fits_in(largest):
            problems.append(
                f"{stage.name} needs {_told(worker)} for one worker, the largest node has {_told(largest)}: {_ADVICE}"
            )
        elif not together.fits_in(whole):
            problems.append(
                f"{stage.name} needs {_told(together)} for its {stage.num_workers} workers, there is {_told(whole)}:"
                f" {_ADVICE}"
            )
    return problems


def _physical(resources: dict[str, float]) -> float:
    """Ray sets a part of the memory aside for its object store, which is given to whoever asks first."""
    return resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)


def _told(amount: Amount) -> str:
    gpus = f", {amount.gpus:g} GPUs" if amount.gpus else ""
    return f"{amount.cpus:g} CPUs{gpus} and {amount.memory / 2**30:.1f} GiB"
