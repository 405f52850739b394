"""What the benchmarks share: figures, timing in turns, and the artifacts of the docstring task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import emloc_ray

if TYPE_CHECKING:
    from emloc_ray.config.schema import RunConfig

DOCSTRINGS = Path(__file__).parents[2] / "configs" / "docstrings.yaml"
QUICKSTART = DOCSTRINGS.with_name("quickstart.yaml")
LOW_RANK = DOCSTRINGS.with_name("low_rank.yaml")
THREADS = 2  # of a benchmark on CPUs, so that figures of any two can be compared
Figures = dict[str, dict[str, Any]]

_PAPER = (
    "emulator.allocation=uniform",
    "emulator.objective=activations",
    "emulator.healing=null",
    "memory_budget=null",
)


def paper_config(run_dir: Path, *overrides: str) -> RunConfig:
    """The quickstart's model by the paper's emulator, batches as written: uniform ranks, factors for activations, no healing;
    128 calibration rows of the docstring task."""
    given = [f"run_dir={run_dir}", *_PAPER, "calibration.num_calibration_samples=128", *overrides]
    return emloc_ray.load_config(DOCSTRINGS, given)


def figure(ours: float, baseline: float, unit: str, error: float | None = None) -> dict[str, Any]:
    """One line of the result; ``ratio`` is baseline over ours, so that more is better. In ``unit`` stands what the baseline
    is: ``s (baseline: the limit)``."""
    return {"ratio": baseline / ours, "ours": ours, "baseline": baseline, "unit": unit, "error": error}


def write_result(path: Path, kind: str, which: str, **content: Any) -> None:
    """What :mod:`ablations.tables` makes a table of, by its ``kind``, with the command that measures it again."""
    command = f"python pipelines/benchmark.py {which}"
    path.write_text(json.dumps({"kind": kind, "command": command, **content}, indent=2) + "\n")


def publish_figures(path: Path, parts: Sequence[str], part: str, new: Figures) -> None:
    """Puts the figures of one of a table's parts in place of those of an earlier day."""
    known = json.loads(path.read_text())["parts"] if path.is_file() else {}
    figures = {**known, part: new}
    write_result(path, "figures", " ".join(parts), parts={name: figures[name] for name in parts if name in figures})


def saved_whole(directory: Path, save: Callable[[Path], object]) -> Path:
    """A directory that ``save`` makes once; where it was killed, it starts again."""
    if not directory.is_dir():
        part = directory.with_name(f"{directory.name}.part")
        save(part)
        part.rename(directory)
    return directory


def interleaved(actions: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """The fewest seconds of each action, run in turns: more is due to other work on the machine."""
    times: list[list[float]] = [[] for _ in actions]
    for action in actions:
        action()
    for _ in range(repeats):
        for action, seconds in zip(actions, times, strict=True):
            begin = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - begin)
    return [min(seconds) for seconds in times]


def calibrated(out: Path) -> tuple[RunConfig, Path]:
    """A run of it up to its Grams, made once."""
    config = paper_config(out / "ratio-0.5")
    emloc_ray.run(config, until="calibrate", accept_changes=True)
    return config, Path(config.run_dir)


def emulated(run: Path, out: Path) -> Path:
    """Its emulator."""
    emloc_ray.run(paper_config(out / "ratio-0.5"), until="factorize", accept_changes=True)
    return run / "emulator"
