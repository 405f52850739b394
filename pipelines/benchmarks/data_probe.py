"""Measures one pass of rows through the data path in a process of its own: seconds, and peaks of anonymous memory.

    python pipelines/benchmarks/data_probe.py MODEL_DIR ROWS_FILE OUT_DIR

Rows are checked, split, tokenized into shards by Ray Data and streamed back in the order of training. Anonymous memory is
what a process holds itself: no mapped files, no object store, which is counted for all processes together, by the growth of
the machine's shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from emloc_ray.config.reading import parse_config
from emloc_ray.data.ingest import SampleOrder, stream_batches
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.ray.session import connection
from emloc_ray.stages.tokens.tokens import tokenize_data

STEPS, BATCH = 2048, 8


def kilobytes(path: Path, field: str) -> int:
    """A field of a ``/proc`` file, in bytes; 0 where its process is gone."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Peaks(threading.Thread):
    """Watches this process, its Ray workers that have ``named`` in their names, and by how much the machine's shared memory
    grows: the object store."""

    def __init__(self, named: str = "") -> None:
        super().__init__(daemon=True)
        self.named, self.over = named, threading.Event()
        self.peaks = {"driver": 0, "worker": 0, "object store": 0}

    def run(self) -> None:
        """Looks at them every twentieth of a second."""
        own = psutil.Process()
        before = kilobytes(Path("/proc/meminfo"), "Shmem")
        while not self.over.wait(0.05):
            self._see("object store", kilobytes(Path("/proc/meminfo"), "Shmem") - before)
            self._see("driver", kilobytes(Path("/proc/self/status"), "RssAnon"))
            for process in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    name = process.name() + "".join(process.cmdline())
                    if name.startswith("ray::") and self.named in name:
                        self._see("worker", kilobytes(Path(f"/proc/{process.pid}/status"), "RssAnon"))

    def __enter__(self) -> Peaks:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def _see(self, kind: str, size: int) -> None:
        self.peaks[kind] = max(self.peaks[kind], size)


def measure(model_dir: Path, rows: Path, out: Path) -> dict[str, Any]:
    """Peaks in bytes, and seconds from rows to shards and from shards to batches."""
    values = {
        "run_dir": str(out / "run"),
        "model": {"source": str(model_dir)},
        "data": {"train": {"path": str(rows)}, "format": "prompt_completion", "max_seq_length": 64},
        "calibration": {"num_workers": 2},
    }
    with connection(num_cpus=2), Peaks() as peaks:
        begin = time.perf_counter()
        counts = tokenize_data(prepare(parse_config(values)), model_dir, out)["splits"]
        made = time.perf_counter()
        train = out / "tokens" / "train"
        order = SampleOrder(len(TokenShards(train)), BATCH, rank=0, world_size=1, seed=0)
        streamed = sum(len(batch) for batch in stream_batches(train, order, 0, STEPS))
        end = time.perf_counter()
    total = sum(count["rows"] for split, count in counts.items() if split != "calibration")
    tokens = counts["train"]["tokens"]
    rates = {"rows/s": total / (made - begin), "batch rows/s": streamed / (end - made)}
    return {"rows": total, "tokens": tokens, **rates, **peaks.peaks}


def main() -> None:
    """Prints what was measured as JSON, on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model_dir", "rows", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model_dir, arguments.rows, arguments.out)))


if __name__ == "__main__":
    main()
