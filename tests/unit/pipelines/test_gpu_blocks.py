"""What the benchmark of a GPU measures of a block waits for no more than the product does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
