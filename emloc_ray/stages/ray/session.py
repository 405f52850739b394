"""The connection to Ray, and whether each of its nodes sees what a run reads and writes: on a cluster only what they share."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray._private import auto_init_hook
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emloc_ray.core.overlapping import silenced
from emloc_ray.errors import ConfigError, StageError
from emloc_ray.io.store.lock_file import tell_workers
from emloc_ray.stages.ray.nodes import grown_cluster
from emloc_ray.stages.ray.spans import growing_segments
from emloc_ray.stages.ray.tasks import NO_GPU_UNASKED, remote_task
from emloc_ray.text import listed, one_line

T = TypeVar("T")

if TYPE_CHECKING:  # a node that is only asked need not import it
    from emloc_ray.config.schema import RunConfig
    from emloc_ray.io.runs.directory import RunDirectory
    from emloc_ray.planning.prepared import Prepared

# mallopt(3): large blocks go back at once; threads share two heaps, where each would keep what it freed in one of its own.
LEAN_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_ARENA_MAX": "2",
    # oneDNN keeps up to 1,024 compiled products of bfloat16, one for each shape: 0.5 GiB in a training on factors of many ranks,
    # on rows of many lengths.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # pages of 2 MiB: large blocks are cleared twice as fast
}
_SHARED = "put it on a file system that all nodes share under this path"
_FILES_ASKED_FOR = 100  # of data in thousands of folders, of which each node is asked
_ANSWER_SECONDS = 120.0  # a node's first worker may have to start; what answers later is left to the stages
_VISIBLE_SECONDS = 5.0  # what one node of a network file system wrote, another may see a little later


class _OwnRay:
    """The Ray that this process started or joined for its runs: they share it, and the last to leave shuts it down."""

    def __init__(self) -> None:
        self.turn, self.users = threading.Lock(), 0
        self.auto_connect: bool | None = None  # what an interrupt has taken away until the next connection

    def take_back(self) -> None:
        """Ray starts by itself again, where it did before an interrupt."""
        if self.auto_connect is not None:
            auto_init_hook.enable_auto_connect, self.auto_connect = self.auto_connect, None

    def leave(self, broken_off: bool) -> None:
        with self.turn:
            self.users -= 1
            if self.users:
                return
            if broken_off:
                # Threads may be left, and what they still ask of this Ray would start another, or join whatever runs here.
                self.auto_connect, auto_init_hook.enable_auto_connect = auto_init_hook.enable_auto_connect, False
            ray.shutdown()


_OWN = _OwnRay()


@contextlib.contextmanager
def connection(
    address: str | None = None, lean_memory: bool = False, note: Callable[[str], None] | None = None, **options: Any
) -> Iterator[bool]:
    """Connects to Ray, or starts it here, and says which; what was started here is shut down again, where no other thread is
    within such a block. A connection that this process has already is left alone, and ``note`` hears which keys of the ray
    section are not read then.

    With ``lean_memory``, workers give large freed blocks back to the system at once, where glibc would keep them in a heap that
    grows by fragments: a training step of 4 rows of 512 tokens peaked at 0.65 GiB for 1.70, in half as much time again.
    """
    with _OWN.turn:
        joins = ray.is_initialized()
        started = not joins and _connect(address, lean_memory, options)
        is_own = not joins or _OWN.users > 0
        _OWN.users += is_own
        _OWN.take_back()
    broken_off = False
    try:
        unread = [f"ray.{key}" for key in (*(["address"] if address else []), *options)] if joins else []
        if note is not None and unread:
            advice = "start this run once no other runs" if is_own else "call ray.shutdown() before the run"
            note(f"This process has connected to Ray already, which leaves {listed(unread)} unread: {advice}.")
        tell_workers()
        # What Ray Train would log of an error it also raises.
        with silenced("ray.train") if is_own else contextlib.nullcontext():
            yield started
    except (KeyboardInterrupt, SystemExit):
        broken_off = True
        raise
    finally:
        if is_own:
            _OWN.leave(broken_off)


def _connect(address: str | None, lean_memory: bool, options: dict[str, Any]) -> bool:
    """Connects to Ray, or starts it here; returns whether it was started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False, **options}
    if address is not None:
        settings.pop("include_dashboard")
    elif not os.environ.get("RAY_ADDRESS"):
        address = "local"  # Ray's own default is whatever was last started on this machine, by anybody
    given = dict(settings.get("runtime_env") or {})
    own = given.get("env_vars", {})
    # Workers of another's Ray do not have this process's variables. Ray Train uses a worker's GPU before any of our code runs.
    growing = growing_segments({**os.environ, **own} if address == "local" else own)
    variables = {**NO_GPU_UNASKED, **growing, **(LEAN_MEMORY if lean_memory else {})}
    settings["runtime_env"] = {**given, "env_vars": {**variables, **own}}
    try:
        ray.init(address=address, **settings)
    except Exception as error:  # Ray raises this type itself, as where a node is slow to start
        detail = one_line(error)
        busy = address == "local" and "timed out" in detail
        advice = "the machine may be busy, give the same command again" if busy else "check the ray section"
        raise StageError(f"Ray could not be started or reached ({detail}): {advice}.") from error
    return address == "local"


def total(resource: str) -> float:
    """What all nodes have of a resource of Ray's, ``CPU`` or ``GPU``."""
    return ray.cluster_resources().get(resource, 0)


