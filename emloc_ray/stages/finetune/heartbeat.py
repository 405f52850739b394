"""Signs of life of Ray Train's controller: the driver waits for it alone, and would wait for a frozen one for ever."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import uuid
from typing import Any

import psutil
import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emloc_ray.io.store.turns import Still
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.ray.pace import leave_word
from emloc_ray.stages.ray.tasks import remote_task
from emloc_ray.text import duration

_BEAT_S, _LOOK_S, _TASK_S = 5.0, 1.0, 60.0
_NAMESPACE = b"emloc_ray heartbeats"


class Heartbeat(ControllerCallback):
    """Leaves with Ray, every ``beat_s``, what names the controller and its process, and how often it has done so."""

    def __init__(self, key: str, beat_s: float) -> None:
        self.key, self.beat_s = key, beat_s

    def after_controller_start(self, train_run_context: Any) -> None:
        """Begins, and goes on for as long as the process lives."""
        context = ray.get_runtime_context()
        name = f"{context.get_actor_id()} {context.get_node_id()} {os.getpid()} {psutil.Process().create_time()}"
        self._beat(name, 0)
        threading.Thread(target=self._go_on, args=(name,), daemon=True).start()

    def _go_on(self, name: str) -> None:
        for count in itertools.count(1):
            time.sleep(self.beat_s)
            self._beat(name, count)

    def _beat(self, name: str, count: int) -> None:
        put = ray.experimental.internal_kv._internal_kv_put  # noqa: SLF001  as in lock_file
        with contextlib.suppress(Exception):  # a head that does not answer is asked again
            put(self.key, f"{name} {count}", namespace=_NAMESPACE)

    def heard(self) -> str:
        """What was left last; empty before the first time, and after :meth:`forget`."""
        get = ray.experimental.internal_kv._internal_kv_get  # noqa: SLF001  as in lock_file
        return (get(self.key, namespace=_NAMESPACE) or b"").decode()

    def forget(self) -> None:
        """Removes what was left."""
        ray.experimental.internal_kv._internal_kv_del(self.key, namespace=_NAMESPACE)  # noqa: SLF001  as in lock_file


class HeartbeatWatch:
    """Kills a controller whose :attr:`heartbeat` has not been heard for ``within_s``, and leaves the reason as a worker that ends
    itself does. Its workers end with it. It counts its own looks, for this process may have been stopped itself."""

    def __init__(self, job: FinetuneJob, within_s: float, beat_s: float = _BEAT_S) -> None:
        self.job, self.within_s = job, within_s
        self.heartbeat = Heartbeat(uuid.uuid4().hex, beat_s)
        self._heard = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HeartbeatWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(_TASK_S)  # Ray may not answer it

    def release(self) -> None:
        """Removes the placement groups of a controller that was lost, once the block is over. Ray keeps them until the driver
        ends, and the next group would wait for their CPUs for ever. Ray Train 2.60 removes them itself where a dashboard runs and
        all workers had started."""
        if self._heard:
            _run(_release, self._heard.split()[0])

    def _watch(self) -> None:
        still = Still("")
        while not self._over.wait(_LOOK_S):
            if not self._look():
                continue  # the silence may be Ray's
            still.look(self._heard)
            if self._heard and still.seconds > self.within_s:
                why = f"Ray Train's controller gave no sign of life for {duration(still.seconds)}"
                leave_word(self.job.last_word_path, why)
                _, node, pid, created, _ = self._heard.split()
                _run(_kill, int(pid), float(created), node=node)
                still = Still(self._heard)
        self._look()
        with contextlib.suppress(Exception):  # what is left is a line
            self.heartbeat.forget()

    def _look(self) -> bool:
        """Whether Ray answered."""
        try:
            self._heard = self.heartbeat.heard() or self._heard
        except Exception:  # noqa: BLE001  whatever it is, Ray is asked again
            return False
        return True


def _run(work: Any, *arguments: Any, node: str | None = None) -> None:
    """Has Ray run it, on a ``node`` or on any; does nothing where no node does so in time."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False) if node else "DEFAULT"
    task = remote_task(work, num_cpus=0, max_retries=0).options(scheduling_strategy=strategy)
    with contextlib.suppress(Exception):
        ray.get(task.remote(*arguments), timeout=_TASK_S)


def _kill(pid: int, created: float) -> None:
    """Kills a process of this node that was created then: its number may be another's by now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == created:
            process.kill()


def _release(actor: str) -> None:
    """Removes the placement groups that an actor made, which Ray's own table alone names, to its workers alone."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()  # noqa: SLF001  see above
    for row in map(PlacementGroupTableData.FromString, table):
        if row.creator_actor_id.hex() == actor:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(row.placement_group_id)))
