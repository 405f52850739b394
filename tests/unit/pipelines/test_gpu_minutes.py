"""The benchmark of a GPU is planned to end within its ten minutes, whatever it leaves for last, and a part that raises ends no
other."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from benchmarks.gpu import command, plan, session, training
from benchmarks.gpu.command import PARTS, gpu
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES


@pytest.fixture(autouse=True)
def allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


class Planned(Session):
    """Notes what each case needs, and measures none."""

    def __init__(self, out: Path) -> None:
        super().__init__("cuda", SHAPES["full"], out, minutes=10)
        self.cases: dict[str, dict[str, float]] = {}

    def measure(self, part: str, case: str, needs_s: float, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.cases.setdefault(part, {})[case] = needs_s
        self.measured.setdefault(part, {})[case] = {}
        return {"passed": True}


def test_all_cases_need_ten_minutes_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limited: list[tuple[float, int | None]] = []  # torch refuses a device without a number there

    monkeypatch.setattr(session, "machine", lambda _: {})
    total = 80 * training.GIB  # of which 3 GiB are taken: 2 by torch, 1 by the context
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - 3 * training.GIB, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * training.GIB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limited.append((share, device.index))
    )
    skeletons: list[Any] = []
    make = plan.skeleton_of
    monkeypatch.setattr(plan, "skeleton_of", lambda *model: skeletons.append(make(*model)) or skeletons[-1])
    planned = Planned(tmp_path)
    for part in PARTS:
        part(planned)
    assert " ".join(planned.cases) == "training ranks blocks 24 GiB speeds factorization correction rounding"
    assert 500 < sum(sum(cases.values()) for cases in planned.cases.values()) <= 600, planned.cases
    assert limited == [(23 / 80, 0), (1.0, 0)]
    assert planned.cases["24 GiB"] == {
        "11 rows, within the plan": 21,
        "16 rows, beyond the plan": 26,
        "22 rows, beyond the plan": 32,
    }
    assert len(skeletons) <= 1  # each takes seconds in which the card waits


def test_a_part_that_raises_says_so_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: Session) -> None:
        raise ValueError("No such device. More")

    def whole(session: Session) -> None:
        session.measure("whole", "case", 0, lambda: {"s": 1.0})

    monkeypatch.setattr(command, "PARTS", (broken, whole))
    gpu(tmp_path, device="cpu", shapes="tiny")
    measured = json.loads((tmp_path / "gpu.json").read_text())["measured"]
    assert measured["broken"]["beside its cases"] == {"failed": "ValueError: No such device."}
    assert measured["whole"]["case"]["s"] == 1.0


def test_a_run_that_is_broken_off_has_the_table_of_the_parts_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(session: Session) -> None:
        session.compare("first", "case", 1.0, 2.0, "s (baseline: another)")

    def broken_off(session: Session) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "PARTS", (first, broken_off))
    options = ["gpu", "--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    assert json.loads((tmp_path / "benchmark.json").read_text())["first: case"]["ratio"] == 2.0
    assert "| first: case | 2.00 |" in (tmp_path / "benchmark.md").read_text()


def test_peaks_are_of_the_allocator_that_workers_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(session: Session) -> None:
        session.measure("part", "case", 0, dict)

    monkeypatch.setattr(command, "PARTS", (part,))
    gpu(tmp_path, device="cpu", shapes="tiny")
    assert json.loads((tmp_path / "gpu.json").read_text())["machine"]["allocator"] == "expandable_segments:True"
