"""The few figures of quality that plans show are those that pipelines/results has."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.config.emulator import EmulatorConfig
from emloc_ray.planning.measured import FEWER_STEPS, MEASURED, Measured, closed_by, measured_for

RESULTS = Path(__file__).parents[3] / "pipelines" / "results"
DEFAULTS = {"allocation": "uniform", "objective": "activations", "storage": "factors"}


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row.method}{row.where}")
def test_a_figure_is_the_published_one(row: Measured) -> None:
    published: dict[str, Any] = json.loads((RESULTS / f"{row.file}.json").read_text())
    label = {"method": row.method, "emulator.compression_ratio": row.ratio}
    others = [json.loads((RESULTS / "equal_bytes_tasks.json").read_text())] if row.file == "equal_bytes" else []
    tasks = [
        task["gap_closed"]["mean"]
        for result in (published, *others)
        for entry in result["rows"]
        if entry["label"] == label
        for task in entry["datasets"].values()
    ]
    assert len(tasks) == (3 if others or row.refined else 1)
    assert min(1, statistics.mean(tasks)) == pytest.approx(row.gap_closed, abs=5e-4)
    [method] = [entry for entry in published["config"]["methods"] if entry["name"] == row.method]
    emulator = method.get("emulator", {})
    assert {key: emulator.get(key, default) for key, default in DEFAULTS.items()} == {**DEFAULTS, **row.made}
    assert (emulator.get("quantization", "none"), "healing" in emulator) == (row.quantization, row.healed)
    assert emulator.get("refinement") == ({"steps": 75} if row.refined else None)
    assert emulator.get("budget") == (None if row.bits is None else f"{row.bits:g} bits")


def test_fewer_steps_close_what_was_published_and_between_in_proportion() -> None:
    published: dict[str, Any] = json.loads((RESULTS / "equal_time.json").read_text())
    all_steps = published["base"]["finetune"]["max_steps"]
    closed = {row["label"]["method"]: row["all"]["gap_closed"]["mean"] for row in published["rows"]}
    steps = {
        method["name"]: method.get("finetune", {}).get("max_steps", all_steps)
        for method in published["config"]["methods"]
        if method["name"].startswith("lora")
    }
    figures = sorted((count / all_steps, closed[name]) for name, count in steps.items())
    assert FEWER_STEPS[0] == (0, 0)
    assert list(FEWER_STEPS[1:]) == [pytest.approx(figure, abs=5e-4) for figure in figures]
    assert [closed_by(share) for share in (0.05, 0.1, 0.3, 1.0)] == pytest.approx([0.3075, 0.615, 0.8615, 1.0])


def test_a_ratio_has_the_figure_of_the_next_smaller_one() -> None:
    def figure(ratio: float, **settings: Any) -> float | None:
        found = measured_for(EmulatorConfig.model_validate({"compression_ratio": ratio, **settings}))
        return None if found is None else found.gap_closed

    best = {"allocation": "sensitivity", "objective": "predictions"}
    assert (figure(1.0), figure(0.95), figure(0.5), figure(0.45), figure(0.2)) == (1.0, 0.722, 0.722, 0.529, None)
    assert (figure(0.5, **best), figure(0.5, **best, healing={"steps": 20})) == (0.887, 0.903)
    refined = {"refinement": {"steps": 100}}
    assert [figure(ratio, **best, **refined) for ratio in (0.6, 0.5, 0.3)] == [0.932, 0.932, 0.843]
    assert figure(0.5, **refined) == 0.722  # as was measured without
    assert figure(0.5, **best, refinement={"steps": 25}) == 0.887  # fewer than were measured
    assert [figure(1.0, quantization=bits) for bits in ("nf4", "int4", "int2")] == [0.961, 1.0, 0.915]
    assert figure(1.0, quantization="int8") is None

    def of_budget(budget: str, **settings: Any) -> float | None:
        found = measured_for(EmulatorConfig.model_validate({"budget": budget, **settings}))
        return None if found is None else found.gap_closed

    by_predictions = {"objective": "predictions"}
    bits = ("5 bits", "3 bits", "2.4 bits", "2 bits", "1.1 bits", "1 bits", "2GiB")
    assert [of_budget(each, **by_predictions) for each in bits] == [1.0, 0.947, 0.947, 0.703, 0.703, None, None]
    assert of_budget("2 bits", **by_predictions, healing={"steps": 20}) == 0.732
    refined = {"refinement": {"steps": 75}}
    fewer = ("2.4 bits", "2 bits", "1 bits")
    assert [of_budget(each, **by_predictions, **refined) for each in fewer] == [0.962, 0.857, None]
    assert of_budget("2 bits") == 0.703
    assert of_budget("2 bits", objective="activations") is None
    assert figure(1.0, **best, healing={"steps": 20}) == 1.0  # where nothing is healed or compressed
