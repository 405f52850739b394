"""The cards of a run's adapter and merged model: what the hub reads, what a person reads, and nothing private."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from emloc_ray.io.runs.directory import CARD, RunDirectory
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.context import Context
from emloc_ray.ui.cards import card, write_cards

RELEASED = Path(__file__).parents[2] / "compat" / "0.1.0" / "run"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A finished run."""
    return RunDirectory(shutil.copytree(RELEASED, tmp_path / "run"))


def test_a_card_says_base_data_method_figures_and_how_to_load(run: RunDirectory) -> None:
    write_cards(run)
    adapter, merged = (ModelCard.load(run.path(folder, CARD)) for folder in ("adapter", "merged"))
    assert (adapter.data.library_name, merged.data.library_name) == ("peft", "transformers")
    assert adapter.data.base_model is None  # a local folder is no name on the hub
    for said in (
        "Base: model",
        "Data: rows.jsonl",
        "r 2, lora_alpha 8",
        "8 steps, learning rate 0.05",
        "Correction: projection",
    ):
        assert said in adapter.text
        assert said in merged.text
    assert 'PeftModel.from_pretrained(original, ".")  # in this folder' in adapter.text
    assert 'from_pretrained("model")  # where you have it' in adapter.text
    loss = run.metrics()["evaluation"]["merged"]["loss"]
    assert f"{loss:.4f}" in merged.text
    assert not run.path("emulator", CARD).exists()


def test_a_base_and_data_of_the_hub_are_its_metadata() -> None:
    config = {
        "model": {"source": "org/name", "revision": "abc"},
        "data": {"train": {"path": ["hf:org/rows@part:train", "/home/me/private/a.jsonl"]}},
    }
    text = card("mine", "merged", config, {"auto_class": "AutoModelForImageTextToText"})
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["datasets"]) == ("org/name", ["org/rows"])
    assert data["base_model_relation"] == "finetune"
    assert "org/name, revision abc" in text
    assert "private" not in text
    assert "On held-out rows" not in text
    assert "AutoModelForImageTextToText.from_pretrained" in text


def test_a_private_place_is_named_by_its_last_part() -> None:
    for source in ("/home/me/secret/llama", "./secret/llama", "package:secret/llama"):
        assert "secret" not in card("mine", "adapter", {"model": {"source": source}}, {})


def test_a_card_is_no_part_of_what_it_is_about(run: RunDirectory) -> None:
    context = Context(Prepared(None, run, None, None, None, {}), run.root)  # type: ignore[arg-type]
    before = context.contents("adapter")
    write_cards(run)
    assert context.contents("adapter") == before
    assert run.damaged("correct") == []
