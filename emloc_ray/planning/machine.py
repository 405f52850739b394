"""What this machine has, and whether it is enough for a config; workers may run on other machines."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emloc_ray.core.precision import FAST_FLOAT64, exact_float32, without_autocast
from emloc_ray.errors import ConfigError
from emloc_ray.io.available_memory import available_bytes
from emloc_ray.io.store.replacing import replacing
from emloc_ray.modeling.attention import missing_package, needs_kernel
from emloc_ray.modeling.grouped_experts import KERNEL_MAJORS
from emloc_ray.planning.gpu_speeds import GpuSpeed, ask_gpus, slowest_gpu
from emloc_ray.text import counted, size, size_up

if TYPE_CHECKING:
    from emloc_ray.config.schema import RunConfig
    from emloc_ray.io.runs.directory import RunDirectory

_UNIT = "floating-point operations a second and thread"
# Bytes a second and thread, of files that are in memory into new memory: 0.34, 0.44, 1.27e9 of 34, 134, 411 MB.
_CACHED = 4e8
_PROBED = 64 * 2**20  # bytes that a disk is timed by
_FIRST_WITH_BFLOAT16 = 8.0  # compute capability: Ampere, the first with TF32 too
_TIMING = threading.Lock()  # two timings at once would each put back the number of threads that the other set
WITH_MODELS = ("calibration", "finetune", "evaluation")
"""The config's sections whose workers run a model."""


def of_each_gpu(what: str) -> tuple[float, ...]:
    """A figure of each of this machine's GPUs by ``nvidia-smi``; none where one has no such figure."""
    try:
        return tuple(map(float, ask_gpus(what)))
    except ValueError:
        return ()


def gpu_bytes() -> float:
    """The memory of this machine's smallest GPU; infinite where it has none, or none that ``nvidia-smi`` tells of."""
    return min(of_each_gpu("memory.total"), default=float("inf")) * 2**20


@dataclass(frozen=True)
class Speeds:
    """What stages are timed by: operations a second of a core's and of a GPU's products, of those of float32 without TF32
    apart, bytes a second from the host to a GPU, of a GPU's own memory and from disk, and the host's memory, from which weights
    come that do not stay on a device."""

    cpu_flops: float
    gpu_flops: float = 2e13  # a guess, as the link's: planning needs no GPU
    gpu_float32_flops: float = 5e12
    link: float = 25e9
    gpu_memory: float = 5e11
    disk: float = 250e6
    host_bytes: float = float("inf")
    measured: bool = False  # the GPU's and its link's
    disk_measured: bool = False

    def moving(self, to_gpu: bool, weights: float) -> float:
        """Bytes a second at which a model's weights come to a device; a CPU computes with those that are in memory."""
        if weights > self.host_bytes:
            return self.disk
        return self.link if to_gpu else float("inf")

    def reading(self, num_bytes: float, workers: int) -> float:
        """Bytes a second at which workers read files that stages before have written: copies of what is in memory, or from disk
        where that does not hold them."""
        return self.disk if num_bytes > self.host_bytes else _CACHED * workers


def assumed_speeds() -> Speeds:
    """This machine's products, timed, and a GPU's by its data sheet; guesses of one that has none here."""
    speeds, sheet = Speeds(cpu_flops(), host_bytes=available_bytes()), slowest_gpu()
    if sheet is None:
        return speeds
    return _with_gpu(speeds, sheet)


def _with_gpu(speeds: Speeds, gpu: GpuSpeed) -> Speeds:
    return replace(
        speeds, gpu_flops=gpu.flops, gpu_float32_flops=gpu.float32_flops, link=gpu.link, gpu_memory=gpu.memory
    )


