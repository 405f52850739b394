"""A whole run in this process, and the most memory that each of its stages takes for itself, as JSON.

    python tests/measured_run.py VALUES.json MODEL_DIR OUT.json

Counted is anonymous memory above what is held when a stage begins: mapped weights are in it once they are copied.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from limited_worker import data_bytes_after_imports
from plain_runs import plain_run

from emloc_ray.planning.memory import BASE_BYTES, total
from emloc_ray.stages.finetune.session import own_environment

_EVERY_S = 0.002
_C = ctypes.CDLL("libc.so.6")


def anonymous_bytes() -> int:
    """What this process holds that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Meter:
    """The peak of each stage."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Looks every few milliseconds while it lasts."""
        gc.collect()  # a worker of its own would begin without what stages before it left
        _C.malloc_trim(0)
        begun, ended = anonymous_bytes(), threading.Event()

        def look() -> None:
            while not ended.wait(_EVERY_S):
                self.peaks[stage] = max(self.peaks.get(stage, 0), anonymous_bytes() - begun)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def main() -> None:
    """Runs and writes."""
    torch.set_num_threads(1)
    data_bytes_after_imports()
    meter = Meter()
    with own_environment():
        run = plain_run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), meter.during)
    memory = run.context.memory
    holds = {
        "calibrate": memory.calibration_hold(),
        "gradients": memory.gradient_plan().hold,
        "correct": memory.selection_plan().hold,
        "finish": memory.finishing_plan().hold,
        "evaluate": memory.evaluation_plan().hold,
    }
    inference = total(memory.inference()) - BASE_BYTES
    found = {"peaks": meter.peaks, "holds": holds, "losses": run.losses, "step_losses": run.step_losses}
    found |= {"inference": inference}
    Path(sys.argv[3]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
