"""report.html: self-contained, well-formed, escaped, and right for runs that are finished, half-way or empty."""

from __future__ import annotations

import copy
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import LOADING, Page
from rich.console import Console

from emloc_ray import report
from emloc_ray.console import ConsoleReporter, evaluation_table, result_lines
from emloc_ray.io.run_directory import RunDirectory

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in (0, 1, 10, 2) for kind in LINEARS]
STAGES = ("data", "calibrate", "factorize", "finetune", "correct", "merge", "evaluate")
EVIL = '</pre><script>alert("1")</script> if a[k] < b & c:\x00\x1b\r\n\ud800'


def manifest(*stages: str) -> dict[str, Any]:
    config = {
        "model": {"source": "org/model-1b"},
        "data": {"generate": None, "train": {"path": "/data/tickets.jsonl"}},
        "emulator": {"compression_ratio": 0.25},
        "finetune": {"hub_token": "hf_hush", "max_steps": 3},
        "ray": {"runtime_env": {"env_vars": {"WANDB_KEY": "hush"}}},
    }
    done = {stage: {"finished_at": 1.8e9 + number, "result": {}} for number, stage in enumerate(stages)}
    return {"format": 2, "name": "run", "config": config, "stages": done}


def usage(number: int) -> dict[str, Any]:
    return {
        "wall_s": 10.5 + number,
        "peak_pss_bytes": (number + 1) * 2**30,
        "peak_rss_bytes": 300 * 2**20,
        "processes": {"driver": 290 * 2**20, f"Actor{number}": 5 * 2**20},
        "num_workers": 2,
    }


def measures(loss: float) -> dict[str, float | int]:
    return {"loss": loss, "token_accuracy": 0.512, "num_tokens": 12345}


def finished_metrics() -> dict[str, Any]:
    losses = {"original": 4.5, "emulator": 6.75, "emulator_adapter": 4.4, "uncorrected": 4.3, "corrected": 4.21}
    candidates = [
        {"method": "none", "clamp": 3.0, "strength": 1.0, "loss": 4.34567},
        {"method": "projection", "clamp": None, "strength": 1.0, "loss": 4.35},
        {"method": "covariance", "clamp": 3.0, "strength": 0.5, "loss": 4.32109},
    ]
    counts = {"rows": 360, "tokens": 6212, "truncated_rows": 7, "truncated_tokens": 91, "dropped_rows": 4}
    layers = {
        name: {"rank": 21 + number, "relative_error": number / 50, "solver": "exact"}
        for number, name in enumerate(NAMES)
    }
    return {
        "versions": {"python": "3.12.1", "ray": "2.60.0"},
        "stages": {stage: usage(number) for number, stage in enumerate(STAGES)},
        "disk_bytes": {"data": 1536, "merged": 3 * 2**30},
        "data": {"train": counts, "eval": {**counts, "rows": 61}},
        "calibration": {"num_tokens": 2220, "num_shards": 8},
        "emulator": {
            "compression_ratio": 0.25,
            "parameters_kept": 0.2487,
            "parameters": 600_123,
            "original_parameters": 1_000_000,
            "mean_relative_error": 0.1636,
            "layers": layers,
        },
        "finetune": {
            "steps": 20,
            "train_loss": 5.1667,
            "history": [{"step": 10, "loss": 5.39}, {"step": 20, "loss": 5.05}, {"step": 20, "train_runtime": 3}],
        },
        "correction": {
            **{key: candidates[2][key] for key in ("method", "clamp", "strength")},
            "selection_tokens": 694,
            "candidates": candidates,
            "modules": {name: {"before": 2.0, "after": 1.5} for name in NAMES},
        },
        "evaluation": {**{name: measures(loss) for name, loss in losses.items()}, "merged": measures(4.2105)},
        "exact_match": {"original": 0.0312, "merged": 0.4567, "num_prompts": 32},
        "gap_closed": {
            "upper_bound": "runs/bound",
            "upper_bound_loss": 4.1,
            "uncorrected": 0.5,
            "corrected": 0.725,
            "merged": 0.7238,
        },
        "generations": [{"prompt": EVIL, "reference": "fine", "original": EVIL, "merged": "fine"}],
    }


@pytest.fixture
def finished() -> str:
    return report.render("run", manifest(*STAGES), finished_metrics())


