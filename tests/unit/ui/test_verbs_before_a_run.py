"""Verbs that come before a run: validate, preview, keys, schema, init."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
from cli_calls import Place, lines_of
from gguf_files import write_gguf
from typer.testing import CliRunner

from emloc_ray.config.peers import PEERS
from emloc_ray.config.reading import load_config, parse_config, unknown_key
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import read_yaml
from emloc_ray.runs.remarks import default_emulator
from emloc_ray.ui.cli import app


def test_the_first_line_of_validate_says_the_most(place: Place) -> None:
    first = place("validate", "my.yaml").stdout.splitlines()[0]
    assert first.startswith("my.yaml is valid: ")


def test_a_batch_is_validated_as_one(place: Place) -> None:
    place.write("many.yaml", "base: my.yaml\nrun_dir: runs/many\ngrid: {seed: [1, 2]}\n")
    result = place("validate", "many.yaml")
    assert result.exit_code == 0, result.output
    assert "2 tasks" in result.stdout
    assert "The batch is valid" in result.stdout


def test_rows_are_tokens_of_a_gguf_files_own_tokenizer(place: Place) -> None:
    write_gguf(place.root / "model.gguf")
    place.values["model"] = "model.gguf"
    shown = place("preview", "my.yaml")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "row 1 (prompt_completion): " in shown.stdout
    lines = place("validate", "my.yaml").stdout
    assert "data.train: 20 rows of format prompt_completion, about " in lines
    assert "Not checked: the weights in model.gguf, which the run converts." in lines


def test_preview_marks_what_is_learnt(place: Place) -> None:
    result = place("preview", "my.yaml", "--rows", "2")
    assert result.exit_code == 0, result.output
    assert "rows.jsonl, row 1 (prompt_completion): " in result.stdout
    prompt, completion = result.stdout.split("⟦so⟧")[1].replace("·", "").split("⟧")[0].split("⟦")
    assert (prompt.strip(), completion) == ("add 0:", "it is 0<eos>")
    assert "row 2" in result.stdout


def test_preview_shows_what_is_kept_of_a_row_and_whole_characters(place: Place) -> None:
    place.write("rows.jsonl", lines_of([{"prompt": "ü", "completion": "你好" + "a" * 99}] * 20))
    cut = place("preview", "my.yaml", "data.max_seq_length=20").stdout
    assert "cut to 20, 18 learnt ⟦so⟧\nü⟦你·好·a" in cut
    whole = place("preview", "my.yaml", "data.max_seq_length=20", "finetune.loss_on=all").stdout
    assert "cut to 20, 20 learnt ⟦so⟧\n⟦ü·你·好·a" in whole


def test_no_default_or_value_of_a_key_is_broken() -> None:
    shown = CliRunner().invoke(app, ["keys", "emulator"], env={"COLUMNS": "80"}).stdout
    assert "objective                activations  activations |" in shown


def test_keys_shows_one_key(place: Place) -> None:
    assert "peak of the schedule" in place("keys", "finetune.learning_rate").stdout
    assert "TrainingArguments" in place("keys", "finetune.weight_decay").stdout
    assert "TrainingArguments" in place("keys", "weight_decay").stdout
    assert "peak of the schedule" in place("keys", "learning_rate").stdout  # of finetune and of healing
    assert "the nearest key is learning_rate" in place("keys", "learnin_rate").stderr


def test_keys_shows_the_values_that_are_taken(place: Place) -> None:
    assert "auto" not in place("keys", "merge.gpus_per_worker").stdout
    parse_config({**place.values, "merge": {"gpus_per_worker": 0.0}})


def test_version_and_schema(place: Place) -> None:
    assert place("--version").stdout == f"emloc-ray {version('emloc-ray')}\n"
    schema = json.loads(place("schema").stdout)
    jsonschema.validate(place.values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**place.values, "sead": 1}, schema)
    decided = dict.fromkeys(("compression_ratio", "quantization"))
    assert '"required"' not in place("schema").stdout  # a base may hold any key
    for emulator in ({"budget": "2.4 bits", **decided}, {"healing": False}, {"refinement": False}, {"healing": None}):
        jsonschema.validate({**place.values, "emulator": emulator}, schema)
        parse_config({**place.values, "emulator": emulator})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**place.values, "emulator": {"healing": True}}, schema)


def test_shipped_configs_name_their_schema_and_follow_it(place: Place) -> None:
    configs = Path(__file__).parents[3] / "configs"
    written = json.loads(place("schema").stdout)
    named = [path for path in configs.rglob("*.yaml") if "yaml-language-server" in path.read_text()]
    assert len(named) >= 6
    for path in named:
        first = path.read_text().splitlines()[0]
        assert (
            path.parent / first.removeprefix("# yaml-language-server: $schema=")
        ).resolve() == configs / "schema.json"
        jsonschema.validate(read_yaml(path.read_text()), written)
    assert "--install-completion" in place("--help").stdout


def test_init_writes_a_config_that_is_valid(place: Place) -> None:
    arguments = [
        "--model",
        place.values["model"],
        "--data",
        "rows.jsonl",
        "--memory-budget",
        "4GiB",
        "--output",
        "new.yaml",
    ]
    result = place("init", *arguments)
    assert result.exit_code == 0, result.output
    text = Path("new.yaml").read_text()
    config = parse_config(read_yaml(text))
    assert config.memory_budget == 4 * 2**30
    assert "# what one worker may hold" in text
    again = place("init", *arguments)
    assert again.exit_code == 2
    assert "new.yaml is there already" in again.stderr


def test_init_without_a_budget_goes_by_what_inference_takes(place: Place) -> None:
    call = ["init", "--model", place.values["model"], "--data", "rows.jsonl", "--output", "new.yaml"]
    said = place(*call).stdout
    assert "checks it. Within 4" in said
    assert "That is what inference of the original takes: --memory-budget SIZE chooses by another." in said
    config = load_config("new.yaml")
    assert config.budget_is_default
    # The original fits, with gradient checkpointing. Batches are of few tokens: unpacking four bits would take a CPU longer.
    assert "train on the original, " in said
    assert config.finetune.gradient_checkpointing
    assert (config.emulator.compression_ratio, config.emulator.quantization) == (1, "none")
    assert config.data.max_seq_length == 128  # the model's positions


def test_init_where_nothing_trains_in_what_inference_takes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise ConfigError("Nothing can be trained within 1 MiB.")

    monkeypatch.setattr("emloc_ray.planning.plan.within_budget", refuse)
    call = ["init", "--model", place.values["model"], "--data", "rows.jsonl", "--output", "new.yaml"]
    assert "so it has half of the ranks: --memory-budget SIZE chooses" in place(*call).stdout
    assert load_config("new.yaml").emulator.compression_ratio == 0.5


def test_an_emulator_of_the_defaults_is_told_once(place: Place) -> None:
    remark = "emulator is at its defaults, the paper's half of the ranks, which closed 72 % of the gap"
    assert remark in place("validate", "my.yaml").stdout
    assert remark not in place("validate", "my.yaml", "emulator.compression_ratio=1").stdout
    read = [load_config("my.yaml"), load_config("my.yaml", ["emulator.num_workers=2"])]
    assert str(default_emulator(read)).startswith(remark)


def test_no_key_of_a_peer_leads_to_one_that_is_refused() -> None:
    for name, ours in PEERS.items():
        assert unknown_key(ours) is None, name
    with pytest.raises(ConfigError, match=r"write finetune\.optim"):
        parse_config({"run_dir": "r", "model": "m", "data": {"train": "x"}, "optimizer": "adamw"})


@pytest.mark.parametrize("verb", ["run", "batch", "status", "push", "chat"])
def test_help_names_no_type_beside_a_switch(place: Place, verb: str) -> None:
    lines = [line for line in place(verb, "--help").stdout.splitlines() if "--help" not in line]
    assert any("--" in line for line in lines)
    assert not [line for line in lines if "bool" in line.lower()]
