"""The cards of a run's adapter and merged model: what the hub reads, what a person reads, and nothing private."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from tiny import make_model, make_tokenizer

from emloc_ray.io.runs.directory import CARD, RunDirectory
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.scoring import continuations
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.context import Context
from emloc_ray.ui.cards import GENERATING, card, write_cards

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
    assert 'from_pretrained("org/name", revision="abc")' in card("mine", "adapter", config, {})
    assert "private" not in text
    assert "On held-out rows" not in text
    assert "AutoModelForImageTextToText.from_pretrained" in text


def test_a_private_place_is_named_by_its_last_part() -> None:
    for source in ("/home/me/secret/llama", "./secret/llama", "package:secret/llama"):
        assert "secret" not in card("mine", "adapter", {"model": {"source": source}}, {})


@pytest.mark.parametrize("place", ["/home/me/private/rows", "./private/rows:train", "private/rows@part"])
def test_a_folder_that_datasets_saved_is_no_data_set_of_the_hub(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("private", "rows").mkdir(parents=True)
    text = card("mine", "adapter", {"data": {"train": {"path": [f"hf:{place}", "hf:squad"]}}}, {})
    assert ModelCard(text).data.to_dict()["datasets"] == ["squad"]
    assert "# mine" in text
    assert "Data: rows" in text
    assert "private" not in text


def test_a_relative_path_is_no_name_of_the_hub_where_it_leads_nowhere() -> None:
    config = {"model": {"source": "models/llama", "revision": "abc"}, "adapter": {"method": "ia3"}}
    text = card("mine", "adapter", config, {"base_model": "/proj/models/llama"}, "me/x")
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data
    assert data["tags"] == ["emloc", "emloc-ray", "ia3"]
    assert 'from_pretrained("llama")  # where you have it' in text
    assert "models/" not in text


def test_a_name_of_the_hub_needs_no_owner() -> None:
    config = {"model": {"source": "gpt2", "revision": "abc"}}
    text = card("mine", "adapter", config, {"base_model": "gpt2"})
    assert ModelCard(text).data.to_dict()["base_model"] == "gpt2"
    assert 'from_pretrained("gpt2", revision="abc")' in text
    local = card("mine", "adapter", config, {"base_model": "/proj/gpt2"})
    assert "base_model" not in ModelCard(local).data.to_dict()


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "lora"])
def test_a_card_says_how_virtual_tokens_make_text(method: str) -> None:
    text = card("mine", "adapter", {"model": {"source": "org/name"}, "adapter": {"method": method}}, {})
    after = text.partition('from_pretrained(original, ".")  # in this folder\n```\n')[2]
    said = after.partition("\n## How it was made")[0]
    assert said.strip() == GENERATING.get(method, "")
    assert ("use_cache=False" in said) == (method != "lora")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_soft_prompt_generates_by_its_card_as_it_was_trained(family: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(make_model(family), adapter_config("prompt_tuning", num_virtual_tokens=5)).eval()
    model.prompt_encoder.default.embedding.weight.data.normal_()
    ids = torch.tensor([[5, 9, 33, 70]])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=False
    )
    assert made[0, 4:].tolist() == continuations(model, make_tokenizer(), ids.tolist(), 6)[0]


@pytest.mark.parametrize(("method", "tag"), [("covariance", "lora"), ("none", "loha")])
def test_what_a_correction_made_lora_is_called_so(method: str, tag: str) -> None:
    """By those who serve LoRA alone."""
    choice = {"method": method, "clamp": None, "strength": 1.0}
    metrics = {"correction": {**choice, "lora_form": {"mean_rank": 4.0}}}
    text = card("mine", "adapter", {"model": {"source": "org/name"}, "adapter": {"method": "loha"}}, metrics)
    assert ModelCard(text).data.to_dict()["tags"] == ["emloc", "emloc-ray", tag]
    assert ("A LoRA adapter (trained as LoHa) for org/name" in text) == (tag == "lora")
    assert ("A LoHa adapter for org/name" in text) == (tag == "loha")


def test_a_card_is_no_part_of_what_it_is_about(run: RunDirectory) -> None:
    context = Context(Prepared(None, run, None, None, None, {}), run.root)  # type: ignore[arg-type]
    before = context.contents("adapter")
    write_cards(run)
    assert context.contents("adapter") == before
    assert run.damaged("correct") == []


def test_a_card_that_somebody_wrote_or_edited_stays(run: RunDirectory) -> None:
    write_cards(run)
    adapter, merged = (run.path(folder, CARD) for folder in ("adapter", "merged"))
    metrics = run.metrics()
    run.write_metrics({**metrics, "evaluation": {}})
    write_cards(run)
    assert "On held-out rows" not in adapter.read_text()  # as it was written last: kept up to date
    adapter.write_text("Mine.")
    merged.write_text(edited := merged.read_text().replace("How it was made", "What I made"))
    run.write_metrics(metrics)
    write_cards(run)
    assert (adapter.read_text(), merged.read_text()) == ("Mine.", edited)
