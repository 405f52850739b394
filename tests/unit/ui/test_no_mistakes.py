"""What people write and have that is no mistake: it goes on, with a remark where one helps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable

import pytest
from cli_calls import ROWS, Place, lines_of, with_slow_hub
from test_mistakes import TURNS, given, of_the_hub, rows, set_key

GOES_ON: dict[str, tuple[Callable[[Place], None], list[str]]] = {
    "as it is": (
        lambda place: None,
        [
            "my.yaml is valid: 14 of 14 linears compressed, 14 adapted; 2 steps on the emulator; training reads 8 rows (about",
            "trainable parameters, peak",
            "data.train: 20 rows of format prompt_completion, about",
        ],
    ),
    "9 YAML 1.2": (set_key("finetune.save_strategy", "no"), ["is valid"]),
    "14 variable": (set_key("data.train", "${ROWS}/rows.jsonl"), ["is valid"]),
    "14 without braces": (set_key("data.train", "$ROWS/rows.jsonl"), ["is valid"]),
    "16 BOM, CRLF, names": (
        given("ä ö.jsonl", ("\ufeff" + lines_of(ROWS).replace("\n", "\r\n\r\n")).encode()),
        ["data.train: 20 rows"],
    ),
    "16 symlink": (
        lambda place: (place.root / "a.jsonl").symlink_to("rows.jsonl") or set_key("data.train", "a.jsonl")(place),
        ["data.train: 20 rows"],
    ),
    "17 capitals": (
        lambda place: [
            (place.root / "packed").mkdir(),
            place.write("packed/A.JSONL.GZ", gzip.compress(lines_of(ROWS).encode())),
            place.write("packed/B.Tsv", "prompt\tcompletion\n" + "a\tb\n" * 20),
            set_key("data.train", "packed")(place),
        ][0],
        ["data.train: 40 rows of format prompt_completion"],
    ),
    "17 array": (given("a.json", json.dumps(ROWS)), ["data.train: 20 rows"]),
    "17 array of another name": (given("a.jsonl", json.dumps(ROWS, indent=1)), ["data.train: 20 rows"]),
    "17 packed": (given("a.jsonl.gz", gzip.compress(lines_of(ROWS).encode())), ["data.train: 20 rows"]),
    "18 semicolons": (given("a.csv", "prompt;completion\n" + "a;b, c\n" * 20), ["20 rows of format prompt_completion"]),
    "21 Alpaca": (given("a.jsonl", lines_of([{"instruction": "a", "output": "b"}] * 20)), ["20 rows of format alpaca"]),
    "21 ShareGPT": (
        given(
            "a.jsonl",
            lines_of([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 20),
        ),
        ["20 rows of format sharegpt"],
    ),
    "21 TRL": (
        given("a.jsonl", lines_of([{"prompt": TURNS[:1], "completion": TURNS[1:]}] * 20)),
        ["format conversational"],
    ),
    "24 turn by turn": (given("a.jsonl", lines_of([{"messages": TURNS * 2}] * 20)), ["20 rows of format messages"]),
    "25 beyond": (set_key("data.max_seq_length", 256), ["the model was made for 128 positions"]),
    "25 cut": (
        given("a.jsonl", lines_of([{"prompt": "a", "completion": "long " * 99}, *ROWS])),
        ["of the first 21 rows 1 longer than data.max_seq_length 64"],
    ),
    "27 a sample": (
        lambda place: place.values.update(
            data={"train": {"path": "rows.jsonl", "num_samples": 4}, "max_seq_length": 64},
            finetune={"num_train_epochs": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1},
        ),
        ["; 4 steps on the emulator; training reads 1 row", "; training reads 2 and holds out 1 for eval, 1 for"],
    ),
    "27 parts": (
        lambda place: [
            place.values.update(
                data={
                    "train": {"path": "rows.jsonl", "num_samples": 15},
                    "eval": "a.jsonl",
                    "selection": {"path": "b.jsonl", "num_samples": 6},
                    "calibration": "c.jsonl",
                    "max_seq_length": 64,
                },
                evaluation={"num_samples": 7},
                calibration={"num_calibration_samples": 9, "num_calibration_tokens": 500},
            ),
            *(place.write(f"{name}.jsonl", lines_of(ROWS)) for name in "abc"),
        ][0],
        [
            "; training reads 15.",
            "; evaluation reads 7.",
            "; selection reads 6.",
            "; calibration reads 9, at most 500 tokens.",
        ],
    ),
    "27 shares": (
        lambda place: (
            place.write("b.jsonl", lines_of(ROWS * 4))
            or place.values.update(
                data={"train": {"path": {"rows.jsonl": 2, "b.jsonl": 1}}, "max_seq_length": 64},
                finetune={"num_train_epochs": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1},
            )
        ),
        ["; 24 steps on the emulator; training reads 1 row"],
    ),
    "28 a copy": (
        lambda place: place.write("b.jsonl", lines_of(ROWS)) or set_key("data.eval", "b.jsonl")(place),
        ["b.jsonl, a copy of ", "rows.jsonl, which is trained on: give it rows of its own, or leave data.eval out"],
    ),
    "29 a subset": (
        lambda place: of_the_hub(place, "@hard"),
        [
            "data.train: format alpaca, about",
            "Not checked: all but the first rows of hf:",
            ", which the run downloads.",
        ],
    ),
    "a task made on the spot": (
        set_key("data", {"generate": "docstrings", "max_seq_length": 64}),
        [
            "data.train: format prompt_completion, about ",
            "Not checked: all but the first rows of data.generate docstrings, which the run makes.",
        ],
    ),
    "27 four rows": (
        lambda place: (
            rows(place, "a.jsonl", lines_of(ROWS[:4])),
            place.values.update(finetune={"max_steps": 50, "warmup_steps": 60}),
        )[0],
        ["reads 2 rows about 200 times each", "warmup_steps is 60, and there are 50 steps"],
    ),
}


@pytest.mark.parametrize("name", with_slow_hub(GOES_ON))
def test_what_is_no_mistake_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ROWS", str(place.root))
    change, words = GOES_ON[name]
    change(place)
    result = place("validate", "my.yaml")
    assert result.exit_code == 0, (result.exception, result.output)
    for word in words:
        assert word in result.stdout


def test_paths_with_shares_and_of_a_batch_may_have_variables(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", str(place.root))
    place.write("more.jsonl", lines_of(ROWS))
    place.values["data"]["train"] = {"path": {"${ROWS}/rows.jsonl": 1, "more.jsonl": 1}}
    place.write("many.yaml", "base: ${ROWS}/my.yaml\nrun_dir: ${ROWS}/many\ngrid: {seed: [1, 2]}\n")
    assert "data.train: 40 rows" in place("validate", "my.yaml").stdout
    assert "2 tasks" in place("validate", "many.yaml").stdout
    place.write("many.yaml", "base: ${NOWHERE}/my.yaml\nrun_dir: many\ngrid: {seed: [1, 2]}\n")
    assert "the variable NOWHERE of ${NOWHERE}/my.yaml is not set" in place("validate", "many.yaml").stderr
    place.values["base"] = "${NOWHERE}/base.yaml"
    assert "the variable NOWHERE of ${NOWHERE}/base.yaml is not set" in place("validate", "my.yaml").stderr
    assert not (place.root / "many").exists()