_TIMED_GPU = """
import sys; sys.path = [place for place in sys.path if place]  # without the working directory, which may hold a torch
import time, torch
def rate(amount, work):
    work(); torch.cuda.synchronize(); begin = time.perf_counter()
    for _ in range(5): work()
    torch.cuda.synchronize()
    return 5 * amount / (time.perf_counter() - begin)
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
b, c = torch.empty(2**28, dtype=torch.uint8, pin_memory=True), torch.empty(2**28, dtype=torch.uint8, device="cuda")
wide = a.float()
print(rate(2 * 4096**3, lambda: a @ a), rate(2 * 4096**3, lambda: wide @ wide))
print(rate(2**28, lambda: c.copy_(b, non_blocking=True)))
d = torch.empty_like(c)
print(rate(2**29, lambda: d.copy_(c)))  # read, and written
"""


@functools.cache
def measured_speeds() -> Speeds:
    """The same with a GPU's timed where this machine has one: in a process of its own, whose memory on it goes with it."""
    speeds = assumed_speeds()
    if not of_each_gpu("memory.total"):
        return speeds
    command = (sys.executable, "-c", _TIMED_GPU)
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        timed = GpuSpeed(*map(float, printed.split()))
    except (OSError, subprocess.SubprocessError, ValueError):  # a GPU that torch cannot use, or that is full
        return speeds
    return replace(_with_gpu(speeds, timed), measured=True)


def with_disk_of(speeds: Speeds, files: Sequence[Path], weights: float) -> Speeds:
    """The same with the disk's speed as measured on a model's ``files``, where its ``weights`` are more than memory holds."""
    present = [path for path in files if path.is_file()]
    if weights <= speeds.host_bytes or not present:
        return speeds
    return replace(speeds, disk=disk_speed(max(present, key=lambda path: path.stat().st_size)), disk_measured=True)


def disk_speed(path: Path) -> float:
    """Bytes a second at which the first 64 MiB of a file come from its disk: the kernel is told to forget them first."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, _PROBED, os.POSIX_FADV_DONTNEED)
        begin, count = time.perf_counter(), 0
        while count < _PROBED and (block := file.read(min(2**20, _PROBED - count))):
            count += len(block)
        return max(count, 1) / (time.perf_counter() - begin)


@functools.cache
def cpu_flops() -> float:
    """Floating-point operations a second of one thread in a matrix product, as measured first today on this machine."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emloc_ray"
    with _TIMING:
        return kept_for_the_day(folder / "cpu_speed.json", time_products)


def kept_for_the_day(path: Path, measure: Callable[[], float]) -> float:
    """What was measured first today on this machine with this torch; measured now where ``path`` does not say it."""
    today = {"day": datetime.date.today().isoformat(), "machine": platform.node(), "torch": torch.__version__}
    try:
        kept = json.loads(path.read_text())
        if {key: kept.get(key) for key in today} == today:
            return float(kept[_UNIT])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # measured anew
    speed = measure()
    with contextlib.suppress(OSError):  # a home that cannot be written to
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({**today, _UNIT: speed}) + "\n")
    return speed


def time_products() -> float:
    """Floating-point operations a second of one thread in a matrix product of float32, measured for a tenth of a second,
    whatever dtype, device and precision the caller has set."""
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    own = torch.Generator().manual_seed(0)  # the caller's numbers are its own
    left, right = (torch.randn(n, 768, generator=own, dtype=torch.float32, device=cpu) for n in (512, 768))
    torch.set_num_threads(1)
    try:
        with exact_float32(), without_autocast(cpu):
            left @ right
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < 0.1:
                left @ right
                count += 1
            return count * 2 * 512 * 768 * 768 / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)


def cpu_capabilities() -> dict[str, Any]:
    """The capabilities of this machine's CPU, from torch; empty for an older torch."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def has_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU of these ``capabilities`` computes in bfloat16; True for CPUs other than x86_64."""
    native = any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "avx10_2"))
    return native or capabilities.get("architecture") != "x86_64"


def gpu_without_bfloat16() -> tuple[str, float] | None:
    """The name and the compute capability of this machine's oldest GPU, where that has no instructions for bfloat16."""
    capability, name = min(
        zip(of_each_gpu("compute_cap"), ask_gpus("name"), strict=False), default=(_FIRST_WITH_BFLOAT16, "")
    )
    return (name, capability) if capability < _FIRST_WITH_BFLOAT16 else None


