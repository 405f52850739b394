"""What the benchmark of a GPU measures of a block waits for no more than the product does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu.blocks import blocks
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES


def test_passes_that_gather_sums_ask_the_device_for_no_value(tmp_path: Path) -> None:
    """The meta device has none: to ask raises. Of one label, for which the head is not tried first."""
    session = Session("meta", replace(SHAPES["tiny"], rows=1, length=2, repeats=1), tmp_path, minutes=1)
    blocks(session)
    for case in session.measured["blocks"].values():
        assert case["with_grams_s"] > 0, case
        assert case["with_gradient_sums_s"] > 0, case


def test_each_pass_s_peak_is_read_before_it_is_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("meta", replace(SHAPES["tiny"], rows=1, length=2, repeats=1), tmp_path, minutes=1)
    passes, peak = 0, 0

    def timed(action: Any) -> float:
        nonlocal passes, peak
        passes += 1
        peak = max(peak, passes)
        return 1.0

    def give_back() -> None:
        nonlocal peak
        peak = 0

    monkeypatch.setattr(session, "timed", timed)
    monkeypatch.setattr(session, "give_back", give_back)
    monkeypatch.setattr(session, "peaks", lambda: {"reserved_bytes": peak})
    blocks(session)
    measured = [
        {key: value for key, value in case.items() if key.endswith("reserved_bytes")}
        for case in session.measured["blocks"].values()
    ]
    names = ("with_grams", "backward", "with_gradient_sums")
    assert measured == [
        {f"{name}_reserved_bytes": number for number, name in enumerate(names, first)} for first in (2, 6)
    ]
