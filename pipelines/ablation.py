"""Any grid of method × ratio × correction × calibration × data set × seed as one batch, and its table.

    python pipelines/ablation.py configs/ablations/baselines.yaml --dry-run    # every error at once, and the time planned
    python pipelines/ablation.py configs/ablations/baselines.yaml              # again: what is not done yet
    python pipelines/ablation.py configs/ablations/baselines.yaml 'datasets=[summaries]' 'seeds=[0]' finetune.bf16=true
    python pipelines/ablation.py configs/ablations/baselines.yaml --publish    # and pipelines/results/baselines.json
    python pipelines/ablation.py configs/ablations/baselines.yaml --reuse      # only what is in no file of pipelines/results
    python pipelines/ablation.py configs/ablations/baselines.yaml --collect    # nothing: shows what is there

Keys of a file: ``base`` (a config that all runs begin with), ``run_dir``, ``shared`` (what files share: data, figures, cache),
``datasets`` (summaries, names, code, exceptions), ``seeds``, ``rows`` (of train, selection, eval, calibration), ``methods`` (of
each a ``name``, the config keys that are its own, ``prune``: layers, random or structured, ``align``: other rows, on which all
that pruning kept is trained before, ``heal_on``: other rows, ``start``: weights or activations, by which an adapter begins at
what makes up for the emulator's lack), ``upper_bound`` (the method that is LoRA on the original), ``compare_with``
(method, calibration, correction or a key of the grid), ``grid`` (config key: values, for methods that do not set it),
``unrounded`` (begin with the base's ``.gguf`` of 4 bits plus noise within half a step of its grid),
``calibrations`` (name: ``foreign`` rows, their ``share``, ``shuffle``), ``corrections`` (name: method, clamp, strength; tried on
every trained adapter), ``max_concurrent``, ``limits``, ``cache``.

The results are in the file's ``run_dir``: ``results.json`` has every figure of every cell, ``results.md`` the table; each
run is in ``tasks/NAME`` with a page of its own, but for its merged model, which is dropped once it is evaluated. Figures are
the share of the gap closed, (original − method) / (original − LoRA on the original) in held-out loss, paired by data set and
seed; a cell that failed is shown as missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ablations import records, runs
from ablations.cell_figures import disagreeing
from ablations.cells import Ablation, read_ablation
from ablations.statistics import summarize
from ablations.tables import read_results, render
from rich.console import Console
from tables import RESULTS

from emloc_ray.errors import EmlocError
from emloc_ray.io.store.atomic import write_json
from emloc_ray.text import duration
from emloc_ray.ui.batch_table import BatchView
from emloc_ray.ui.terminal import progress_bar, quiet_libraries


def main() -> int:
    """Runs a file; 1 where cells are missing, 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the file's own keys, or of every run")
    parser.add_argument("--dry-run", action="store_true", help="check, start and write nothing")
    parser.add_argument("--collect", action="store_true", help="run nothing, show what is there")
    parser.add_argument(
        "--publish", action="store_true", help="write pipelines/results/NAME.json, NAME that of run_dir"
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="take cells from pipelines/results whose rows, config and code are the same",
    )
    arguments = parser.parse_intermixed_args()
    console = Console()
    quiet_libraries()
    try:
        ablation = read_ablation(arguments.config, arguments.overrides)
        for note in ablation.notes:
            console.print(note, soft_wrap=True, markup=False, highlight=False)
        if arguments.dry_run:
            with progress_bar(console, "Checking every cell") as progress:
                seconds = runs.check(ablation, progress)
            plan = f"{len(ablation.cells)} cells, about {duration(seconds)} one after another if nothing is shared"
            console.print(f"{ablation.name}: {plan}. All cells are valid; nothing was started.", soft_wrap=True)
            return 0
        known = read_results(RESULTS) if arguments.reuse else {}
        return run(ablation, console, arguments.collect, RESULTS if arguments.publish else None, known)
    except EmlocError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def run(
    ablation: Ablation,
    console: Console,
    only_collect: bool = False,
    publish_to: Path | None = None,
    published: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> int:
    """Runs the cells that are neither done nor in the ``published`` results, then writes all results; fails where cells are
    missing."""
    failed: dict[str, str] = {}
    with BatchView(console) as view:
        ablation = runs.unrounded(ablation, view.tell)
        cells = runs.known_data(ablation) if only_collect else runs.make_data(ablation, view.tell)
        held = {name: result["cells"] for name, result in published.items() if "cells" in result}
        refused = disagreeing(held)
        if refused:
            files = ", ".join(f"{name}.json" for name in refused)
            view.tell(
                f"No figure is taken from {files}: they give different losses for the same inputs, some by older code."
                " Publish the older ones again."
            )
        for name in sorted(held.keys() - set(refused)):
            known = held[name]
            view.tell(
                f"{cells.take(known)} of the {len(known)} figures in {name}.json are of these cells, and new here."
            )
        try:
            if not only_collect:
                failed = runs.run(ablation, cells, view.show, view.tell)
        finally:  # after Ctrl-C too
            every_record = records.collect(ablation, cells, failed)
            rows = summarize(every_record, records.label_keys(ablation), ablation.config.compare_with)
            result = records.published(ablation, cells, every_record, rows)
            write_json(ablation.root / "results.json", {**result, "records": every_record})
            (ablation.root / "results.md").write_text(render(result) + "\n")
    console.print(render(result), soft_wrap=True, markup=False, highlight=False)
    missing = {record["cell"]: record["reason"] for record in every_record if record["status"] == records.MISSING}
    for name, reason in missing.items():
        console.print(f"{name} is missing: {reason}", soft_wrap=True, markup=False, highlight=False)
    for dataset, seed in dict.fromkeys((r["dataset"], r["seed"]) for r in every_record if _has_no_gap(r)):
        console.print(
            f"{dataset}, seed {seed}: {ablation.config.upper_bound} gained nothing, so that there is no gap to close."
        )
    if publish_to is not None and missing:
        console.print("Nothing is published: cells are missing.")
    elif publish_to is not None:
        write_json(publish_to / f"{ablation.name}.json", result)
        console.print(f"{publish_to / ablation.name}.json is written; the README's table: python pipelines/tables.py")
    return int(bool(missing))


def _has_no_gap(record: records.Record) -> bool:
    return None not in (record["loss"], record["upper_bound_loss"]) and record["gap_closed"] is None


if __name__ == "__main__":
    sys.exit(main())
