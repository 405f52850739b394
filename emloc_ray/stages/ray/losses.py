"""Errors of Ray as errors of ours, and restarts of work that lost its worker: each is reported, their number is bounded."""

import collections
import contextlib
import errno
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ray
import torch
from ray.util.metrics import Counter

from emloc_ray.errors import FULL, ArtifactError, EmlocError, StageError, refusal
from emloc_ray.io.runs.secret_values import hide_secrets
from emloc_ray.io.store.node_cache import existing
from emloc_ray.stages.ray.departures import Departures

Tell = Callable[[str], None]
MAX_RESTARTS = 3

# A process, its node, or a result on that node is gone; what the work itself raised is none of these.
LOST = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
)
# Where errors of Ray's tasks, and of Ray Train's, keep what they were raised from.
_HELD = ("cause", "_base_exc", "controller_failure", "health_check_failure")
# Control groups of the second and the first version, and the machine; proc(5).
_KERNEL_COUNTS = tuple(
    map(Path, ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"))
)
# Ray Data adds to what is raised in its tasks how often it tried, and how to have it try more often.
_RAY_DATA_S_ADVICE = "\nFailed to apply UDF transform after "
SILENT = "see its log in Ray's session, and look after its node"  # what to do where a worker gave nothing for too long
# Memory refused in errors of no kind of their own: by torch's allocator on a CPU, by CUDA, and by its libraries.
_REFUSED = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|(CUDA|HIP) error: out of memory|_STATUS_(\w+_)?ALLOC(ATION)?_FAILED"
)
# What torch adds to every error of CUDA, whatever it is: where to read on, and how to run it again.
_CUDA_HELP = (
    "Search for `",
    "CUDA kernel errors might be",
    "For debugging consider passing",
    "Compile with `TORCH_USE",
)
_MEMORY = "set memory_budget to what it has, or lower its batch size or num_workers"


def unheard(text: str) -> None:
    """Drops a message."""


class Losses:
    """How often each piece of a stage's work has lost its worker. Losses of a node that a cloud took back do not count."""

    # Seconds before the first, second and later tries. Together they outlast the 15 s for which, by Ray's defaults, a node
    # counts as alive whose raylet is dead: work restarted at once may be sent to such a node each time.
    delays: tuple[float, ...] = (0.0, 4.0, 16.0)

    def __init__(
        self,
        stage: str,
        tell: Tell = unheard,
        bound: int = MAX_RESTARTS,
        departures: Departures | None = None,
        reached: Callable[[], object] = lambda: None,
        last_word: Callable[[], str] = lambda: "",
        files: Mapping[str, Sequence[Path]] | None = None,
    ) -> None:
        """``reached``: how far pieces have come that do not say so when they are lost; ``files``: what pieces write one after
        another, by their names, which says so too, and is their progress. ``last_word``: why a worker ended itself, for it did
        no more; empty where none did."""
        self.stage, self.tell, self.bound, self.reached, self.last_word = stage, tell, bound, reached, last_word
        self.files = files or {}
        self._at: dict[str, object] = {}  # where each piece was at its last loss
        self.counts: collections.Counter[str] = collections.Counter()
        self.preempted = 0
        self._departures = departures or Departures()
        self._kernel_kills = kernel_kills()

    def look(self) -> None:
        """Looks for nodes that are about to leave; to be called while work is waited for."""
        self._departures.look()

    def record_lost_worker(self, piece: str, error: BaseException, at: object = None) -> float:
        """Counts and reports a lost worker; returns the seconds to wait before its piece is restarted.

        Progress since the piece's last loss (another ``at``) starts the count again. Raises StageError after more than ``bound``
        losses of the piece, and ``error`` itself where no worker was lost.
        """
        if not is_lost(error):
            raise error
        self.look()
        if is_preempted(error) or any(self._departures.named_in(str(cause)) for cause in causes(error)):
            self.preempted += 1
            self._measure("its node was taken back")
            self.tell(f"{self.stage}: {piece} lost its worker because its node was taken back; restarted elsewhere.")
            return self.delays[0]
        if word := self.last_word():
            return self.give_up_waiting(piece, word, error, at)
        before, self._kernel_kills = self._kernel_kills, kernel_kills()
        why, what_to_do = reason(error, kernel_killed=self._kernel_kills > before)
        self._measure(why)
        return self._add(piece, why, what_to_do, error, at)

    def give_up_waiting(self, piece: str, why: str, error: BaseException | None = None, at: object = None) -> float:
        """As :meth:`record_lost_worker`, for a piece whose worker was ended because it gave nothing for too long."""
        self._measure("it gave nothing for too long")
        return self._add(piece, why, SILENT, error, at)

    def _measure(self, cause: str) -> None:
        if ray.is_initialized():
            _lost_workers().inc(1, {"stage": self.stage, "cause": cause})

    def _add(self, piece: str, why: str, what_to_do: str, error: BaseException | None, at: object) -> float:
        at = self._at_now(piece) if at is None else at
        if self._at.get(piece, at) != at:
            self.counts[piece] = 0
        self._at[piece] = at
        self.counts[piece] += 1
        times = self.counts[piece]
        if times > self.bound:
            raise StageError(
                f"{self.stage}: {piece} lost its worker {times} times, the last time because {why}: {what_to_do}."
            ) from error
        self.tell(f"{self.stage}: {piece} lost its worker because {why}; restarted ({times} of {self.bound}).")
        return self.delays[min(times, len(self.delays)) - 1]

    def _at_now(self, piece: str) -> object:
        if piece not in self.files:
            return self.reached()
        with contextlib.suppress(ArtifactError, OSError):
            return len(existing(self.files[piece]))
        return self._at.get(piece)  # of a store that does not answer: as at its last loss


