"""Measurements within a given time: each is on disk as soon as it is made, and none stops the next."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import Figures, figure
from benchmarks.gpu.shapes import Shapes
from emloc_ray.io.store.atomic import write_json

FILE = "gpu.json"
COMMAND = "python pipelines/benchmark.py gpu"


class Session:
    """One run on one device.

    ``found`` is what :data:`FILE` holds: ``machine``, ``parts`` (figures by part, as the README's tables are made of) and
    ``measured`` (by part and case: numbers and ``seconds``, or one sentence under ``left_out`` or ``failed``, and what it was
    ``warned`` of). Numbers beside ``failed`` are from before the device failed.
    """

    def __init__(self, device: str, shapes: Shapes, out: Path, minutes: float) -> None:
        self.device = torch.device("cuda:0" if device == "cuda" else device)  # a share of memory is set by number
        self.shapes, self.out = shapes, out
        self.is_cuda = self.device.type == "cuda"
        self.deadline = time.monotonic() + 60 * minutes
        parts: dict[str, Figures] = {}
        measured: dict[str, dict[str, Any]] = {}
        self.figures = {
            "kind": "figures",
            "command": f"{COMMAND} --minutes {minutes:g}",
            "machine": machine(self.device),
            "shapes": shapes.name,
            "parts": parts,
            "measured": measured,
        }
        self.parts, self.measured = parts, measured
        self._expected_s = self._taken_s = 0.0  # of the cases that ended well: on an H100, and here

    def measure(self, part: str, case: str, needs_s: float, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs one case and writes what it figures; ``needs_s`` is about what it takes on an H100, at full shapes. On a slower
        card as many times more is expected as the cases before took.

        A case that lacks a package or time is left out, one that raises has failed; either says why in a sentence. Warnings
        are told too: the figures may be of what takes the place of a kernel that was not compiled.
        """
        print(f"{part}: {case} …", flush=True)
        begin = time.monotonic()
        left = self.deadline - begin
        expected = needs_s * self.shapes.effort
        slower = max(1.0, self._taken_s / self._expected_s) if self._expected_s else 1.0
        result: dict[str, Any]
        if left < expected * slower:
            result = {"left_out": f"It takes about {expected * slower:.0f} s, and {max(left, 0.0):.0f} s were left."}
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                result = self._tried(action)
            told = dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning))
            result |= {"warned": list(told)} if told else {}
            result["seconds"] = time.monotonic() - begin
            if expected and not {"failed", "left_out"} & result.keys():
                self._expected_s += expected
                self._taken_s += result["seconds"]
        self._note(part, case, result)
        return result

    def _tried(self, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``action`` figures, memory given back before and after: that fails too where the device no longer works."""
        try:
            self.give_back()
            result = action()
        except ImportError as error:
            result = {"left_out": _sentence(error)}
        except Exception as error:  # noqa: BLE001  the next case does not depend on it
            result = {"failed": _sentence(error)}
        try:  # not before the error is gone, whose frames hold the action's tensors
            self.give_back()
        except Exception as error:  # noqa: BLE001
            result.setdefault("failed", _sentence(error))
        return result

    def failed(self, part: str, error: Exception) -> None:
        """Writes that a part raised outside its cases."""
        self._note(part, "beside its cases", {"failed": _sentence(error)})

    def _note(self, part: str, case: str, result: dict[str, Any]) -> None:
        self.measured.setdefault(part, {})[case] = result
        write_json(self.out / FILE, self.figures)
        print(f"{part}: {case}: {result}", flush=True)

    def compare(
        self, part: str, what: str, ours: float | None, baseline: float | None, unit: str, error: float | None = None
    ) -> None:
        """A line of the table, where both sides were measured."""
        if ours and baseline:
            self.parts.setdefault(part, {})[what] = figure(ours, baseline, unit, error)
            write_json(self.out / FILE, self.figures)

    def timed(self, action: Callable[[], Any], repeats: int | None = None, warm_up: int = 2) -> float:
        """Seconds that ``action`` takes: the median, by CUDA's events on a GPU, where all that it started has ended."""
        for _ in range(warm_up):
            action()
        return statistics.median(self._once(action) for _ in range(repeats or self.shapes.repeats))

    def _once(self, action: Callable[[], Any]) -> float:
        if not self.is_cuda:
            clock = time.perf_counter()
            action()
            return time.perf_counter() - clock
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peaks(self) -> dict[str, int]:
        """Bytes that CUDA's allocator held at most since the case began; nothing on a CPU."""
        if not self.is_cuda:
            return {}
        return {
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
        }

    def give_back(self) -> None:
        """Frees unused memory, and resets the peaks."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of: the card, its host and the versions of what computes."""
    machine: dict[str, Any] = {
        "device": device.type,
        "name": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "triton")},
        "gcc": shutil.which("gcc") is not None,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        machine |= {"name": card.name, "bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"}
        machine |= {"cuda": torch.version.cuda, "tf32": torch.backends.cuda.matmul.allow_tf32}
        torch.empty(1, device=device)
        allocator = torch.cuda.memory._snapshot()  # noqa: SLF001  what torch made of the environment's has no other name
        machine["expandable_segments"] = allocator.get("allocator_settings", {}).get("expandable_segments")
    return machine


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text.partition('. ')[0][:300].rstrip('.')}."
