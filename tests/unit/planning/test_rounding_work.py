"""Rounding to integers is planned by its work, which is most of making such an emulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_values

from emloc_ray.config.reading import parse_config
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.prepared import prepare
from emloc_ray.planning.training import factorize_work

WHOLE = {"compression_ratio": 1.0, "quantization": "int4"}


@pytest.fixture
def planned(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> Callable[[dict[str, Any]], tuple[float, Layout]]:
    """The work of factorizing with these keys of the emulator, and the layout."""

    def work(emulator: dict[str, Any]) -> tuple[float, Layout]:
        values = make_values(tmp_path / "run", tiny_model_dir("llama"), task_file)
        prepared = prepare(parse_config({**values, "emulator": {"num_workers": 1, **emulator}}))
        return factorize_work(prepared), prepared.layout

    return work


def test_a_weight_takes_nine_products_with_its_gram(planned: Callable[..., tuple[float, Layout]]) -> None:
    work, layout = planned(WHOLE)
    assert work == 9 * sum(spec.out_features * spec.in_features**2 for spec in layout.specs)
    assert planned({"budget": "4 bits"})[0] >= work  # any weight may be integers


def test_factors_are_rounded_too(planned: Callable[..., tuple[float, Layout]]) -> None:
    whole, layout = planned(WHOLE)
    beside, _ = planned({**WHOLE, "residual_rank": 2})
    of_factors = sum(9 * 2 * (spec.in_features**2 + 2 * spec.out_features) for spec in layout.specs)
    assert beside == whole + of_factors
    floats, _ = planned({"compression_ratio": 0.5})
    assert planned({"compression_ratio": 0.5, "quantization": "int4"})[0] > floats
    assert planned({"compression_ratio": 1.0, "quantization": "nf4"})[0] == 0
