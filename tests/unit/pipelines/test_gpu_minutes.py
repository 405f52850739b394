"""The benchmark of a GPU is planned to end within its ten minutes, whatever it leaves for last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.gpu import training
from benchmarks.gpu.command import PARTS
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES


class Planned(Session):
    """Notes what each case needs, and measures none."""

    def __init__(self, out: Path) -> None:
        super().__init__("cpu", SHAPES["full"], out, minutes=10)
        self.is_cuda = True
        self.needs: dict[str, float] = {}

    def measure(self, part: str, case: str, needs_s: float, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.needs[part] = self.needs.get(part, 0.0) + needs_s
        self.measured.setdefault(part, {})[case] = {}
        return {"passed": True}


def test_all_cases_need_ten_minutes_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * training.GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    monkeypatch.setattr(training, "planned_bytes", lambda config, ranks, rows, *_: rows * training.GIB)
    session = Planned(tmp_path)
    for part in PARTS:
        part(session)
    assert list(session.needs) == ["training", "ranks", "blocks", "24 GiB", "factorization", "correction", "rounding"]
    assert 500 < sum(session.needs.values()) <= 600, session.needs
