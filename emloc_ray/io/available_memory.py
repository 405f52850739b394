"""The memory that this process may take, and what is left of it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

# A control group's files of its limit and its usage, and the key of inactive files in its memory.stat.
_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND_VERSION = ("memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = Path("/")) -> float:
    """The memory that is left to this machine, or to the control groups of this process (a container, a job), whose inactive
    files count as left ("working set" in https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction)."""
    return min([float(psutil.virtual_memory().available), *(left for _, left in _groups(root))])


def memory_bytes(root: Path = Path("/")) -> float:
    """The memory of this machine, or what the control groups of this process may take of it."""
    return min([float(psutil.virtual_memory().total), *(limit for limit, _ in _groups(root))])


def _groups(root: Path) -> Iterator[tuple[float, float]]:
    """The limit of each control group, and what is left of it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        # cgroups(7): the second version's line names no controllers. In a container the path may be the host's and missing:
        # then the group itself is at the top.
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage, inactive = _FIRST_VERSION if controllers else _SECOND_VERSION
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                with contextlib.suppress(OSError, ValueError):  # no limit, or "max"
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    held = int((group / usage).read_text()) - int(stat.get(inactive, 0))
                    allowed = float((group / limit).read_text())
                    yield allowed, max(0.0, allowed - held)
