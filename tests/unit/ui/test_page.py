"""report.html: self-contained, well-formed, escaped, and right for runs that are finished, half-way or empty."""

from __future__ import annotations

import copy
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import LOADING, Page
from rich.console import Console
from run_samples import STAGES, event, events, finished_metrics, healing_metrics, manifest, spectra, usage

from emloc_ray.io.runs.directory import SPECTRA, RunDirectory
from emloc_ray.runs.log import RunLog
from emloc_ray.ui import page as report
from emloc_ray.ui.console_reporter import ConsoleReporter
from emloc_ray.ui.terminal import evaluation_rows, evaluation_table, result_lines


@pytest.fixture
def finished() -> str:
    return report.render("run", manifest(*STAGES), finished_metrics())


def test_steps_beyond_the_colours_begin_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "STEP_NAMES", (*report.STEP_NAMES, "another"))
    page = report.render("run", manifest(*STAGES), finished_metrics())
    assert f".timeline .another {{ --colour: {report.COLOURS[0]}; }}" in page


def test_planned_memory_stands_beside_the_measured() -> None:
    planned = {"calibrate": 3 * 2**29, "finetune": 2**31, "inference": 5 * 2**29}
    page = Page(report.render("run", manifest(*STAGES), {**finished_metrics(), "planned_memory": planned}))
    assert "marks the plan for one worker, the dashed line the plan for inference of the original" in page.text
    assert "calibrate11.5 s2.00 GiB300 MiB1.50 GiB2" in page.text
    assert "merge15.5 s6.00 GiB300 MiB–2" in page.text


def test_what_was_measured_and_planned_above_imports_is_of_one_kind() -> None:
    metrics = finished_metrics()
    metrics["stages"]["calibrate"]["peak_above_imports_bytes"] = 2**28
    metrics |= {"planned_memory": {"calibrate": 3 * 2**28, "inference": 5 * 2**28}, "planned_imports_bytes": 2**28}
    page = Page(report.render("run", manifest(*STAGES), metrics))
    assert (
        "dashed line the plan for inference of the original, 1.00 GiB; these and the bar beside them are above what"
        in page.text
    )
    assert "calibrate11.5 s2.00 GiB300 MiB256 MiB512 MiB2" in page.text
    assert "merge15.5 s6.00 GiB300 MiB––2" in page.text


def test_a_gpu_s_peak_is_what_its_plan_is_held_to() -> None:
    metrics = finished_metrics()
    metrics["stages"]["calibrate"] |= {"peak_above_imports_bytes": 2**28, "peak_gpu_bytes": 2**29}
    metrics |= {"planned_memory": {"calibrate": 2**31, "merge": 2**29}, "planned_imports_bytes": 2**28}
    for planned, shown in (({}, "–"), ({"calibrate": 2**29, "finetune": 2**29}, "512 MiB")):
        page = Page(report.render("run", manifest(*STAGES), {**metrics, "planned_gpu_bytes": planned}))
        assert (
            "The bar of a worker with a GPU is what it reserved there, and its plan what was planned of it."
            in page.text
        )
        assert f"calibrate11.5 s2.00 GiB300 MiB and 512 MiB of its GPU512 MiB{shown}2" in page.text


def test_a_finished_run_has_every_section_and_its_numbers(finished: str) -> None:
    page = Page(finished)
    assert page.sections == [
        "evaluation", "use", "correction", "timeline", "stages", "training", "emulator", "data", "generations", "disk", "setup",
    ]  # fmt: skip
    for number in (
        "org/model-1b, fine-tuned on tickets.jsonl through an emulator of compression ratio 0.25;",
        "correction: covariance, λ = 3, strength 0.5. Held-out loss 4.5000 → 4.2105 nats a token, a gain of +0.2895.",
        "12,345", "−2.2500", "51.2%", "72.5%", "45.7%",  # evaluation
        "4.32109", "+0.02458", "unclamped", "✓ chosen", "−25.00%",  # correction
        "2,441,216 trainable parameters; 1,726 tokens/s", "2 nodes, 32 CPUs, 4 GPUs (H100)",
        "13.5 s", "7.00 GiB", "300 MiB",  # stages
        "5.1667", "600,123 of 1,000,000 parameters", "24.9%", "0.1636", "2,220 tokens",  # training, emulator
        "6,212", "91", "1.50 KiB", "3.00 GiB", "3,221,225,472", "ray 2.60.0", "max_steps: 3",
    ):  # fmt: skip
        assert number in page.text, number


