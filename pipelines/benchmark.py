"""Measures what the README claims, each as a ratio in one run, and writes it as JSON and Markdown.

    python pipelines/benchmark.py all --out runs/benchmark
    python pipelines/benchmark.py factorization --out runs/benchmark
    python pipelines/benchmark.py allocation memory --publish                  # and pipelines/results/, for the README

``factorization``  all linears of the quickstart's model under real Grams, against the published route
``layers``         single layers of known spectra and real ones, against the published route; ``--layers`` picks some
``allocation``     bare emulators by ``emulator.allocation``, ``objective``, ``storage``, against uniform ones: held-out loss
``calibration``    forward passes with Grams, against the same passes without hooks and without the head
``step``           a training step on the emulator, against one of LoRA on the original
``memory``         peak of fine-tuning the emulator, against inference of the original: the quickstart's, and one of 1.1B
``planner``        every stage's planned memory, against what a process of its own held
``shapes``         the plan for the paper's models, beside the paper's peaks; writes ``shapes.md`` too
``merge``          merging, against a copy of the same files that hashes and fsyncs, and against its largest tensor
``data``           rows into token shards and batches at 10³ to 10⁶ rows: peaks of driver, worker, object store; speed
``growth``         calibrating and factorizing at 1, 2 and 4 times the depth and the rows: time and peak memory
``ray``            the stages on Ray, against the same functions called in one process
``tasks``          eight tasks as a batch, against the same one after another: sharing data and model, or the model
``scheduling``     500 tasks whose stages sleep: what a task costs beyond its sleep, and what the driver holds
``training``       a fine-tuning stage of one step, against one in a Ray Train group of its own
``quickstart``     the quickstart and the same run at ratio 1.0: wall time, peak memory, gain, gap closed
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.allocation import allocation
from benchmarks.data_path import data
from benchmarks.factorization import LAYERS, factorization, layers
from benchmarks.figures import Figures, publish_figures
from benchmarks.many_tasks import many_tasks, scheduling, short_training
from benchmarks.memory import memory, merge, planner, shapes
from benchmarks.whole_runs import THREADS, calibration, growth, quickstart, ray_overhead, training_step
from tables import RESULTS

BENCHMARKS: dict[str, Callable[[Path], Figures]] = {
    "factorization": factorization,
    "layers": layers,
    "allocation": allocation,
    "calibration": calibration,
    "step": training_step,
    "memory": memory,
    "planner": planner,
    "shapes": shapes,
    "merge": merge,
    "data": data,
    "growth": growth,
    "ray": ray_overhead,
    "tasks": many_tasks,
    "scheduling": scheduling,
    "training": short_training,
    "quickstart": quickstart,
}
# What each writes of the README's tables, and of which parts the other tables are made.
PUBLISHED = {
    "allocation": "better_ranks.json",
    "memory": "memory.json",
    "shapes": "paper_shapes.json",
    "quickstart": "quickstart.json",
}
TABLES = {
    "speed.json": ("factorization", "layers", "calibration", "step", "growth", "ray"),
    "tasks.json": ("tasks", "scheduling", "training"),
}


def write_results(out: Path, figures: Figures) -> None:
    """``benchmark.json`` (flat: name to figures), merged into what earlier parts wrote, and ``benchmark.md``."""
    path = out / "benchmark.json"
    known: Figures = json.loads(path.read_text()) if path.is_file() else {}
    known.update(figures)
    path.write_text(json.dumps(known, indent=2) + "\n")
    lines = ["| what | ratio | ours | baseline | unit | error over baseline |", "| --- | --- | --- | --- | --- | --- |"]
    for name, f in known.items():
        error = "" if f["error"] is None else f"{f['error']:+.1e}"
        lines.append(f"| {name} | {f['ratio']:.2f} | {f['ours']:.4g} | {f['baseline']:.4g} | {f['unit']} | {error} |")
    (out / "benchmark.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Runs the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=LAYERS, help="which of them the part `layers` takes"
    )
    parser.add_argument("--publish", action="store_true", help="copy what the README's tables are made of")
    arguments = parser.parse_args()
    if arguments.publish and set(arguments.layers) != set(LAYERS):
        parser.error("--publish takes all layers: leave --layers out.")
    arguments.out = arguments.out.absolute()  # batches and workers look from elsewhere
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)
    parts = {**BENCHMARKS, "layers": functools.partial(layers, chosen=arguments.layers)}
    for name in BENCHMARKS if "all" in arguments.which else arguments.which:
        found = parts[name](arguments.out)
        write_results(arguments.out, found)
        if not arguments.publish:
            continue
        if name in PUBLISHED:
            shutil.copy(arguments.out / PUBLISHED[name], RESULTS)
        for table, those in TABLES.items():
            if name in those:
                publish_figures(RESULTS / table, those, name, found)


if __name__ == "__main__":
    main()
