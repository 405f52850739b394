"""What a stage costs, by the stage's own account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emloc_ray.config.base import StageConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, Parts
from emloc_ray.planning.prepared import Prepared

# Bytes a second of packed triangles, row by row in one thread: 0.53, 0.59, 0.63e9 of orders 4096, 8192, 14336.
_UNPACKED = 6e8
# Operations that a thread's products do while it unpacks one weight of few bits: 20 to 70 in matrices that caches hold, 210 to
# 660 in those of order 4096, where most of the time goes to memory; by ``dense_weight``, and by ``dequantize_nf4``.
_UNPACKING_ON_CPU = 250
_UNPACKING_ON_GPU = 3  # bytes of a GPU's memory: half a byte or a whole one is read, and two are written


@dataclass(frozen=True)
class StageCost:
    """``memory``: bytes of one worker at its peak by part, without what every process holds.

    ``flops``: floating-point operations of all workers in the model's dtype, ``float32_flops`` those of float32 without TF32.
    ``unpacked``: weights of few bits that all workers unpack. ``disk_bytes``: what the stage leaves, or needs while it runs;
    ``written_bytes``: what it writes, where that is not as much. ``moved_bytes``: what comes to the devices of all workers of
    weights that do not stay there. ``efficiency``: the share of a matrix product's speed that it reaches. ``start_seconds``:
    starting workers and loading. ``steps``: its optimizer steps. ``scores``: what is computed and moved between these, not
    counted in the others. ``sums_read``: bytes of packed triangles that all workers read, which one with a GPU does beside its
    computing.
    """

    memory: Parts
    flops: float = 0.0
    float32_flops: float = 0.0
    unpacked: float = 0.0
    disk_bytes: int = 0
    written_bytes: int = 0
    moved_bytes: float = 0.0
    efficiency: float = 0.5
    start_seconds: float = 5.0
    steps: float = 0.0
    scores: StageCost | None = None
    sums_read: int = 0

    @property
    def written(self) -> int:
        """Bytes that it writes."""
        return self.written_bytes or self.disk_bytes


@dataclass(frozen=True, kw_only=True)
class Costed:
    """What planning needs of a stage; it is handed the stages and imports none. ``name`` is its word in manifest and log;
    ``workers`` gives the config section whose workers it takes. ``outputs`` and ``scratch`` are folders of the run directory:
    what later stages read, and what a killed try is continued from."""

    name: str
    workers: Callable[[RunConfig], StageConfig]
    working: Callable[[Prepared], int] | None = None
    """How many of these workers there is work for; None: for all."""
    divisible: bool = False
    """Whether fewer workers than asked for can do it: a bag of tasks."""
    wanted: Callable[[Prepared], bool] = lambda prepared: True
    """Whether this config has the stage."""
    steps: Callable[[Prepared], tuple[int, str]] | None = None
    """Its optimizer steps, and of what: ``(8, "on the original")``."""
    outputs: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    cost: Callable[[MemoryModel], StageCost] | None = None
    """Memory, disk and work; None where it is not planned for."""

    def asked(self, prepared: Prepared) -> StageConfig:
        """The workers that it asks of Ray: those that there is work for."""
        section = self.workers(prepared.config)
        return section if self.working is None else section.model_copy(update={"num_workers": self.working(prepared)})


def busy_seconds(cost: StageCost, asked: StageConfig, speeds: Speeds, weights: float) -> float:
    """Seconds that its workers compute, or move weights or read sums if that takes longer, as these overlap; on CPUs sums are
    unpacked in between. ``weights``: bytes of the original."""
    on_cpus = max(1.0, asked.cpus_per_worker) * speeds.cpu_flops
    computing = cost.flops / (asked.gpus * speeds.gpu_flops or on_cpus)
    computing += cost.float32_flops / (asked.gpus * speeds.gpu_float32_flops or on_cpus)
    computing /= asked.num_workers * cost.efficiency
    unpacking = _UNPACKING_ON_GPU / (asked.gpus * speeds.gpu_memory) if asked.gpus else _UNPACKING_ON_CPU / on_cpus
    computing += cost.unpacked * unpacking / asked.num_workers
    if not asked.gpus:
        computing += cost.sums_read / (_UNPACKED * asked.num_workers)
    moving = cost.moved_bytes / (speeds.moving(asked.gpus > 0, weights) * asked.num_workers)
    return max(computing, moving, cost.sums_read / speeds.reading(cost.sums_read, asked.num_workers))


def with_base(parts: Parts) -> Parts:
    """A stage's parts in whole bytes, with ``base``: what a worker holds with torch, transformers and PEFT imported."""
    return {"base": BASE_BYTES, **{part: int(size) for part, size in parts.items() if size}}
