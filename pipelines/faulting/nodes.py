"""A Ray cluster of several nodes on this machine, whose processes and nodes can be killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
from ray.cluster_utils import Cluster

# How soon a dead node counts as dead: seconds, not the quarter of a minute of Ray's defaults.
_ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}
KINDS = (
    "worker",
    "actor",
    "node",
    "driver",
    "pause-worker",
    "pause-driver",
    "pause-node",
    "partition",
    "two-drivers",
    "disk",
    "head",
)
_LATE_S = 3.0  # in which a node that counts as dead may still write
_TRAINING_WORKER = "RayTrainWorker"


class Nodes:
    """A head, on which drivers run, and two more nodes, each with a loopback address of its own."""

    def __init__(self, cpus: int = 2, count: int = 2, head_cpus: int = 1) -> None:
        self._before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        self._cpus, self._count, self._head_cpus, self._next_address = cpus, count, head_cpus, 2
        self._start()

    def _start(self) -> None:
        head = {"num_cpus": self._head_cpus, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(self._count):
            self.add()

    def restart(self) -> None:
        """Another cluster in place of one whose head is lost, at another address."""
        self.cluster.shutdown()
        self._start()

    def add(self) -> None:
        """One more node."""
        self.cluster.add_node(num_cpus=self._cpus, node_ip_address=f"127.0.0.{self._next_address}")
        self._next_address += 1

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()
        for name, value in self._before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value

    def pick_process(self, kind: str, random_numbers: random.Random) -> tuple[psutil.Process, str] | None:
        """A process of that kind, with its name; None where there is none now.

        A ``worker`` is one that runs a task or trains, where there is none an actor of the stage's. An ``actor`` is one
        that does not train, the stage's own rather than one that Ray Data keeps for itself.
        """
        actors = self._actors()
        named = {p: actors.get(p.pid, name) for node in self.all() for p, name in workers(node)}
        tasks = {p: name for p, name in named.items() if p.pid not in actors or name == _TRAINING_WORKER}
        others = {p: name for p, name in named.items() if p.pid in actors and name != _TRAINING_WORKER}
        own = [p for p, name in others.items() if not name.startswith("_")]
        if kind == "worker":
            chosen = [p for p, name in tasks.items() if "IDLE" not in name] or own
        else:
            chosen = own or list(others)
        if not chosen:
            return None
        process = random_numbers.choice(sorted(chosen, key=lambda p: p.pid))
        return process, named[process]

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that Ray counts as alive."""
        return [node for node in self.cluster.global_state.node_table() if node["Alive"]]

    def pick_node(self, random_numbers: random.Random) -> Any:
        """A node other than the head, one that is at work where there is one."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: str(node.node_ip_address))
        at_work = [node for node in nodes if any("IDLE" not in name for _, name in workers(node))]
        return random_numbers.choice(at_work or nodes)

    def kill_node(self, node: Any) -> str:
        """Kills every process of a node; gives its address."""
        kill(_processes(node))
        self.cluster.remove_node(node, allow_graceful=False)
        return str(node.node_ip_address)

    def pause_node(self, node: Any, seconds: float) -> str:
        """Stops every process of a node until Ray counts it as dead, and lets them go on for a while; gives its address."""
        pause(_processes(node), seconds)
        return self._after_a_while(node)

    def cut_node(self, node: Any, seconds: float) -> str:
        """Drops whatever is sent to a node until Ray counts it as dead, and lets it go on for a while; gives its address."""
        route = ("blackhole", f"{node.node_ip_address}/32", "table", "local")
        subprocess.run(["ip", "route", "add", *route], check=True)
        time.sleep(seconds)
        subprocess.run(["ip", "route", "del", *route], check=True)
        return self._after_a_while(node)

    def _after_a_while(self, node: Any) -> str:
        time.sleep(_LATE_S)
        self.cluster.remove_node(node, allow_graceful=False)
        return str(node.node_ip_address)

    def kill_head(self) -> str:
        """Kills the process that knows the cluster's state; without a store of its own that is the end of the cluster."""
        gcs, name = next((p, p.name()) for p in _raylets(self.cluster.head_node) if "gcs_server" in p.name())
        kill([gcs])
        return name

    def all(self) -> Sequence[Any]:
        """The head and the other nodes."""
        return [self.cluster.head_node, *self.cluster.worker_nodes]

    def _actors(self) -> dict[int, str]:
        table = self.cluster.global_state.actor_table(None)
        return {a["Pid"]: a["ActorClassName"].rsplit(".")[-1] for a in table.values() if a["State"] == "ALIVE"}


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL to each, and waits until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def pause(processes: Sequence[psutil.Process], seconds: float) -> None:
    """SIGSTOP to each, and SIGCONT after so many seconds."""
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)


def _raylets(node: Any) -> Iterator[psutil.Process]:
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(info.process.pid)


def _processes(node: Any) -> list[psutil.Process]:
    """A node's raylet, what it started, and its helpers; the raylet first."""
    own = list(_raylets(node))
    with contextlib.suppress(psutil.NoSuchProcess):
        own += [child for process in own for child in process.children(recursive=True)]
    return own


def workers(node: Any) -> list[tuple[psutil.Process, str]]:
    """A node's Ray workers, each with the task or the actor's method that it is at; ``IDLE`` where at none."""
    workers = []
    for process in _processes(node):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            title = process.cmdline()[0]
            if title.startswith("ray::") and "Agent" not in title:  # the node's own helpers
                workers.append((process, title.removeprefix("ray::").split("(")[0]))
    return workers
