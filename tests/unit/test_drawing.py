from __future__ import annotations

import itertools

import pytest

from emloc_ray import drawing


@pytest.mark.parametrize(("low", "high"), [(3.97, 6.17), (0.0, 0.0), (5.0, 5.0), (1e-7, 3e-7), (99.0, 101.0), (0, 9e9)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = drawing.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 7
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_one_point_and_none_make_a_curve_or_none() -> None:
    assert drawing.curve([]) is None
    single = drawing.curve([(5.0, 2.5)])
    assert single is not None
    assert single["first"] == single["last"] == "5"
    assert "nan" not in single["svg"]
