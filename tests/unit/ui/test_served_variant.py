"""What a run serves, where that is neither merged nor the adapter as corrected, is what its page, lines and cards show."""

from __future__ import annotations

from typing import Any

from pages import Page
from run_samples import STAGES, finished_metrics, healing_metrics, manifest, measures

from emloc_ray.config.steps import served_variant
from emloc_ray.ui import page as report
from emloc_ray.ui.cards import card
from emloc_ray.ui.terminal import result_lines


def finished_on_the_original() -> dict[str, Any]:
    """The metrics of a run that scored its adapter after steps on the original, and no merged model."""
    metrics = finished_metrics()
    del metrics["evaluation"]["merged"]
    metrics["evaluation"]["finished"] = measures(4.1234)
    metrics["exact_match"]["finished"] = metrics["exact_match"].pop("merged")
    for sample in metrics["generations"]:
        sample["finished"] = sample.pop("merged")
    return metrics


def test_a_finished_adapter_is_the_result_where_no_merged_model_was_scored() -> None:
    metrics = finished_on_the_original()
    page = Page(report.render("run", manifest(*STAGES, "finish"), metrics))
    assert "Held-out loss 4.5000 → 4.1234 nats a token" in page.text
    assert "3.1% before, 45.7% after" in page.text
    assert "with the adapter" in page.text
    assert "Exact match: 3.1% before, 45.7% after" in "\n".join(result_lines(metrics, "runs/x"))
    assert "3.1% before, 45.7% after" in card("run", "adapter_finished", manifest()["config"], metrics)


def test_prefixes_that_were_finished_are_served_from_their_own_folder() -> None:
    metrics, made = {**finished_on_the_original(), "finishing": healing_metrics()}, manifest(*STAGES, "finish")
    made["config"]["adapter"] = {"method": "prefix_tuning"}
    assert "serve the original with adapter_finished/." in Page(report.render("run", made, metrics)).text


def test_the_result_is_the_last_that_was_made_of_the_adapter() -> None:
    assert served_variant(finished_metrics()["evaluation"]) == "merged"
    assert served_variant(("original", "finished", "corrected")) == "finished"
    assert served_variant(("original", "corrected")) == "corrected"