@functools.cache
def _lost_workers() -> Counter:
    return Counter("emloc_ray_lost_workers", "Workers that stages lost, by cause.", ("stage", "cause"))


def is_lost(error: BaseException) -> bool:
    """Whether a worker, its node or a result on it was lost, and nothing else is to blame, nor would be again."""
    lost = any(isinstance(cause, LOST) for cause in causes(error))
    return lost and own_error(error) is None and hopeless(error) is None


def is_preempted(error: BaseException) -> bool:
    """Whether Ray knows that a cloud took the worker's node back."""
    return any(isinstance(cause, ray.exceptions.RayActorError) and cause.preempted for cause in causes(error))


def hopeless(error: BaseException) -> str | None:
    """What will fail again, and what to do about it; None where another try may do."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            return refusal(cause)
        if isinstance(cause, ray.exceptions.OutOfDiskError):
            return (
                "a node's disk is full where Ray keeps what its memory does not hold: free some there, or start Ray with a"
                " larger object_store_memory, and run the same command again"
            )
        if isinstance(cause, ray.exceptions.RuntimeEnvSetupError):
            return f"Ray cannot set up the runtime environment ({last_line(cause)}): correct ray.runtime_env"
    return None


def reason(error: BaseException, kernel_killed: bool = False) -> tuple[str, str]:
    """Why a worker was lost, as far as Ray or the kernel knows, and what to do where it happens repeatedly."""
    chain = list(causes(error))
    text = " ".join(str(cause) for cause in chain)
    if any(is_out_of_memory(cause) for cause in chain) or "memory pressure" in text:
        return "its node ran out of memory", _MEMORY
    if kernel_killed:
        return "the kernel killed a process for memory", _MEMORY
    if any(isinstance(cause, ray.exceptions.NodeDiedError) for cause in chain) or "node has died" in text:
        return "its node died", "look after the node, then run the same command again"
    if any(isinstance(cause, ray.exceptions.ActorUnavailableError) for cause in chain):
        return "it does not answer", "look after its node and the network, then run the same command again"
    if any(isinstance(cause, ray.exceptions.ObjectLostError) for cause in chain):
        return "its result was lost with its node", "look after the nodes, then run the same command again"
    return "its process crashed or was killed", f"see its log in Ray's session; where memory ran short, {_MEMORY}"


def kernel_kills() -> int:
    """How many processes the kernel has killed for memory: in this control group and on this machine."""
    total = 0
    for path in _KERNEL_COUNTS:
        with contextlib.suppress(OSError):  # not Linux, or no control group
            lines = (line.split() for line in path.read_text().splitlines())
            total += sum(int(count) for key, count in lines if key == "oom_kill")
    return total


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was raised from, on this process or on a worker."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        held = (getattr(current, name, None) for name in _HELD)
        pending += [*(e for e in held if isinstance(e, BaseException)), current.__cause__, current.__context__]
        pending += list(getattr(current, "worker_failures", {}).values())


def own_error(error: BaseException) -> EmlocError | None:
    """The EmlocError at the bottom of what Ray raised, as it was raised on the worker; None where there is none."""
    candidates = (e for e in causes(error) if isinstance(e, EmlocError) and not isinstance(e, ray.exceptions.RayError))
    own = next(candidates, None)
    if own is not None and _RAY_DATA_S_ADVICE in str(own):
        own.args = (str(own).partition(_RAY_DATA_S_ADVICE)[0], *own.args[1:])
    return own


def explain(error: BaseException, stage: str) -> EmlocError:
    """Any error of a stage as one of ours: the worker's own sentence, or what Ray lost and what to do."""
    own = own_error(error)
    if own is not None:
        return own
    if any(is_out_of_memory(cause) for cause in causes(error)):
        return StageError(f"{stage}: a worker ran out of memory: {_MEMORY}.")
    if (why_not := hopeless(error)) is not None:
        return StageError(f"{stage}: {why_not}.")
    if is_lost(error):
        why, what_to_do = reason(error)
        return StageError(f"{stage}: a worker was lost because {why}: {what_to_do}.")
    return StageError(f"{stage}: {type(error).__name__}: {last_line(error)}")


def last_line(error: BaseException) -> str:
    """The last line that an error says, in which tracebacks end, without CUDA's help and secrets; its kind where it says
    nothing."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(_CUDA_HELP)]
    return hide_secrets(lines[-1] if lines else type(error).__name__).strip()[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Killed by Ray's memory monitor, refused by the operating system, by torch's allocators, or by CUDA and its
    libraries."""
    kinds = (ray.exceptions.OutOfMemoryError, MemoryError, torch.OutOfMemoryError)
    refused = isinstance(error, RuntimeError) and _REFUSED.search(str(error)) is not None
    return refused or isinstance(error, kinds) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
