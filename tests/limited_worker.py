"""What a Ray worker of the memory test runs when it starts: a limit on the memory that it may take for itself."""

from __future__ import annotations

import os
import resource
from pathlib import Path

LIMIT = "EMLOC_TEST_DATA_LIMIT"


def data_bytes() -> int:
    """This process's private writable memory, which ``RLIMIT_DATA`` bounds (setrlimit(2)); mapped files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def data_bytes_after_imports() -> int:
    """What a worker of the heaviest stage has taken before it does anything, once it has imported all that it needs."""
    import deepspeed  # noqa: F401 - accelerate imports it with a process's first training

    import emloc_ray.modeling.adapter
    import emloc_ray.modeling.holding
    import emloc_ray.stages.correct.correct
    import emloc_ray.stages.evaluate.evaluate
    import emloc_ray.stages.factorize.allocate
    import emloc_ray.stages.heal.heal
    import emloc_ray.stages.merge.merge  # noqa: F401

    return data_bytes()


def limit_memory() -> None:
    """Ray's ``worker_process_setup_hook``."""
    bound = int(os.environ[LIMIT])
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