def gpus_compute_bfloat16() -> bool:
    """Whether this machine has GPUs, and all have instructions for bfloat16."""
    return min(of_each_gpu("compute_cap"), default=0.0) >= _FIRST_WITH_BFLOAT16


def gpus_group_products() -> bool:
    """Whether a GPU of this machine runs a mixture's experts together (:func:`emloc_ray.modeling.grouped_experts.has_kernel`),
    or may, where it does not say what it is."""
    capabilities = of_each_gpu("compute_cap")
    return not capabilities or any(int(capability) in KERNEL_MAJORS for capability in capabilities)


def gpus_of_slow_float64() -> bool:
    """Whether a GPU of this machine leaves float64 to the CPU (:func:`emloc_ray.core.precision.has_fast_float64`)."""
    return any(divmod(round(10 * capability), 10) not in FAST_FLOAT64 for capability in of_each_gpu("compute_cap"))


def gpus_expected(config: RunConfig) -> float:
    """The GPUs of a Ray that is started here, as far as torch can use them; of one that is joined none is known yet."""
    if config.ray.joins:
        return 0
    return torch.cuda.device_count() if config.ray.num_gpus is None else config.ray.num_gpus


def check_resources(config: RunConfig, cpus: float | None = None, gpus: float | None = None) -> None:
    """Raises ConfigError where a stage asks more than a Ray that is started here has: it would wait for ever. ``cpus`` and
    ``gpus``: what Ray counts; by default, before Ray runs, those of the config or of this machine."""
    from emloc_ray.config.schema import WORKER_SECTIONS  # here alone: the planner of memory runs without pydantic

    if config.ray.joins:
        return
    if cpus is None:
        cpus = config.ray.num_cpus or os.cpu_count() or 1
    if gpus is None:
        gpus = gpus_expected(config)
    problems = []
    for name in WORKER_SECTIONS:
        section = getattr(config, name)
        together = section.workers_at_once
        asked_cpus, asked_gpus = section.cpus_per_worker * together, section.gpus * together
        if asked_cpus > cpus:
            problems.append(
                f"{name} asks Ray for {asked_cpus:g} CPUs at once, this machine has {cpus:g}: lower"
                f" {name}.{'num_workers' if together > 1 else 'cpus_per_worker'}."
            )
        if asked_gpus > gpus:
            unseen = len(of_each_gpu("memory.total")) > gpus == torch.cuda.device_count()
            why = " (torch sees no others: a build without CUDA, or a driver too old for it)" if unseen else ""
            asked = f"{asked_gpus:g} GPU{'' if asked_gpus == 1 else 's'}"
            problems.append(
                f"{name} asks Ray for {asked} at once, this machine has {gpus:g}{why}: lower"
                f" {name}.gpus_per_worker, name a cluster in ray.address, or, to plan for another machine, give ray.num_gpus."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def check_num_gpus(config: RunConfig) -> None:
    """Raises ConfigError where a Ray that is started here would count more GPUs than torch sees: tasks would fail on those that
    are not there. A plan may be for another machine."""
    asked, seen = config.ray.num_gpus or 0, torch.cuda.device_count()
    if not config.ray.joins and asked > seen:
        raise ConfigError(
            f"ray.num_gpus is {asked}, and torch sees {counted(seen, 'GPU')} of this machine: lower it, or leave it out; a plan"
            " alone may be for another machine."
        )


def check_disk(run: RunDirectory, needed: int) -> None:
    """Raises ConfigError where the disk of the run directory has fewer free bytes than ``needed``."""
    if needed > (free := free_disk(run)):
        raise ConfigError(
            f"run_dir {run.root} needs about {size_up(needed)}, and its disk has {size(free)} free:"
            " make room, or name another place."
        )


def free_disk(run: RunDirectory) -> int:
    """The free bytes of the disk where the run directory is or will be."""
    existing = next(parent for parent in itertools.chain([run.root], run.root.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_packages(config: RunConfig) -> None:
    """Raises ConfigError where the config wants what a package brings that is not installed, or this machine's GPU lacks."""
    _raise(_missing_packages(config) + ([] if config.ray.joins else _too_old(config)))


def check_kernel(config: RunConfig) -> None:
    """Raises ConfigError where the attention that the config names needs a GPU or a package that is not here. A plan needs
    neither; of a Ray that is joined the machines, and what is installed there, are others: :func:`lacks` is asked of them."""
    name = config.model.attn_implementation
    if name is None or not needs_kernel(name):
        return
    without = next((section for section in WITH_MODELS if not getattr(config, section).gpus), None)
    if without is not None:
        raise ConfigError(
            f"model.attn_implementation: {name} computes on GPUs alone, and {without} has none: leave it out, or set"
            f" {without}.gpus_per_worker to 1."
        )
    _raise([] if config.ray.joins else _lacks_kernel(name))


def lacks(configs: Sequence[RunConfig]) -> list[str]:
    """What this machine, as a node of a Ray, lacks of what the configs ask for, each thing once: packages; where it has GPUs
    instructions for bfloat16 and TF32, and attention's kernel."""
    problems = [problem for config in configs for problem in _missing_packages(config)]
    if of_each_gpu("memory.total"):
        problems += [problem for config in configs for problem in _too_old(config)]
        names = [config.model.attn_implementation for config in configs]
        problems += [problem for name in names if name and needs_kernel(name) for problem in _lacks_kernel(name)]
    return list(dict.fromkeys(problems))


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _missing_packages(config: RunConfig) -> list[str]:
    extra, quantization = config.finetune.model_extra or {}, config.emulator.quantization
    optimizer = str(extra.get("optim", ""))
    wanted = {
        f"emulator.quantization: {quantization}": (
            "bitsandbytes",
            "'emloc-ray[quantization]', or take int4, which needs none",
            quantization == "nf4",
        ),
        "finetune.use_liger_kernel": ("liger_kernel", "liger-kernel", bool(extra.get("use_liger_kernel"))),
        f"finetune.optim: {optimizer}": (
            "bitsandbytes",
            "'emloc-ray[quantization]'",
            any(part in optimizer for part in ("bnb", "8bit", "paged")),
        ),
    }
    return [
        f"{key} needs the {package} package: pip install {source}."
        for key, (package, source, is_wanted) in wanted.items()
        if is_wanted and importlib.util.find_spec(package) is None
    ]


def _too_old(config: RunConfig) -> list[str]:
    oldest, section = _oldest_gpu(), config.finetune
    if not section.gpus or oldest >= _FIRST_WITH_BFLOAT16:
        return []
    instead = {
        "bf16": "leave it at auto, or set finetune.fp16: true with model.dtype: float16",
        "tf32": "leave it out",
    }
    asked = {"bf16": section.bf16, **(section.model_extra or {})}
    return [
        f"finetune.{key} needs a GPU of compute capability {_FIRST_WITH_BFLOAT16:g} or higher, this machine has one of"
        f" {oldest:g}: {advice}."
        for key, advice in instead.items()
        if asked.get(key) is True
    ]


def _lacks_kernel(name: str) -> list[str]:
    if (oldest := _oldest_gpu()) < _FIRST_WITH_BFLOAT16:
        return [
            f"model.attn_implementation: {name} needs a GPU of compute capability {_FIRST_WITH_BFLOAT16:g} or higher, this"
            f" machine has one of {oldest:g}: leave it out."
        ]
    missing = missing_package(name)
    return [] if missing is None else [f"model.attn_implementation: {name} needs {missing}."]


def _oldest_gpu() -> float:
    """Its compute capability."""
    return min(of_each_gpu("compute_cap"), default=_FIRST_WITH_BFLOAT16)
