"""What rows tell of corrections, and what choices on some of them gain."""

import math

import numpy as np
import pytest
import torch
from benchmarks.selection import DRAWS, ROWS, Losses, drawn, told

from emloc_ray.stages.correct.search import AUTO


def losses(rows: int = 40) -> Losses:
    """Rows of 2 and 3 labels; each correction gains or loses its own share of a nat, and a row's own part of it."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([2.0, 3.0] * (rows // 2))
    labels = torch.randn(rows, len(AUTO), generator=generator, dtype=torch.float64) + 5
    return Losses(labels, labels * 2 + 1, counts, gap=0.5)


def test_gains_are_in_points_of_the_gap_with_the_error_of_64_rows() -> None:
    given = losses()
    result = told(given)
    counts, labels = given.counts.numpy(), given.labels.numpy()
    for number, correction in enumerate(result["corrections"], 1):
        gains = labels[:, 0] - labels[:, number]
        mean = gains.sum() / counts.sum()
        assert correction["labels"]["gain"] == pytest.approx(100 * mean / 0.5)
        # The error of a ratio of sums, from what is left of each row beside its mean.
        left = gains - mean * counts
        error = 100 / 0.5 * math.sqrt(len(gains)) * np.std(left, ddof=1) / counts.sum()
        assert correction["labels"]["error_at_64"] == pytest.approx(error * math.sqrt(len(gains) / 64), rel=1e-2)
        at_needed = error * math.sqrt(len(gains) / correction["labels"]["rows_needed"])
        assert at_needed == pytest.approx(0.15, rel=1e-2)
        assert correction["correlation"] == pytest.approx(1.0)  # predictions move as labels do
        assert correction["predicted"]["gain"] == pytest.approx(2 * correction["labels"]["gain"])
    assert [c["method"] for c in result["corrections"]] == [candidate.method for candidate in AUTO[1:]]


def test_a_choice_on_all_rows_is_the_best_one_and_on_few_one_of_those_that_chance_makes_best() -> None:
    kind = losses(6).labels
    gains = (kind[:, :1] - kind).sum(0)
    result = drawn(kind, gains)
    assert list(result) == ["3", "6"]  # no more than there are
    assert result["6"] == {
        "best": 1.0,
        "gained": pytest.approx(float(gains.max())),
        "worse": 0.0,
    }
    # Each of the 20 draws of three rows, counted one by one.
    of_three = [gains[kind[rows].sum(0).argmin()] for rows in torch.combinations(torch.arange(6), 3)]
    mean, worse = (float(torch.stack(values).double().mean()) for values in (of_three, [g < 0 for g in of_three]))
    assert result["3"]["gained"] == pytest.approx(mean, abs=4 * float(torch.stack(of_three).std()) / math.sqrt(DRAWS))
    assert result["3"]["worse"] == pytest.approx(worse, abs=2 / math.sqrt(DRAWS))
    assert max(ROWS) == 128
