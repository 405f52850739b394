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
``shapes``         the plan for the paper's models, beside the paper's peaks; writes ``shapes.md`` too
``offloading``     a pass of a model whose blocks come and go, against the slower of compute and transfer; four in one
``bounded``        a whole run of a random model of 1.1B under 2 GiB: each stage's peak, against the limit
``merge``          merging, against a copy of the same files that hashes and fsyncs
``data``           rows into token shards and batches at 10³ to 10⁶ rows: peaks of driver, worker, object store; speed
``growth``         calibrating and factorizing at 1, 2 and 4 times the depth and the rows: time and peak memory
``ray``            the stages on Ray, against the same functions called in one process
``tasks``          eight tasks as a batch, against the same one after another: sharing data and model, or the model
``scheduling``     500 tasks whose stages sleep: what a task costs beyond its sleep, and what the driver holds
``training``       a fine-tuning stage of one step, against one in a Ray Train group of its own
``stored``         ``--tasks`` short tasks with all their stages on an S3 server (moto's); not among ``all``
``quickstart``     the quickstart and the same run at ratio 1.0: wall time, peak memory, gain, gap closed
``selection``      how many rows ``auto`` needs to choose a correction, by labels and by what the tuned emulator predicts
``methods``        each method of the frontier and its rivals alone: making its emulator, tokens a second and peak of training
``within``         configs/low_rank.yaml's stages by the default budget, and without: peaks against inference of the original
``gpu``            8B and 70B shapes of random weights on one GPU, in ``--minutes``; not among ``all``, needs no Ray
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if importlib.util.find_spec("emloc_ray") is None:  # not installed: ``gpu`` runs from a bare checkout
    sys.path.append(str(Path(__file__).parents[1]))

import torch
from benchmarks.figures import THREADS, Figures, publish_figures
from tables import RESULTS

from emloc_ray.errors import ConfigError

# ``MODULE:FUNCTION`` in ``benchmarks``, imported when it is measured: where ``gpu`` runs there may be no Ray.
BENCHMARKS = {
    "factorization": "factorization:factorization",
    "layers": "factorization:layers",
    "allocation": "allocation:allocation",
    "calibration": "whole_runs:calibration",
    "step": "whole_runs:training_step",
    "memory": "memory:memory",
    "shapes": "memory:shapes",
    "offloading": "offloading:offloading",
    "bounded": "offloading:bounded",
    "merge": "memory:merge",
    "data": "data_path:data",
    "growth": "whole_runs:growth",
    "ray": "whole_runs:ray_overhead",
    "tasks": "many_tasks:many_tasks",
    "scheduling": "many_tasks:scheduling",
    "training": "many_tasks:short_training",
    "quickstart": "whole_runs:quickstart",
    "selection": "selection:selection",
    "methods": "methods:methods",
    "within": "within_inference:within",
}
ALONE = {"gpu": "gpu.command:gpu", "stored": "many_tasks:stored_tasks"}  # not among ``all``
LAYERS = ("2048x2048", "4096x4096", "14336x4096", "real")
# The README table that each part writes, and the parts of the other tables.
PUBLISHED = {
    "allocation": "better_ranks.json",
    "memory": "memory.json",
    "shapes": "paper_shapes.json",
    "quickstart": "quickstart.json",
    "selection": "selection.json",
    "methods": "methods.json",
    "within": "within.json",
    "gpu": "gpu.json",
}
TABLES = {
    "speed.json": ("factorization", "layers", "calibration", "step", "growth", "ray", "offloading"),
    "tasks.json": ("tasks", "scheduling", "training"),
    "data.json": ("data",),
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


def main() -> None:
    """Runs the benchmarks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="+", choices=[*BENCHMARKS, *ALONE, "all"])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--layers", nargs="+", choices=LAYERS, default=LAYERS, help="which of them the part `layers` takes"
    )
    parser.add_argument("--tasks", type=int, default=500, help="of the part `stored`")
    parser.add_argument("--minutes", type=float, default=10.0, help="in which the part `gpu` ends, about")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of the part `gpu`")
    parser.add_argument("--shapes", default="full", choices=("full", "tiny"), help="of the part `gpu`")
    parser.add_argument("--publish", action="store_true", help="copy what the README's tables are made of")
    arguments = parser.parse_args()
    if arguments.publish and set(arguments.layers) != set(LAYERS):
        parser.error("--publish takes all layers: leave --layers out.")
    if arguments.publish and "gpu" in arguments.which and (arguments.device, arguments.shapes) != ("cuda", "full"):
        parser.error("--publish takes full shapes on a GPU: leave --device and --shapes out.")
    arguments.out = arguments.out.absolute()  # batches and workers look from elsewhere
    arguments.out.mkdir(parents=True, exist_ok=True)
    which = BENCHMARKS if "all" in arguments.which else arguments.which
    chosen = {name: (BENCHMARKS | ALONE)[name] for name in which}
    options: dict[str, dict[str, Any]] = {
        "stored": {"tasks": arguments.tasks},
        "layers": {"chosen": arguments.layers},
        "gpu": {
            "minutes": arguments.minutes,
            "device": arguments.device,
            "shapes": arguments.shapes,
            "write": functools.partial(write_results, arguments.out),
        },
    }
    for name, where in chosen.items():
        try:
            figures = _function(where)(arguments.out, **options.get(name, {}))
        except ConfigError as error:
            parser.error(str(error))
        write_results(arguments.out, figures)
        print((arguments.out / "benchmark.md").read_text(), end="")
        if not arguments.publish:
            continue
        if name in PUBLISHED:
            shutil.copy(arguments.out / PUBLISHED[name], RESULTS)
        for table, those in TABLES.items():
            if name in those:
                publish_figures(RESULTS / table, those, name, figures)


def _function(where: str) -> Callable[..., Figures]:
    module, _, name = where.partition(":")
    measure: Callable[..., Figures] = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    if where != ALONE["gpu"]:  # which computes beside a card with all cores
        torch.set_num_threads(THREADS)
    return measure


if __name__ == "__main__":
    main()