def gpus_within_reach() -> float:
    """The GPUs of all nodes, with those that an autoscaler may still add."""
    return grown_cluster().get("GPU", 0.0)


def smallest_gpu_bytes() -> float | None:
    """The memory of the smallest GPU of all live nodes, by their ``nvidia-smi``; None where none tells of one."""
    from emloc_ray.planning.machine import gpu_bytes

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    said = [value for value in answers(gpu_bytes, nodes).values() if value < float("inf")]
    return min(said, default=None)


def check_nodes(configs: Sequence[RunConfig]) -> None:
    """Asks every live node that work may go to for the packages that the configs need, and nodes with GPUs for what these can
    compute. Raises ConfigError, naming the first node that lacks something."""
    from emloc_ray.planning.machine import lacks

    resources = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    nodes = [node for node, has in resources if has.get("CPU") or has.get("GPU")]
    for address, problems in answers(lacks, nodes, list(configs)).items():
        if problems:
            raise ConfigError("\n".join(f"node {address}: {problem}" for problem in problems))


def hardware() -> dict[str, Any]:
    """Ray's live nodes, their CPUs and GPUs together, and the GPUs' names; empty where Ray is not connected."""
    if not ray.is_initialized():
        return {}
    kinds = [name.partition(":")[2] for name in ray.cluster_resources() if name.startswith("accelerator_type:")]
    nodes = sum(node["Alive"] for node in ray.nodes())
    return {"nodes": nodes, "cpus": total("CPU"), "gpus": total("GPU"), "accelerators": sorted(kinds)}


@dataclass(frozen=True)
class SharedFile:
    """A file that every node must see with this size; ``key`` is its config key, ``what`` says what it is in messages."""

    key: str
    what: str
    path: Path
    num_bytes: int
    advice: str = _SHARED


def check_visible(prepared: Prepared) -> None:
    """Asks every node for a fresh file in the run's directory and for the model's and the data's files; none where a store holds
    them all.

    Nodes that die meanwhile, or that join later, are not asked. Raises ConfigError, naming the first node that does not see one
    of them, and what to do.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1:
        with _probe(prepared.run) as probes:
            files = [*probes, *_model_files(prepared), *data_files(prepared)]
            if files:
                _ask(nodes, files)


@contextlib.contextmanager
def _probe(run: RunDirectory) -> Iterator[list[SharedFile]]:
    if run.store is not None:  # every node asks the store itself
        yield []
        return
    path = run.path(f".visible-{uuid.uuid4().hex}.tmp")
    path.write_text("x")
    advice = "name a directory on a file system that all nodes share, or an object store such as s3://BUCKET/RUN"
    try:
        yield [SharedFile("run_dir", run.place, path, 1, advice)]
    finally:
        path.unlink(missing_ok=True)


def _model_files(prepared: Prepared) -> list[SharedFile]:
    source = prepared.source
    brought = source.hub_id is not None or prepared.run.store is not None
    # The run holds it: this process reads it here, or a worker fetches it from the hub.
    if brought and source.gguf_file is None:
        return []
    file = source.directory / (source.gguf_file or "config.json")
    return [SharedFile("model.source", str(file), file, file.stat().st_size)]


def data_files(prepared: Prepared) -> list[SharedFile]:
    """The first and the last of each split in each folder, where they are local files, of many folders some; a store is asked by
    every node itself."""
    folders: dict[tuple[str, Path], list[Path]] = {}
    for name, sources in prepared.files.items():
        for path in (Path(source.path) for source in sources if not source.is_stored):
            folders.setdefault((f"data.{name}.path", path.parent), []).append(path)
    ends = [(key, path) for (key, _), paths in folders.items() for path in dict.fromkeys((paths[0], paths[-1]))]
    few = ends[:: -(-len(ends) // _FILES_ASKED_FOR) or 1]
    return [SharedFile(key, str(path), path, path.stat().st_size) for key, path in few if path.is_file()]


def _ask(nodes: Sequence[dict[str, Any]], files: Sequence[SharedFile]) -> None:
    for address, unseen in answers(_unseen, nodes, list(files)).items():
        if unseen:
            key, what, advice = unseen[0].key, unseen[0].what, unseen[0].advice
            raise ConfigError(f"{key}: node {address} does not see {what} as it is here: {advice}.")


def answers(function: Callable[..., T], nodes: Sequence[dict[str, Any]], *arguments: Any) -> dict[str, T]:
    """What a function returns on each node, by the node's address; without those that die meanwhile, or take too long. Raises
    ConfigError where one cannot run it."""
    task, asked, answers = remote_task(function, num_cpus=0, max_retries=0), {}, {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=strategy).remote(*arguments)] = node["NodeManagerAddress"]
    done = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)[0] if asked else []
    for answer in done:
        try:
            answers[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            detail = one_line(str(error).strip().splitlines()[-1])
            raise ConfigError(
                f"ray: node {asked[answer]} cannot run emloc_ray ({detail}): install the same version of it, and of what"
                " it needs, on every node."
            ) from error
        except ray.exceptions.RayError:  # the node died: no work goes there either
            continue
    return answers


def _unseen(files: list[SharedFile]) -> list[SharedFile]:
    """Which of the files this node does not find."""
    end = time.monotonic() + _VISIBLE_SECONDS
    while (left := [file for file in files if _size(file.path) != file.num_bytes]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
