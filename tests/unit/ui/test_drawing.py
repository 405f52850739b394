from __future__ import annotations

import itertools
import re

import pytest

from emloc_ray.ui import drawing


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
    assert single["first"] == single["last"] == "step 5"
    assert "nan" not in single["svg"]


def test_a_spectrum_falls_from_the_left_and_marks_the_rank() -> None:
    drawn = drawing.spectrum([(1, 1.0), (10, 1e-4), (100, 0.0)], 10)
    assert 'class="line" d="M0.0 0.0L50.0 50.0L100.0 100.0"' in drawn
    assert 'class="mark" d="M50.0 0V100"' in drawn


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, float("nan")), (2, float("inf"))], [(1, 2.0), (2, -1.0)]])
def test_odd_spectra_are_drawn_inside(points: list[tuple[int, float]]) -> None:
    drawn = drawing.spectrum(points, 500)
    numbers = [float(n) for route in re.findall(r' d="([^"]*)"', drawn) for n in re.findall(r"-?[\d.]+|nan|inf", route)]
    assert all(0 <= number <= 100 for number in numbers)


def test_a_bar_has_its_marks_where_they_belong() -> None:
    drawn = drawing.bar(1, 4, 2, goal=3)
    assert 'width="25.00"' in drawn
    assert 'class="mark" d="M50.00' in drawn
    assert 'class="goal" d="M75.00' in drawn
    assert "path" not in drawing.bar(1, 4)
