"""The times on paper are those that the page shows, and follow from what is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu.shapes import SHAPES
from benchmarks.on_paper import MACHINES, Model, Work, calibrate, factorize, finetune, table

ROOT = Path(__file__).parents[3]


def test_the_page_has_the_table() -> None:
    assert table() in (ROOT / "cluster" / "README.md").read_text()


def test_a_model_is_counted_whole() -> None:
    model = Model.of("8 B", SHAPES["full"].model)
    assert model.weights / 2 == pytest.approx(8.03e9, rel=0.01)  # norms left out
    assert model.kept / model.dense == pytest.approx(0.5, rel=0.05)
    assert [len(group) for group in model.groups] == [3, 1, 2, 1]
    assert calibrate(model, MACHINES[0]).passes > 2 * 128 * 512 * model.dense
    # Two passes forward and one back, all frozen, of 4.1 million tokens.
    assert finetune(model, MACHINES[0]).passes == pytest.approx(6 * 4.096e6 * model.kept, rel=0.05)
    cpu, gpu = (factorize(model, machine) for machine in MACHINES)
    assert cpu.wide == cpu.eigen == 0 < gpu.wide
    assert gpu.seconds(MACHINES[1], model.weights) < 60


def test_the_slower_of_computing_and_moving_counts() -> None:
    _, gpu = MACHINES
    assert Work(passes=gpu.passes * 3, disk=gpu.disk).seconds(gpu, 1e9) == pytest.approx(3)
    assert Work(passes=gpu.passes, rounds=5).seconds(gpu, gpu.transfer) == pytest.approx(1)
    assert Work(passes=gpu.passes, rounds=5).seconds(gpu, 2 * gpu.transfer) == pytest.approx(10)
