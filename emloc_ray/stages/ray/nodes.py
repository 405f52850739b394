"""The nodes that Ray has, those that its autoscaler may add, and what of their memory a stage's workers ask for."""

import math
from collections.abc import Iterable, Mapping, Sequence

import ray
from ray._private.state import state

from emloc_ray.errors import ConfigError, StageError
from emloc_ray.stages.ray.tasks import Resources
from emloc_ray.text import counted, size

_ROUND = 2**28  # tasks that ask for other amounts are other kinds of tasks to Ray, which keeps each
_ROUNDING = 1e-9  # of shares of GPUs
_LAUNCHED = "ray.io/node-group"
Node = Mapping[str, float]


def live_nodes() -> list[Node]:
    """The resources of each live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def autoscaler_nodes() -> list[Node]:
    """The resources of a node of each kind that an autoscaler says it may add."""
    return [node for node, _ in _autoscaler_kinds()]


def reachable_nodes() -> list[tuple[Node, float]]:
    """The live nodes, once each, and one of each kind that an autoscaler says it may add, with how many it may add."""
    return [*((node, 1.0) for node in live_nodes()), *_autoscaler_kinds()]


def _autoscaler_kinds() -> list[tuple[Node, float]]:
    config = state.get_cluster_config()
    groups = () if config is None else config.node_group_configs
    return [(dict(g.resources), math.inf if g.max_count < 0 else g.max_count) for g in groups if g.max_count]


def has_unknown_autoscaler() -> bool:
    """Whether an autoscaler may add nodes without telling Ray how many: KubeRay and Ray's cluster launcher label their nodes, and
    publish no limits."""
    labelled = (node["Alive"] and _LAUNCHED in node.get("Labels", ()) for node in ray.nodes())
    return state.get_cluster_config() is None and any(labelled)


def unseen_gpus(keys: Sequence[str]) -> str | None:
    """Says so where ``auto`` of these keys takes CPUs under an autoscaler that may have GPUs, but has added none yet."""
    if not keys or ray.cluster_resources().get("GPU") or not has_unknown_autoscaler():
        return None
    return (
        "No node has a GPU yet, and the autoscaler does not tell Ray whether it can add one, so that auto takes CPUs: where it"
        f" can, set {', '.join(keys)} to 1."
    )


def workers_that_fit(wanted: Node, nodes: Iterable[tuple[Node, float]]) -> float:
    """How many workers that each ask for ``wanted`` fit on the nodes at once, each a node and how many there are of it. Ray's
    object store counts as a node's memory."""
    return sum(number * workers for node, number in nodes if (workers := _workers_on(wanted, node)))


def _workers_on(wanted: Node, node: Node) -> float:
    """How many of these workers fit on one node. A node that does not declare its memory has enough for any number."""
    has = {**node, "memory": _memory_with_object_store(node)} if "memory" in node else node
    counted = {kind: amount for kind, amount in wanted.items() if amount and (kind != "memory" or "memory" in node)}
    return min((int(has.get(kind, 0.0) / amount + _ROUNDING) for kind, amount in counted.items()), default=math.inf)


def _memory_with_object_store(node: Node) -> float:
    """A node's memory with its object store."""
    return node["memory"] + node.get("object_store_memory", 0.0)


def grown_cluster() -> dict[str, float]:
    """The cluster's total of each resource, with all nodes that the autoscaler may still add. Memory is infinite where a kind of
    node does not declare it."""
    grown: dict[str, float] = dict(state.get_max_resources_from_cluster_config() or {})
    if any("memory" not in node for node in autoscaler_nodes()):
        grown["memory"] = math.inf
    now = ray.cluster_resources()
    return {name: max(now.get(name, 0.0), float(grown.get(name, 0.0))) for name in {*now, *grown}}


def check_workers(stages: Iterable[tuple[str, Resources, bool]]) -> None:
    """Raises ConfigError with all :func:`worker_problems`."""
    if problems := worker_problems(stages):
        raise ConfigError("\n".join(problems))