def test_planned_memory_stands_beside_the_measured() -> None:
    planned = {"calibrate": 3 * 2**29, "finetune": 2**31, "inference": 5 * 2**29}
    page = Page(report.render("run", manifest(*STAGES), {**finished_metrics(), "planned_memory": planned}))
    assert "planned to hold: 2.50 GiB for inference of the original." in page.text
    assert "calibrate11.5 s2.00 GiB300 MiB1.50 GiB2" in page.text
    assert "merge15.5 s6.00 GiB300 MiB–2" in page.text


def test_a_finished_run_has_every_section_and_its_numbers(finished: str) -> None:
    page = Page(finished)
    assert page.sections == [
        "evaluation", "correction", "stages", "training", "emulator", "data", "generations", "disk", "setup",
    ]  # fmt: skip
    for number in (
        "org/model-1b, fine-tuned on tickets.jsonl through an emulator of compression ratio 0.25;",
        "correction: covariance, λ = 3, strength 0.5. Held-out loss 4.5000 → 4.2105 nats a token, a gain of +0.2895.",
        "12,345", "−2.2500", "51.2%", "72.5%", "45.7%",  # evaluation
        "4.32109", "+0.02458", "unclamped", "✓ chosen", "−25.00%",  # correction
        "13.5 s", "7.00 GiB", "300 MiB", "Actor3",  # stages
        "5.1667", "600,123 of 1,000,000 parameters", "24.9%", "0.1636", "2,220 tokens",  # training, emulator
        "6,212", "91", "1.50 KiB", "3.00 GiB", "3,221,225,472", "ray 2.60.0", "max_steps: 3",
    ):  # fmt: skip
        assert number in page.text, number


def test_the_page_loads_nothing(finished: str) -> None:
    page = Page(finished)
    loads = [(tag, name) for tag, attributes in page.tags for name in attributes if name in LOADING]
    assert loads == []
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in page.tags}
    style = re.search(r"<style>(.*)</style>", finished, re.DOTALL)
    assert style
    assert not re.search(r"url\(|@import|@font-face|https?://", style[1])
    assert "default-src 'none'" in finished
    assert "prefers-color-scheme: dark" in style[1]
    assert "@media print" in style[1]


def test_generations_are_escaped_and_control_characters_shown(finished: str) -> None:
    assert "<script" not in finished
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#34;1&#34;)" in finished
    assert "if a[k] < b & c:␀␛␍" in Page(finished).text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", finished)
    finished.encode()


def test_names_and_paths_are_escaped() -> None:
    metrics = finished_metrics()
    metrics["emulator"]["layers"] = {'x.0.<s>"': {"rank": 1, "relative_error": 0.1}}
    metrics["correction"]["modules"] = {'x.0.<q>"': {"before": 1.0, "after": 0.0}}
    page = report.render("<u>", manifest(*STAGES), metrics)
    assert not {"s", "q", "u"} & {tag for tag, _ in Page(page).tags}


def test_secrets_of_the_config_are_not_shown(finished: str) -> None:
    assert "hush" not in finished
    assert "hub_token: (hidden)" in finished


@pytest.mark.parametrize("count", range(len(STAGES)))
def test_a_run_killed_after_any_stage(count: int) -> None:
    # The manifest counts: what metrics.json still holds of a stage to be redone is not shown.
    html = report.render("run", manifest(*STAGES[:count]), finished_metrics())
    page = Page(html)
    assert "Not evaluated yet." in page.text
    made = {"stages": 1, "data": 1, "emulator": 3, "training": 4, "correction": 5}
    shown = [section for section, after in made.items() if count >= after]
    assert set(page.sections) - {"disk", "setup"} == set(shown)
    assert page.text.count("○") == len(STAGES) - count


def test_an_empty_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "fresh")
    directory.create({})
    path = report.write_report(directory)
    assert path == tmp_path / "fresh" / "report.html"
    page = Page(path.read_text())
    assert page.sections == []
    assert "No stage has finished yet" in page.text
    assert "fresh" in page.text


