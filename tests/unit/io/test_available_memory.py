"""What is left of memory is what a machine and a process's control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_ray.io.available_memory import available_bytes, memory_bytes


@pytest.mark.parametrize(
    ("told", "top", "names"),
    [
        ("0::/job/step\n", "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpu:/\n4:memory:/job/step\n",
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["second version", "first version"],
)
def test_what_a_control_group_leaves(tmp_path: Path, told: str, top: str, names: tuple[str, str, str]) -> None:
    limit, usage, inactive = names

    def group(path: str, most: str, held: int, files: int) -> None:
        (tmp_path / top / path).mkdir(parents=True, exist_ok=True)
        for name, text in ((limit, most), (usage, str(held)), ("memory.stat", f"anon 5\n{inactive} {files}")):
            (tmp_path / top / path / name).write_text(text + "\n")

    whole, machine = available_bytes(tmp_path), memory_bytes(tmp_path)  # no such files: this machine's
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(told)
    group("job/step", "max", 0, 0)
    assert available_bytes(tmp_path) == pytest.approx(whole, rel=0.2)
    assert memory_bytes(tmp_path) == machine >= whole
    group("job", str(10 * 2**20), 4 * 2**20, 2**20)  # the job's bounds its step
    assert available_bytes(tmp_path) == 7 * 2**20
    assert memory_bytes(tmp_path) == 10 * 2**20
    group("job/step", str(2 * 2**20), 3 * 2**20, 0)
    assert available_bytes(tmp_path) == 0
    # In a container the path may be the host's: the group itself is at the top.
    (tmp_path / "proc/self/cgroup").write_text(told.replace("job", "elsewhere"))
    group("", str(9 * 2**20), 2**20, 0)
    assert available_bytes(tmp_path) == 8 * 2**20
