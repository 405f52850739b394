"""The kill matrix: every stage × kind of fault × several moments, on a Ray cluster of three nodes.

    python pipelines/faults.py --out runs/faults                                  # all of it: more than an hour
    python pipelines/faults.py --out runs/faults --stages merge --kinds node --moments 1
    python pipelines/faults.py --out runs/faults --chaos 30 --store 0.03
    python pipelines/faults.py --out runs/faults --config configs/low_rank.yaml \\
        emulator.allocation=uniform emulator.objective=activations model.hold=block_by_block

Everything runs on this machine; each node has its own loopback address. One run is undisturbed. Then each cell takes that
run as it was before its stage, disturbs it after a share of the stage's undisturbed time, and compares the stage's files one
by one. Kinds of faults:

    worker, actor, node, driver     SIGKILL to one process, or to all of a node; a killed driver is started again
    pause-worker, -driver, -node    SIGSTOP for twelve seconds, then SIGCONT: a node counts as dead by then
    partition                       what is sent to a node is dropped for twelve seconds (root, in a network namespace: below)
    two-drivers                     a second driver on the same run has to be refused
    disk                            the run's file system is full; once it is not any more, the driver is started again (root)
    head                            SIGKILL to Ray's control store; a new cluster, and the driver started again

--chaos SECONDS instead runs all stages asked for at once, with a random one of the first five every so many seconds;
--batch kills the driver of two tasks and starts it again; --store SHARE runs them on an S3 server of which a share of the
requests is slow, answered 503, or cut off halfway. All three may be asked for at once. A partition is this machine's own,
and Ray keeps to it, in

    unshare --net sh -c "ip link set lo up; python pipelines/faults.py --kinds partition --stages merge --moments 1"

``faults.json`` in the output folder keeps every cell, also those of earlier calls; ``faults.md`` is the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from faulting.matrix import Cell, Matrix
from faulting.nodes import KINDS, Nodes
from faulting.task import make_config

from emloc_ray.config.reading import load_config
from emloc_ray.stages.order import STEPS


def table(cells: Sequence[Cell]) -> str:
    """The cells as Markdown, one line for each, and the sum."""
    lines = [
        "| stage | killed | at | outcome | finished work done again | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in cells:
        outcome = c.outcome + (f": {c.detail}" if c.detail else "")
        victim = f"{c.kind}: {c.victim}" if c.victim and c.victim != c.kind else c.kind
        lines.append(
            f"| {c.stage} | {victim} | {c.moment:.0%} | {outcome} | {c.redone} of {c.pieces} | {c.seconds:.0f} s |"
        )
    counted = [c for c in cells if c.outcome != "none"]
    survived = sum(c.outcome == "survived" for c in counted)
    changed = sum(c.outcome == "changed" for c in counted)
    lines += ["", f"{survived} of {len(counted)} survived with the same files, {changed} ended with others."]
    return "\n".join(lines) + "\n"


def cells(matrix: Matrix, stages: Sequence[str], asked: argparse.Namespace) -> Iterator[Cell]:
    """Those asked for, one after the other, each moment drawn from the whole stage, of a batch from the whole run."""
    seed, last, moments = asked.seed, stages[-1], range(asked.moments)
    if asked.batch:
        for number in moments:
            yield matrix.batch(round(random.Random(f"{seed} batch {number}").uniform(0.05, 0.95), 3))
    if asked.chaos is not None:
        yield matrix.chaos(last, asked.chaos, seed)
    if asked.store is not None:
        yield matrix.faulty_store(last, asked.store, seed)
    if not asked.batch and asked.chaos is None and asked.store is None:
        for stage, kind, number in itertools.product(stages, asked.kinds, moments):
            drawn = random.Random(f"{seed} {stage} {kind} {number}")
            yield matrix.cell(stage, kind, round(drawn.uniform(0.05, 0.95), 3), drawn.randrange(2**32))


def write(out: Path, cells: Sequence[Cell]) -> None:
    """Both files, whole, after every cell."""
    (out / "faults.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=2) + "\n")
    (out / "faults.md").write_text(table(cells))


def main() -> int:
    """Runs the cells asked for; 1 where one was lost or changed what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="config keys to override")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--config", type=Path, help="instead of a small model and task made on the spot")
    stages = [step.name for step in STEPS]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, help="those of them that the config has")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--moments", type=int, default=3)
    parser.add_argument("--batch", action="store_true", help="kill the driver of two whole runs at each moment")
    parser.add_argument("--chaos", type=float, metavar="SECONDS", help="between two faults of one whole run")
    parser.add_argument("--store", type=float, metavar="SHARE", help="of the requests to an S3 server that fail")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    known = out / "faults.json"
    done = [Cell(**cell) for cell in json.loads(known.read_text())] if known.is_file() else []
    first = len(done)
    if arguments.store is not None:
        os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any")  # the server takes all
    with tempfile.TemporaryDirectory(dir=out) as folder, Nodes() as nodes:
        config = load_config(arguments.config or make_config(Path(folder) / "task"), arguments.overrides)
        matrix = Matrix(nodes, config, Path(folder) / "runs")
        stages = [stage for stage in matrix.stages if stage in arguments.stages]
        matrix.undisturbed(matrix.stages if arguments.batch else stages)
        for cell in cells(matrix, stages, arguments):
            done.append(cell)
            write(out, done)
            print(table([cell]).splitlines()[2], flush=True)
    print(table(done[first:]))
    return int(any(cell.outcome in ("lost", "changed") for cell in done[first:]))


if __name__ == "__main__":
    sys.exit(main())