def test_the_file_is_utf8_whatever_models_write(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create({})
    directory.path("manifest.json").write_text(json.dumps(manifest(*STAGES)))
    directory.path("metrics.json").write_text(json.dumps(finished_metrics()))
    text = report.write_report(directory).read_bytes().decode("utf-8")
    assert '<meta charset="utf-8">' in text
    assert not text.isascii()


def test_sections_without_their_optional_parts() -> None:
    metrics = finished_metrics()
    for key in ("gap_closed", "exact_match", "generations"):
        metrics[key] = {}
    metrics["emulator"]["layers"] = {}
    metrics["finetune"]["history"] = []
    metrics["correction"] |= {"candidates": [{**metrics["correction"]["candidates"][2], "loss": None}], "modules": {}}
    page = Page(report.render("run", manifest(*STAGES), metrics))
    assert "Every linear is dense." in page.text
    assert "Given by the config, not chosen." in page.text
    assert {"training", "generations"}.isdisjoint(page.sections)
    assert "Gap closed" not in page.text


def test_losses_that_diverged() -> None:
    metrics = finished_metrics()
    metrics["evaluation"]["emulator"]["loss"] = float("nan")
    metrics["finetune"]["history"][0]["loss"] = float("inf")
    html = report.render("run", manifest(*STAGES), metrics)
    Page(html)
    assert not re.search(r'(width|d)="[^"]*(nan|inf)', html)


def test_stages_older_than_one_before_them_are_named() -> None:
    entries = manifest(*STAGES)
    assert "stage ahead" not in report.render("run", entries, finished_metrics())
    redone = copy.deepcopy(entries)
    redone["stages"]["finetune"]["finished_at"] += 100
    assert "correct, merge, evaluate: finished before" in Page(report.render("run", redone, finished_metrics())).text


def test_grids_order_blocks_by_number_and_shorten_kinds() -> None:
    (grid,) = report.grids(NAMES)
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
    encoder, decoder, rest = report.grids(names)
    assert (encoder.prefix, encoder.kinds) == ("encoder.block", ["q"])
    assert decoder.kinds == ["SelfAttention.q", "EncDecAttention.q"]
    assert decoder.rows[1] == (1, [names[3], None])
    assert rest == report.Grid("", ["shared_projection"], [(None, ["shared_projection"])])


@pytest.mark.parametrize(("low", "high"), [(3.97, 6.17), (0.0, 0.0), (5.0, 5.0), (1e-7, 3e-7), (99.0, 101.0), (0, 9e9)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = report.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 7
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_one_point_and_none_make_a_curve_or_none() -> None:
    assert report.curve([]) is None
    single = report.curve([(5.0, 2.5)])
    assert single is not None
    assert single["first"] == single["last"] == "5"
    assert "nan" not in single["svg"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (20 * 2**20, "20.0 MiB"), (2**30, "1.00 GiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert report.size_text(size) == text


def test_signed_numbers() -> None:
    assert report.signed(0.25, 2) == "+0.25"
    assert report.signed(-0.25, 2) == "−0.25"
    assert report.signed(-0.001, 2) == "0.00"


def test_tasks_are_described_by_their_files() -> None:
    assert report.describe_task({"generate": "docstrings"}) == "generated docstrings"
    assert report.describe_task({"train": {"path": ["a/x.jsonl", "b/y.jsonl"]}}) == "x.jsonl, y.jsonl"
    assert report.describe_task({"train": {"path": "hf:org/data"}}) == "hf:org/data"
    assert report.describe_task({"train": {"path": "s3://b/d/x.csv?region=eu-west-1"}}) == "x.csv"
    assert report.describe_task({}) is None


def unmerged() -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and metrics of a run of prefix tuning."""
    found, metrics = manifest(*(stage for stage in STAGES if stage != "merge")), finished_metrics()
    found["config"]["adapter"] = {"method": "prefix_tuning"}
    for measured in (metrics["evaluation"], metrics["stages"], metrics["disk_bytes"]):
        for name in ("merged", "merge"):
            measured.pop(name, None)
    metrics["disk_bytes"]["adapter"] = 2**20
    metrics["gap_closed"].pop("merged", None)
    metrics["exact_match"]["corrected"] = metrics["exact_match"].pop("merged")
    for sample in metrics["generations"]:
        sample["corrected"] = sample.pop("merged")
    none = {"method": "none", "clamp": 3.0, "strength": 1.0}
    metrics["correction"] = {**none, "candidates": [{**none, "loss": None}], "modules": {}, "selection_tokens": 0}
    metrics["correction"]["as_trained"] = "There is nothing to correct here."
    return found, metrics


def told_of_correct(result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    with ConsoleReporter(console) as reporter:
        reporter.start("correct")
        reporter.finish("correct", result, usage(1))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_what_a_choice_was_made_on_is_told(finished: str) -> None:
    assert "The best of these on 694 tokens of the selection rows" in Page(finished).text
    metrics = finished_metrics()
    fix = metrics["correction"]
    fix |= {"selection_rows": 11, "scored_tokens": 2082, "max_tokens": 2100}
    fix["candidates"][2] |= {"gain": 0.02458, "standard_error": 0.00321}
    text = Page(report.render("run", manifest(*STAGES), metrics)).text
    assert "The best of these on 694 tokens of 11 selection rows" in text
    assert "Together they read 2,082 of the 2,100 tokens that they may." in text
    assert "0.00321" in text
    assert "chose covariance, λ = 3, strength 0.5 of 3 on 11 rows" in told_of_correct(fix)
    none = {"method": "none", "clamp": 3.0, "strength": 1.0, "selection_tokens": 0}
    metrics["correction"] = {**none, "candidates": [{**none, "loss": None}], "modules": {}, "note": "Too little."}
    assert "Too little." in Page(report.render("run", manifest(*STAGES), metrics)).text
    assert "chose none. Too little." in told_of_correct(metrics["correction"])


def test_an_adapter_that_cannot_be_merged_is_said_so() -> None:
    found, metrics = unmerged()
    page = Page(report.render("run", found, metrics))
    for text in (
        "by prefix tuning through an emulator of compression ratio 0.25; plugged in as trained.",
        "There is no merged model: prefix tuning changes no weight",
        "The adapter was plugged into the original as trained. There is nothing to correct here.",
        "by the original with the adapter",
    ):
        assert text in page.text, text
    assert "○ merge" not in page.text
    assert "merged model." not in page.text
    lines = "\n".join(result_lines(metrics, "runs/x"))
    assert "Correction: none. There is nothing to correct here." in lines
    assert "no merged/" in lines
    assert evaluation_table(metrics).row_count == 5


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (["data"], "runs/x: report.html"),
        (["data", "calibration", "emulator"], "runs/x: emulator/, report.html"),
        (["emulator", "adapter_emulator"], "runs/x: adapter_emulator/ (as trained), report.html"),
        (["adapter_emulator", "adapter"], "runs/x: adapter/ (PEFT), report.html"),
        (["adapter", "merged"], "runs/x: adapter/ (PEFT), merged/ (transformers), report.html"),
    ],
)
def test_the_artifacts_that_there_are_get_named(made: list[str], named: str) -> None:
    metrics = {"stages": {"data": usage(0)}, "disk_bytes": dict.fromkeys(made, 5)}
    assert result_lines(metrics, "runs/x")[-1] == f"Artifacts in {named}"


def test_the_form_that_full_rank_updates_are_corrected_in_is_told() -> None:
    metrics = finished_metrics()
    metrics["correction"]["lora_form"] = {"largest_lack": 0.00094, "mean_rank": 37.25}
    page = Page(report.render("run", manifest(*STAGES), metrics))
    assert "of mean rank 37.2" in page.text
    assert "all but 0.00094 of each update's norm" in page.text


@pytest.mark.parametrize(("ratio", "words"), [(0.25, "in 4 bits (NF4)"), (1.0, "LoRA on the original in 4 bits")])
def test_an_emulator_in_4_bits_is_said_to_be_one(finished: str, ratio: float, words: str) -> None:
    made, metrics = manifest(*STAGES), finished_metrics()
    made["config"]["emulator"] = {"compression_ratio": ratio, "quantization": "nf4"}
    metrics["emulator"] |= {"quantization": "nf4", "bytes": 5 * 2**20}
    page = report.render("run", made, metrics)
    assert words in page
    assert "5.00 MiB" in page
    assert "4 bits" not in finished
    # Unlike plain LoRA it was calibrated.
    del made["stages"]["calibrate"]
    assert "factorize" in report.page_view("run", made, metrics)["older"]


def test_a_healing_is_shown_with_its_curve(finished: str) -> None:
    stages = [*STAGES[:3], "heal", *STAGES[3:]]
    made, metrics = manifest(*stages), finished_metrics()
    made["config"]["emulator"] = {"compression_ratio": 0.25, "healing": {"steps": 30}}
    metrics["healing"] = {
        "steps": 30,
        "train_loss": 1.25,
        "history": [{"step": 10, "loss": 2.5}, {"step": 30, "loss": 0.75}],
        "healed_layers": 14,
        "teacher_rows": 1234,
        "teacher_bytes": 3 * 2**20,
    }
    page = Page(report.render("run", made, metrics))
    assert "over 30 steps, mean 1.2500 nats a token; 14 linears healed" in page.text
    assert "1,234 rows took 3.00 MiB" in page.text
    assert "step 10: 2.5000" in page.text
    assert "both before the healing" in page.text
    assert "healed" not in finished
    # What was tuned on an emulator that is to be healed again is of another run.
    del made["stages"]["heal"]
    assert "finetune" in report.page_view("run", made, metrics)["older"]
    made["config"]["emulator"]["compression_ratio"] = 1.0
    assert report.page_view("run", made, metrics)["older"] == []
