"""The picture of the frontier."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import frontier
import pytest
from ablations.cells import read_ablation
from frontier import KINDS, MODELS, draw, points

ROOT = Path(__file__).parents[3]


def record(method: str, bits: float, closed: float) -> dict[str, Any]:
    return {"method": method, "bits_per_weight": bits, "gap_closed": closed}


def test_a_point_is_the_mean_over_seeds_fewest_bits_first() -> None:
    records = [record("int3", 3.0, 0.8), record("int2", 2.2, 0.5), record("int2", 2.4, 0.7), record("lora", 16, 1.0)]
    lines = points(records)
    assert lines["2, 3, 4 and 8 bits (GPTQ)"] == [pytest.approx((2.3, 60)), pytest.approx((3.0, 80))]
    assert list(lines) == ["2, 3, 4 and 8 bits (GPTQ)", "LoRA on the original"]


def test_a_method_of_no_kind_is_named() -> None:
    with pytest.raises(ValueError, match="brand_new: no kind"):
        points([record("brand_new", 1, 0)])


def test_every_method_of_the_grids_has_a_kind() -> None:
    files = [ROOT / "configs" / "ablations" / f"{name}.yaml" for name in MODELS["SmolLM2 135M"]]
    methods = {method.name for file in files for method in read_ablation(file).config.methods}
    assert methods == {name for names, _ in KINDS.values() for name in names}


def test_the_picture_is_of_the_published_results() -> None:
    """Where it is not: python pipelines/frontier.py."""
    assert frontier.figures(frontier.published()) in frontier.PICTURE.read_text()


def test_a_cell_that_two_results_have_counts_once() -> None:
    of_seeds = Counter(cell["method"] for cell in frontier.records(MODELS["SmolLM2 135M"]))
    assert (of_seeds["int2"], of_seeds["quarter"]) == (5, 1)


@pytest.mark.slow
def test_the_picture_names_its_kinds_and_is_the_same_again(tmp_path: Path) -> None:
    lines = points([record("int2", 2.2, 0.5), record("lora", 16, 1.0)])
    for name in ("one.svg", "two.svg"):
        draw({"small": lines, "large": lines}, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert {f"<!-- {name} -->" in text for name in ("LoRA on the original", "small", "large")} == {True}
    assert (tmp_path / "two.svg").read_text() == text
