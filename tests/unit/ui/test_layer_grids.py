from __future__ import annotations

from typing import Any

import pytest
import torch
from run_samples import STAGES, events, finished_metrics, manifest

from emloc_ray.stages.factorize.layer_reports import sampled
from emloc_ray.ui import layer_grids
from emloc_ray.ui import page as report

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in (0, 1, 10, 2) for kind in LINEARS]


def test_grids_order_blocks_by_number_and_shorten_kinds() -> None:
    (grid,) = layer_grids.grids(NAMES)
    assert (grid.prefix, grid.kinds) == ("model.layers", ["q_proj", "k_proj", "up_proj"])
    assert [block for block, _ in grid.rows] == [0, 1, 2, 10]
    assert grid.rows[3][1][2] == "model.layers.10.mlp.up_proj"


def test_grids_of_other_models() -> None:
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "shared_projection",
    ]
    encoder, decoder, rest = layer_grids.grids(names)
    assert (encoder.prefix, encoder.kinds) == ("encoder.block", ["q"])
    assert decoder.kinds == ["SelfAttention.q", "EncDecAttention.q"]
    assert decoder.rows[1] == (1, [names[3], None])
    assert rest == layer_grids.Grid("", ["shared_projection"], [(None, ["shared_projection"])])


def layer(error: float, rank: int = 8) -> dict[str, Any]:
    return {"rank": rank, "relative_error": error, "solver": "exact", "share": 0.5}


def test_a_linear_in_bits_shows_these_and_no_rank() -> None:
    whole = {**layer(0.2, 576), "solver": "dense", "form": "2 bits and factors"}
    cells = layer_grids.heat_cells({"a": whole, "b": layer(0.3, 116)}, {})
    assert [cells[name].rank for name in "ab"] == ["2 bits", "116"]
    assert cells["a"].title == "a: relative error 0.2, 2 bits and factors, 50.0% of its parameters"
    metrics = finished_metrics()
    metrics["emulator"]["layers"][NAMES[0]]["form"] = "2 bits"
    page = report.render("run", manifest(*STAGES), metrics)
    assert "the relative error on the calibration data, and the rank or bits. Mean" in page


def test_experts_in_their_thousands_are_one_cell_a_block() -> None:
    layers = {
        f"model.layers.{block}.mlp.experts.{expert}.{kind}": layer(expert / 128, 8 + block)
        for block in range(48)
        for expert in range(128)
        for kind in ("gate_up", "down")
    }
    layers["model.layers.0.self_attn.q_proj"] = layer(0.5)
    cells = layer_grids.heat_cells(layers, {name: [(1, 0.5)] for name in layers})
    assert len(cells) == 48 * 2 + 1
    first = cells["model.layers.0.mlp.experts.*.down"]
    assert first.error == pytest.approx(63.5 / 128)
    assert first.rank == "8"
    assert "128 layers, relative errors of 0 to 0.992, 50.0% of its parameters" in first.title
    assert all(cell.spectrum is None for cell in cells.values())
    modules = {name: {"before": 3.0, "after": 1.0} for name in layers}
    shown = layer_grids.shortfall_cells(modules)["model.layers.3.mlp.experts.*.gate_up"]
    assert shown["before"] == pytest.approx(3 * 128**0.5)
    html = report.render("run", manifest(*STAGES[:3]), {"emulator": emulator(layers)})
    assert "experts of a block share a cell" in html
    assert len(html) < 200_000


def emulator(layers: dict[str, Any]) -> dict[str, Any]:
    return {**finished_metrics()["emulator"], "layers": layers}


def test_spectra_of_a_large_model_are_a_page_below_two_megabytes() -> None:
    """80 blocks of 7 linears, 8,192 directions each; timed for the absurd alone."""
    kinds = [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
    layers = {f"model.layers.{block}.{kind}": layer(0.1, 2048) for block in range(80) for kind in kinds}
    points = sampled(torch.arange(1, 8193, dtype=torch.float64) ** -1.5, 2.6)
    assert len(points) <= 48
    assert points[0] == (1, 0.385)
    assert points[-1][0] == 8192
    metrics = {**finished_metrics(), "emulator": emulator(layers)}
    metrics["correction"]["modules"] = {name: {"before": 2.0, "after": 1.5} for name in layers}
    html = report.render("run", manifest(*STAGES), metrics, events(), dict.fromkeys(layers, points))
    assert html.count("popovertarget=") == 560
    assert len(html.encode()) < 2_000_000


def test_layers_without_spectra_are_cells_all_the_same() -> None:
    cells = layer_grids.heat_cells({"a.0.q": {"rank": 3, "relative_error": 0.25}}, {"b": [(1, 1.0)]})
    assert (cells["a.0.q"].rank, cells["a.0.q"].kept, cells["a.0.q"].spectrum) == ("3", None, None)


@pytest.mark.parametrize(("values", "energy"), [([], 1.0), ([0.0, 0.0], 0.0)])
def test_a_spectrum_of_nothing_has_no_samples(values: list[float], energy: float) -> None:
    assert sampled(torch.tensor(values), energy) == ()


def test_a_short_spectrum_is_sampled_whole() -> None:
    assert sampled(torch.tensor([4.0, 1.0, 0.0]), 5.0) == ((1, 0.8), (2, 0.2), (3, 0.0))


def test_shares_of_parameters_are_shown_where_they_differ() -> None:
    layers = {"a.0.q": layer(0.1), "a.1.q": layer(0.1)}
    assert [cell.kept for cell in layer_grids.heat_cells(layers, {}).values()] == [None, None]
    layers["a.1.q"]["share"] = 0.25
    assert [cell.kept for cell in layer_grids.heat_cells(layers, {}).values()] == [0.5, 0.25]