def worker_problems(stages: Iterable[tuple[str, Resources, bool]], grown: Node | None = None) -> list[str]:
    """A sentence for each stage of which a worker asks for more CPUs or GPUs than any node has, or is planned to hold more than
    any node's memory, or whose workers have to run together (the flag) and do not fit on all nodes at once. Nodes that an
    autoscaler may add count, and what the cluster is said to have once it is ``grown``: without them the stage would wait
    for ever. On a single node memory decides nothing. Nothing is said under an autoscaler that tells Ray no limits:
    there a stage waits, and :func:`shortage` says what for."""
    if has_unknown_autoscaler():
        return []
    live, problems = reachable_nodes(), []
    reach = [*live, (grown, 1.0)] if grown else live
    nodes = [node for node, _ in reach]
    for stage, asked, together in stages:
        wanted = {"CPU": asked.cpus_per_worker, "GPU": asked.gpus_per_worker}
        able = [node for node in nodes if _workers_on(wanted, node)]
        if len(live) > 1:
            wanted["memory"] = asked.memory_per_worker
        each = f"{wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs a worker"
        if not able:
            largest = " or ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in _largest(nodes))
            problems.append(
                f"{stage} asks for {each}, and the cluster's largest nodes have {largest}: ask for less, or add a node first."
            )
        elif not any(_workers_on(wanted, node) for node in able):
            problems.append(_too_large(stage, asked.memory_per_worker, able))
        elif together and (fitting := workers_that_fit(wanted, reach)) < asked.num_workers:
            memory = f" in {size(wanted['memory'])} of memory" if wanted.get("memory") else ""
            problems.append(
                f"{stage} starts {asked.num_workers} workers at once, with {each}{memory}, and the cluster's nodes hold"
                f" {fitting:g} of them: lower its num_workers, ask for less, or add nodes first."
            )
    return problems


def _too_large(stage: str, planned: float, able: Sequence[Node]) -> str:
    return (
        f"{stage} is planned to hold {size(planned)} a worker, the largest node that could take one has"
        f" {size(max(map(_memory_with_object_store, able)))}: add a larger one, or set memory_budget to what it has."
    )


def _largest(nodes: Sequence[Node]) -> list[Node]:
    """One node with the most CPUs, and one with the most GPUs where that is another."""
    by = [max(nodes, key=lambda node: (node.get(a, 0), node.get(b, 0))) for a, b in (("CPU", "GPU"), ("GPU", "CPU"))]
    return by[:1] if by[1].get("GPU", 0) == by[0].get("GPU", 0) else by


def memory_to_ask(
    stage: str,
    planned: int,
    asked: Resources,
    together: bool,
    nodes: Sequence[Node],
    addable: Sequence[Node] = (),
    grows: bool = False,
) -> tuple[int, str | None]:
    """The bytes that each worker of a stage asks of Ray, where it is planned to hold ``planned``, and a remark.

    ``nodes`` are those now, ``addable`` those that may be added; ``grows``: an autoscaler that Ray knows nothing of may
    add others. None is asked for on the only node that there can be, where memory decides nothing, or where the nodes' memory is
    unknown. Raises StageError where no node has so much, nor will have.
    """
    if not planned or (len(nodes) + len(addable) < 2 and not grows):
        return 0, None
    ours = math.ceil(planned / _ROUND) * _ROUND
    able = [
        n
        for n in (*nodes, *addable)
        if n.get("CPU", 0) >= asked.cpus_per_worker and n.get("GPU", 0) >= asked.gpus_per_worker
    ]
    if not able or any("memory" not in node for node in able):
        if grows and not able:
            return (
                ours,
                f"{stage} asks for {size(ours)} of memory a worker: where no node that joins has that, lower memory_budget.",
            )
        return 0, None
    largest = int(max(node["memory"] for node in able))
    if planned > max(map(_memory_with_object_store, able)):
        if not grows:
            raise StageError(_too_large(stage, planned, able))
        return ours, (
            f"{stage} is planned to hold {size(planned)} a worker, more than any node has: it waits for one that fits; where none"
            " will come, lower memory_budget."
        )
    remark = None
    if ours > largest:
        ours = largest
        remark = (
            f"{stage} is planned to hold {size(planned)} a worker, and Ray gives out {size(largest)} of the largest node, beside"
            " its object store: a worker takes a whole node. Start Ray with a smaller --object-store-memory for more."
        )
    if together and not addable and sum(int(node["memory"] // ours) for node in able) < asked.num_workers:
        too_many = f"{stage} is planned to hold {size(planned)} in each of {asked.num_workers} workers at once, more than nodes"
        if grows:
            return ours, f"{too_many} have now: it waits until more have joined; where none will, lower memory_budget."
        return 0, f"{too_many} have: it starts all the same, and may run out of memory."
    return ours, remark


def shortage(stage: str, asked: Resources, together: bool) -> str | None:
    """Says so where the nodes that there are now hold no worker of a stage, or not all that have to run together; None where they
    do. A cluster may grow; one that does not would let the stage wait without a word."""
    wanted, number = {"CPU": asked.cpus_per_worker, "GPU": asked.gpus_per_worker}, asked.num_workers if together else 1
    fitting = sum(_workers_on(wanted, node) for node in live_nodes())
    if fitting >= number:
        return None
    return (
        f"{stage} begins with {counted(number, 'worker')}, {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs each, of which the"
        f" nodes hold {fitting:g}: it waits until more have joined."
    )