def test_the_page_loads_nothing(finished: str) -> None:
    page = Page(finished)
    loads = [(tag, name) for tag, attributes in page.tags for name in attributes if name in LOADING]
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} == {f"#{id}" for id in page.sections}
    assert {tag for tag, _ in loads} == {"a"}
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
    page = Page(report.render("run", manifest(*STAGES[:count]), finished_metrics()))
    assert "Not evaluated yet." in page.text
    made = {"timeline": 1, "stages": 1, "data": 1, "emulator": 3, "training": 4, "use": 5, "correction": 5}
    shown = [section for section, after in made.items() if count >= after]
    assert set(page.sections) - {"disk", "setup"} == set(shown)
    assert page.text.count("○") == len(STAGES) - count


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    report.render("run", manifest(*STAGES), finished_metrics())
    monkeypatch.setattr(report.jinja2.Environment, "compile", None)
    assert "<html" in report.render("run", manifest(*STAGES), finished_metrics())


def test_an_empty_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "fresh")
    directory.create({})
    path = report.write_report(directory)
    assert path == tmp_path / "fresh" / "report.html"
    page = Page(path.read_text())
    assert page.sections == []
    assert "No stage has finished yet" in page.text
    assert "fresh" in page.text


def test_the_page_of_a_run_that_was_killed_in_a_stage(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create({"emulator": {"compression_ratio": 0.5}}, steps=["calibrate"])
    log = RunLog(directory, interval_s=0).__enter__()  # never left: killed
    log.start("calibrate")
    page = Page(report.write_report(directory).read_text())
    assert page.sections == ["setup"]
    assert "▶ calibrate" in page.text
    log.__exit__(None, None, None)


@pytest.mark.parametrize("content", [None, "{", json.dumps(spectra())])
def test_spectra_are_read_where_there_are_any(tmp_path: Path, content: str | None) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create({})
    directory.path("manifest.json").write_text(json.dumps(manifest(*STAGES)))
    directory.path("metrics.json").write_text(json.dumps(finished_metrics()))
    directory.path("emulator").mkdir()
    if content is not None:
        directory.path("emulator", SPECTRA).write_text(content)
    cells = report.write_report(directory).read_text().count("popovertarget=")
    assert cells == (len(spectra()) if content and content != "{" else 0)


def test_how_to_load_the_result_is_code(finished: str) -> None:
    code = re.search(r"<section id=\"use\">.*?<pre>(.*?)</pre>", finished, re.DOTALL)
    assert code
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in html.unescape(code[1])
    compile(html.unescape(code[1]), "page", "exec")
    elsewhere = report.render("run", manifest(*STAGES), {**finished_metrics(), "base_model": "/models/mine"})
    assert 'from_pretrained("/models/mine")' in html.unescape(elsewhere)


def test_variants_of_the_same_figures_are_one_row() -> None:
    metrics = finished_metrics()
    metrics["evaluation"]["corrected"] = metrics["evaluation"]["uncorrected"]
    rows = evaluation_rows(metrics["evaluation"])
    assert [row["label"] for row in rows][3:] == ["original + adapter as trained = corrected", "merged"]
    assert rows[3]["variants"] == ["uncorrected", "corrected"]
    metrics["evaluation"]["merged"] = metrics["evaluation"]["uncorrected"]
    [*_, last] = evaluation_rows(metrics["evaluation"])
    assert last["label"] == "original + adapter as trained = corrected = merged"
    assert last["gain"] == pytest.approx(0.2)


def test_the_stage_that_has_begun_is_marked() -> None:
    page = Page(report.render("run", manifest("data", "calibrate"), finished_metrics(), events()))
    assert "✓ calibrate ▶ factorize ○ finetune" in page.text


@pytest.mark.parametrize(("end", "words"), [("run_failed", "Failed"), ("run_stopped", "Stopped")])
def test_a_run_that_failed_or_was_stopped_says_so_until_it_is_tried_again(end: str, words: str) -> None:
    last = event(end, 20, stage="factorize", message="factorize: <no>.")

    def shown(*after: dict[str, Any]) -> str:
        log = [*events(), last, *after]
        return Page(report.render("run", manifest("data", "calibrate"), finished_metrics(), log)).text

    assert "✓ calibrate ✗ factorize ○ finetune" in shown()
    assert f"{words} in factorize, 2027-01-15 08:00 UTC: factorize: <no>." in shown()
    assert "factorize: <no>." not in shown(event("run_started", 30))


def test_a_stage_from_the_cache_names_who_made_it_and_counts_in_no_peak() -> None:
    metrics = finished_metrics()
    metrics["stages"]["calibrate"] |= {"taken_from": "other-run", "peak_pss_bytes": 2**50}
    page = Page(report.render("run", manifest(*STAGES), metrics, events()))
    assert "from the cache, made by other-run" in page.text
    assert "7 stages, 1 from the cache" in page.text
    assert "TiB" not in page.text
    assert any(line.startswith("Cost: 2 min and 1 stage from the cache") for line in result_lines(metrics, "run"))


def test_the_merged_model_is_opened_where_it_is_not_scored_and_before_the_evaluation() -> None:
    page = report.render("run", manifest(*STAGES[:-1]), {**finished_metrics(), "evaluation": {}})
    assert 'from_pretrained("merged")' in html.unescape(page)


def test_the_corrections_effect_is_told_beside_the_losses(finished: str) -> None:
    assert "The correction: 4.3000 → 4.2100, a gain of +0.0900." in Page(finished).text


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
    assert "Set in the config, not chosen." in page.text
    assert {"training", "generations"}.isdisjoint(page.sections)
    assert "Gap closed" not in page.text


def test_losses_that_diverged() -> None:
    metrics = finished_metrics()
    metrics["evaluation"]["emulator"]["loss"] = float("nan")
    metrics["finetune"]["history"][0]["loss"] = float("inf")
    page = report.render("run", manifest(*STAGES), metrics)
    Page(page)
    assert not re.search(r'(width|d)="[^"]*(nan|inf)', page)


def test_the_gap_closed_is_that_of_the_finished_adapter_where_there_is_one() -> None:
    metrics = finished_metrics()
    metrics["gap_closed"] |= {"corrected": 0.51, "finished": 0.93}
    assert (
        "51.0% corrected, 93.0% finished on the original" in Page(report.render("run", manifest(*STAGES), metrics)).text
    )
    assert "Gap closed: 93.0% of the way" in "\n".join(result_lines(metrics, "runs/x"))


def test_stages_older_than_one_before_them_are_named() -> None:
    entries = manifest(*STAGES)
    assert "was redone since" not in report.render("run", entries, finished_metrics())
    redone = copy.deepcopy(entries)
    redone["stages"]["finetune"]["finished_at"] += 100
    assert "was redone since: correct, merge, evaluate." in Page(report.render("run", redone, finished_metrics())).text


def test_tasks_are_described_by_their_files() -> None:
    assert report.describe_task({"generate": "docstrings"}) == "generated docstrings"
    assert report.describe_task({"train": {"path": ["a/x.jsonl", "b/y.jsonl"]}}) == "x.jsonl, y.jsonl"
    assert report.describe_task({"train": {"path": "hf:org/data"}}) == "hf:org/data"
    assert report.describe_task({"train": {"path": "s3://b/d/x.csv?region=eu-west-1"}}) == "x.csv"
    assert report.describe_task({}) is None


def unmerged() -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and metrics of a run of prefix tuning."""
    found, metrics = manifest(*(stage for stage in STAGES if stage != "merge")), finished_metrics()
    found["steps"].remove("merge")
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
    assert "Chosen on 694 tokens of the selection rows" in Page(finished).text
    metrics = finished_metrics()
    fix = metrics["correction"]
    fix |= {"selection_rows": 11, "scored_tokens": 2082, "max_tokens": 2100}
    fix["candidates"][2] |= {"gain": 0.02458, "standard_error": 0.00321, "certainty": 0.931, "interpolated": True}
    text = Page(report.render("run", manifest(*STAGES), metrics)).text
    assert "Chosen on 694 tokens of 11 selection rows" in text
    assert "The candidates read 2,082 tokens, of at most 2,100." in text
    assert "0.00321" in text
    assert "93 %" in text
    fix["candidates"][1] |= {"gain": 0.02, "standard_error": 0.001, "certainty": 0.9999}
    assert "99 %" in (told := Page(report.render("run", manifest(*STAGES), metrics)).text)
    assert "100 %" not in told
    assert "(interpolated)" in text
    fix["considered"] = {**fix["candidates"][2], "certainty": 0.931}
    told = told_of_correct(fix)
    assert "chose covariance, λ = 3, strength 0.5, best of 3 on 11 rows; with about 93 % certainty it is better" in told
    other = told_of_correct({**fix, "method": "none"})
    assert "with about 93 % certainty covariance, λ = 3, strength 0.5 is better than none" in other
    fix["considered"]["certainty"] = 0.9951
    assert "with about 99 % certainty it is better" in told_of_correct(fix)
    fix["considered"]["certainty"] = 0.2
    assert "best of 3 on 11 rows; the rows do not tell whether it is better than none" in told_of_correct(fix)
    none = {"method": "none", "clamp": 3.0, "strength": 1.0, "selection_tokens": 0}
    metrics["correction"] = {**none, "candidates": [{**none, "loss": None}], "modules": {}, "note": "Too little."}
    assert "Too little." in Page(report.render("run", manifest(*STAGES), metrics)).text
    assert "chose none. Too little." in told_of_correct(metrics["correction"])


def test_an_adapter_that_cannot_be_merged_is_said_so() -> None:
    found, metrics = unmerged()
    page = Page(report.render("run", found, metrics))
    for text in (
        "by prefix tuning through an emulator of compression ratio 0.25; plugged in as trained.",
        "There is no merged model, because prefix tuning changes no weight",
        "The original takes the adapter as trained. There is nothing to correct here.",
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
        (["data"], "runs/x: report.html, trace.json"),
        (["data", "calibration", "emulator"], "runs/x: emulator/, report.html, trace.json"),
        (["emulator", "adapter_emulator"], "runs/x: adapter_emulator/ (as trained), report.html, trace.json"),
        (["adapter_emulator", "adapter"], "runs/x: adapter/ (PEFT), report.html, trace.json"),
        (["adapter", "merged"], "runs/x: adapter/ (PEFT), merged/ (transformers), report.html, trace.json"),
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


def test_a_refinement_is_shown_with_its_blocks_errors_and_finishing_with_its_curve() -> None:
    made, metrics = manifest(*STAGES[:2], "refine", *STAGES[2:], "finish"), finished_metrics()
    errors = [[0.5, 0.25], [0.75, 0.75], [1.0, 0.5]]
    metrics["refinement"] = {"blocks": 3, "blocks_refined": 2, "error_left": 2 / 3, "errors": errors}
    metrics["finishing"] = {"steps": 8, "train_loss": 0.5, "history": [{"step": 8, "loss": 0.4375}]}
    html = report.render("run", made, metrics)
    text = Page(html).text
    assert "2 of 3 blocks refined, their mean error 67% of what it was. before, after." in text
    assert "block 0block 2" in text
    assert "and the rank, the error before refinement. Mean" in text
    assert "block 1: 0.7500" in text
    assert html.count('class="compared"') == 1
    assert "Training loss over 8 steps, mean 0.5000 nats a token." in text
    assert "step 8: 0.4375" in text
    healed = manifest(*STAGES[:2], "refine", "heal", *STAGES[2:])
    text = Page(report.render("run", healed, {**metrics, "healing": healing_metrics()})).text
    assert "and the rank, both before refinement and healing. Mean" in text
    del metrics["refinement"]["errors"]
    assert "block 0" not in Page(report.render("run", made, metrics)).text


def test_validation_is_shown_with_the_original_s_losses_beside_the_emulator_s() -> None:
    metrics = finished_metrics()
    history = [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.25, "original_loss": 1.875}]
    metrics["finetune"]["validation"] = {"history": history, "keeps_best": False, "goes_by": "loss"}
    html = report.render("run", manifest(*STAGES), metrics)
    assert "lowest 2.2500" in html
    assert "1.8750" in html
    assert "validation loss, 2.500 at step 10 to 2.250 at step 20" in html
    del history[1]["original_loss"]
    assert "on the original with the adapter" not in report.render("run", manifest(*STAGES), metrics)


def test_a_healing_is_shown_with_its_curve(finished: str) -> None:
    stages = [*STAGES[:3], "heal", *STAGES[3:]]
    made, metrics = manifest(*stages), finished_metrics()
    made["config"]["emulator"] = {"compression_ratio": 0.25, "healing": {"steps": 30}}
    metrics["healing"] = healing_metrics()
    page = Page(report.render("run", made, metrics))
    assert "over 30 steps, mean 1.2500 nats a token; 14 linears healed" in page.text
    assert "1,234 rows took 3.00 MiB" in page.text
    assert "step 10: 2.5000" in page.text
    assert "both before healing" in page.text
    assert "healed" not in finished
    # What was tuned on an emulator that is to be healed again is of another run.
    del made["stages"]["heal"]
    assert "finetune" in report.page_view("run", made, metrics)["older"]
    made["steps"].remove("heal")
    assert report.page_view("run", made, metrics)["older"] == []
