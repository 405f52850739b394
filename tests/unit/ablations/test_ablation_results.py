"""From cells to a table: gaps, their spread, pairs, what is missing, and the pages' tables."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ablations.cell_figures import disagreeing
from ablations.cells import read_ablation
from ablations.records import asked, gap_closed
from ablations.statistics import paired, spread, summarize
from ablations.tables import marked, read_results, render, with_tables

from emloc_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "pipelines" / "results"
ABLATIONS = sorted(path for path in (ROOT / "configs" / "ablations").glob("*.yaml") if path.name != "base.yaml")


def record(method: str, seed: int, gap: float | None, dataset: str = "names", **changes: Any) -> dict[str, Any]:
    found = {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "ratio": 0.5,
        "calibration": "own",
        "correction": "auto",
        "settings": {},
        "status": "missing" if gap is None else "done",
        "loss": None if gap is None else 4 - gap,
        "gap_closed": gap,
        "gap_closed_uncorrected": gap,
        "gap_closed_by_emulator": None,
    }
    measured = {"training": {"wall_s": 10.0, "planned_bytes": 2**30}, "inference_planned_bytes": 2**29}
    return {**found, **({} if gap is None else measured), **changes}


def test_the_gap_closed_is_a_share_of_what_the_bound_gained() -> None:
    assert gap_closed(4.0, 3.5, 3.0) == 0.5
    assert gap_closed(4.0, 4.0, 3.0) == 0
    assert gap_closed(4.0, 4.5, 3.0) == -0.5
    assert gap_closed(4.0, 3.5, 4.0) is None


def test_a_spread_is_of_what_is_there() -> None:
    found = spread([0.1, 0.2, None, 0.6])
    assert found["n"] == 3
    assert found["missing"] == 1
    assert found["mean"] == pytest.approx(0.3)
    assert found["sd"] == pytest.approx(0.07**0.5)
    assert found["sem"] == pytest.approx((0.07 / 3) ** 0.5)
    assert spread([0.1])["sd"] is None
    assert spread([None]) == {"n": 0, "missing": 1, "mean": None, "sd": None, "sem": None}


def test_pairs_need_both_sides() -> None:
    found = paired([0.5, 0.7, None, 0.9], [0.4, 0.5, 0.3, 0.6])
    assert (found["n"], found["missing"]) == (3, 0)
    assert found["mean"] == pytest.approx(0.2)
    # t = mean / (sd / √3) = 0.2 / (0.1 / √3) with two degrees of freedom: p = 1 − t / √(t² + 2).
    t = 2 * 3**0.5
    assert found["p"] == pytest.approx(1 - t / (t**2 + 2) ** 0.5)
    assert paired([0.5], [0.4])["p"] is None
    assert paired([0.5, 0.6], [0.5, 0.6])["p"] is None


def test_rows_are_labels_and_pairs_are_of_one_data_set_and_seed() -> None:
    records = [
        *(record("paper", seed, 0.5 + seed / 10) for seed in range(3)),
        *(record("ours", seed, 0.6 + seed / 10 + (seed == 2) / 10) for seed in (2, 1)),
        record("ours", 0, None),
    ]
    paper, ours = summarize(records, ["method"], {"method": "paper"})
    assert (paper["label"], ours["label"]) == ({"method": "paper"}, {"method": "ours"})
    assert "against" not in paper
    assert ours["datasets"]["names"]["gap_closed"]["missing"] == 1
    assert ours["against"]["label"] == {"method": "paper"}
    assert ours["against"]["n"] == 2
    assert ours["against"]["mean"] == pytest.approx(0.15)
    assert ours["training_bytes"]["mean"] == 2**30


def test_over_several_data_sets_a_seed_counts_once() -> None:
    # Gains of 1 point on one data set and of 9 on the other, in both seeds: 5 in the mean, and no doubt of it here.
    gaps = {("paper", "names"): 0.5, ("ours", "names"): 0.51, ("paper", "code"): 0.2, ("ours", "code"): 0.29}
    records = [
        record(method, seed, gap + seed / 10 + (seed and method == "ours") / 50, dataset)
        for (method, dataset), gap in gaps.items()
        for seed in (0, 1)
    ]
    paper, ours = summarize(records, ["method"], {"method": "paper"})
    assert paper["all"]["gap_closed"]["n"] == 2
    assert paper["all"]["gap_closed"]["mean"] == pytest.approx(0.4)
    assert paper["all"]["gap_closed"]["sem"] == pytest.approx(0.05)
    assert ours["against"]["n"] == 2
    assert ours["against"]["mean"] == pytest.approx(0.06)  # 0.05 and 0.07
    assert ours["against"]["sem"] == pytest.approx(0.01)
    # t = 6 with one degree of freedom: p = 1 − 2/π · arctan 6.
    assert ours["against"]["p"] == pytest.approx(1 - 2 / math.pi * math.atan(6))


def test_a_seed_without_one_of_the_data_sets_is_missing_from_their_mean() -> None:
    records = [
        *(record("paper", seed, 0.5, dataset) for seed in (0, 1) for dataset in ("names", "code")),
        *(record("ours", 0, 0.6, dataset) for dataset in ("names", "code")),
        *(record("ours", 1, gap, dataset) for gap, dataset in ((0.9, "names"), (None, "code"))),
    ]
    ours = summarize(records, ["method"], {"method": "paper"})[1]
    assert (ours["all"]["gap_closed"]["n"], ours["all"]["gap_closed"]["missing"]) == (1, 1)
    assert (ours["against"]["n"], ours["against"]["p"]) == (1, None)
    assert ours["against"]["mean"] == pytest.approx(0.1)


def test_what_two_scorings_of_one_adapter_differ_by_is_no_difference() -> None:
    found = paired([0.5 + 3e-8, 0.6 - 1e-8, 0.7], [0.5, 0.6, 0.7 - 2e-8])
    assert (found["mean"], found["sem"], found["p"]) == (0.0, 0.0, None)
    assert paired([0.5 + 1e-5], [0.5])["mean"] == pytest.approx(1e-5)


def test_a_row_is_compared_with_the_one_that_is_like_it_in_all_else() -> None:
    def grid(calibration: str, correction: str, gap: float) -> dict[str, Any]:
        return record("paper", 0, gap, calibration=calibration, correction=correction)

    records = [
        grid("own", "none", 0.5),
        grid("own", "auto", 0.6),
        grid("worse", "none", 0.1),
        grid("worse", "auto", 0.3),
    ]
    bound = record("lora", 0, 1.0, calibration=None, correction=None)
    rows = summarize([bound, *records], ["method", "calibration", "correction"], {"correction": "none"})
    assert [round(row["against"]["mean"], 3) if "against" in row else None for row in rows] == [
        None,
        None,
        0.1,
        None,
        0.2,
    ]


def test_ratios_that_methods_have_of_their_own_are_compared() -> None:
    records = [record("paper", 0, 0.5), record("nf4", 0, 0.9, ratio=1.0)]
    keys = ["method", "emulator.compression_ratio"]
    assert summarize(records, keys, {"method": "paper"})[1]["against"]["mean"] == pytest.approx(0.4)
    varied = [{**found, "settings": {"emulator.compression_ratio": found["ratio"]}} for found in records]
    assert "against" not in summarize(varied, keys, {"method": "paper"})[1]


def result(records: list[dict[str, Any]]) -> dict[str, Any]:
    compare = {"method": "paper"}
    rows = summarize(records, ["method"], compare)
    return {"kind": "ablation", "config": {"compare_with": compare}, "rows": rows, "records": records}


def test_what_is_missing_stands_in_the_table() -> None:
    table = render(
        result(
            [
                record("paper", 0, 0.5),
                record("paper", 1, 0.7, training={"wall_s": 14.0, "planned_bytes": 2**30}),
                record("ours", 0, 0.6),
                record("ours", 1, None),
                record("lost", 0, None),
                record("lost", 1, None),
            ]
        )
    )
    assert table.splitlines() == [
        "| method | names, % | served small, % | against paper | training, GiB planned | training, s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| paper | 60.0 ± 14.1 | – | – | 1.00 | 12 ± 3 |",
        "| ours | 60.0 (1 of 2) | – | +10.0 | 1.00 | 10 |",
        "| lost | – (0 of 2) | – | – | – | – |",
    ]


def test_a_page_gets_the_tables_that_it_names() -> None:
    page = "a\n<!-- table: x -->\nold\n<!-- end of table -->\nb\n"
    one = {"kind": "bare_emulators", "rows": [{"ranks": "uniform", "factors": "f", "losses": {"0.5": 1.0, "0.25": 2}}]}
    made = with_tables(page, {"x": one})
    assert made.splitlines()[2:5] == ["| ranks | factors | ratio 0.5 | ratio 0.25 |", "| --- | --- | --- | --- |",
        "| uniform | f | **1.000** | **2.000** |"]  # fmt: skip
    assert with_tables(made, {"x": one}) == made
    assert marked(made) == {"x"}
    with pytest.raises(ConfigError, match="has a table x, and pipelines/results holds y: publish it"):
        with_tables(page, {"y": one})


def test_the_pages_tables_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "pipelines/tables.py", "--check"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (ROOT / "pipelines" / "README.md").read_text()
    assert with_tables(text, read_results(RESULTS)) == text
    assert marked(text) == read_results(RESULTS).keys()


def test_the_readmes_summary_has_the_figures_of_its_tables() -> None:
    """Its four rows, and the plan of a 26B model beside them."""
    text, results = (ROOT / "README.md").read_text(), read_results(RESULTS)
    rows = [line.strip("| ").split(" | ") for line in text.split("| method | gap", 1)[1].splitlines()[2:6]]
    baselines, allocation = (render(results[name]).splitlines() for name in ("baselines", "allocation"))
    of = {
        "LoRA on the original": ("| lora | 1.0 |", baselines),
        "LoRA on the original in 4 bits": ("| nf4 lora | 1.0 |", baselines),
        "emulator of half of the parameters": ("| emloc | 0.5 |", baselines),
        "emulator of a quarter": ("| healed | 0.25 |", allocation),
    }
    assert [row[0] for row in rows] == list(of)
    for name, *figures in rows:
        start, table = of[name]
        found = next(line for line in table if line.startswith(start)).strip("| ").split(" | ")
        assert figures == [found[2], found[-2], found[-1]], name
    assert (
        f"the paper's settings close {next(line for line in baselines if line.startswith('| paper |')).split(' | ')[2]}"
        in text
    )
    large = results["paper_shapes"]["models"]["26B"]
    tuned = large["five_billion"]
    assert f"{tuned['finetune']:.1f} GB of training on an emulator (ratio {tuned['ratio']:g})" in text
    assert f"{large['inference']:.1f} GB of inference, {large['lora_on_the_original']:.1f} GB of LoRA" in text


def test_the_readmes_advice_has_the_figures_of_its_tables() -> None:
    """What emulators in few bits closed, in *When to use it*."""
    text, results = (ROOT / "README.md").read_text(), read_results(RESULTS)

    def closed(method: str, *tables: str) -> str:
        """The mean over the data sets and seeds of tables, by the seeds that all of them have."""
        seeds = set.intersection(*(set(results[name]["config"]["seeds"]) for name in tables))
        records = [record for name in tables for record in results[name]["records"] if record["seed"] in seeds]
        shares = [record["gap_closed"] for record in records if record["method"] == method]
        assert len(shares) == len(seeds) * sum(len(results[name]["config"]["datasets"]) for name in tables)
        return f"{100 * sum(shares) / len(shares):.0f}"

    everywhere = ("equal_bytes", "equal_bytes_tasks")
    assert [len(results[name]["config"]["seeds"]) for name in everywhere] == [5, 5]
    assert "Over [three tasks and five seeds](pipelines/README.md#at-equal-bytes)" in text
    assert closed("int4", *everywhere) == "100"
    assert f"`int4` kept all of what LoRA on the original gains, `int3` {closed('int3', *everywhere)} %" in text
    assert f"and `nf4` {closed('nf4', *everywhere)} %" in text
    assert f"it kept {closed('budget_2.4', *everywhere)} % in those runs" in text
    refined = closed("budget_2.4_refined", "refined_more_bits"), closed("budget_1.1_refined", "refined_budgets")
    assert f"at 1.1 bits {closed('budget_1.1', *everywhere)} %, and [{' and '.join(refined)} %]" in text
    source = closed("budget_2.4", "equal_bytes_gemma_code"), closed("budget_1.1_refined", "refined_budgets_gemma_code")
    assert f"kept {source[0]} % at 2.4 bits, and {source[1]} % at 1.1 with refinement" in text


def test_what_refinement_gained_on_gemma_has_the_figures_of_its_tables() -> None:
    text, results = (ROOT / "emloc_ray" / "README.md").read_text(), read_results(RESULTS)

    def gained(name: str, refined: str, without: str) -> tuple[str, str]:
        """The points more that the first method closed, and the p value to one digit."""
        closed = {(cell["method"], cell["seed"]): cell["gap_closed"] for cell in results[name]["records"]}
        seeds = results[name]["config"]["seeds"]
        more = paired([closed[refined, seed] for seed in seeds], [closed[without, seed] for seed in seeds])
        return f"{100 * more['mean']:.1f} ± {100 * more['sem']:.1f}".replace("-", "−"), f"{more['p']:.1g}"

    half, p = gained("frontier_gemma", "factors_refined", "factors")
    assert f"On Gemma 3 270M 25 steps gained nothing at 0.5 ({half} points over five seeds, p = {p})" in text
    methods = "budget_1.1_refined", "budget_1.1"
    (docstrings, p), (source, p_of_source) = (
        gained(name, *methods) for name in ("refined_budgets_gemma", "refined_budgets_gemma_code")
    )
    assert (
        f"it gained {docstrings} points on docstrings (p = {p}) and {source} on plain source (p = {p_of_source})"
        in text
    )


def test_every_grid_has_a_table() -> None:
    assert {path.stem for path in ABLATIONS} <= read_results(RESULTS).keys()


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_a_committed_file_asks_for_what_its_table_shows(path: Path) -> None:
    published = read_results(RESULTS)[path.stem]
    assert published["config"] == asked(read_ablation(path))
    assert {record["status"] for record in published["records"]} == {"done"}


def test_the_same_inputs_have_the_same_losses_in_all_results() -> None:
    published = {name: result["cells"] for name, result in read_results(RESULTS).items() if "cells" in result}
    assert disagreeing(published) == []


def test_what_is_published_names_no_place() -> None:
    for path in RESULTS.glob("*.json"):
        assert '"/' not in path.read_text(), path
        assert str(ROOT) not in path.read_text(), path


def test_a_run_stands_beside_lora_on_the_original() -> None:
    rows = [
        {"what": "original", "loss": 4.0, "gap_closed": 0, "exact_match": 0.0},
        {"what": "ours", "loss": 3.25, "gap_closed": 0.75, "exact_match": None},
    ]
    assert render({"kind": "whole_run", "rows": rows}).splitlines() == [
        "|  | held-out loss | gap closed | exact match |",
        "| --- | --- | --- | --- |",
        "| original | 4.000 | 0.0 % | 0 % |",
        "| ours | 3.250 | 75.0 % | – |",
    ]


def test_peaks_stand_beside_inference() -> None:
    rows = [{"model": "a model", "mib": {"1": [480.6, 583], "4": [1911, 2675]}}]
    assert render({"kind": "peaks", "rows": rows}).splitlines() == [
        "|  | 1 row | 4 rows |",
        "| --- | --- | --- |",
        "| a model | 481 of 583 MiB | 1,911 of 2,675 MiB |",
    ]


def test_a_benchmarks_lines_say_what_they_stand_beside() -> None:
    one = {"ours": 2.0, "baseline": 7.5, "ratio": 3.75, "unit": "s (baseline: the other way)", "error": 2.6e-4}
    plain = {"ours": 1234.4, "baseline": 617.2, "ratio": 0.5, "unit": "MiB (baseline: at 125)", "error": None}
    assert render({"kind": "figures", "parts": {"a": {"one": one}, "b": {"two": plain}}}).splitlines() == [
        "|  | here | beside it | better | added error |",
        "| --- | --- | --- | --- | --- |",
        "| one | 2 s | 7.5 s: the other way | 3.75 × | +2.6e-04 |",
        "| two | 1,234 MiB | 617 MiB: at 125 | 0.50 × | – |",
    ]
    assert render({"kind": "figures", "parts": {"b": {"two": plain}}}).splitlines() == [
        "|  | here | beside it | better |",
        "| --- | --- | --- | --- |",
        "| two | 1,234 MiB | 617 MiB: at 125 | 0.50 × |",
    ]


def test_the_papers_figures_stand_in_parentheses_where_it_has_them() -> None:
    known = {"weights": 49.9, "inference": 51.8, "lora_on_the_original": 63.1}
    tuned = {**known, "five_billion": {"ratio": 0.17, "finetune": 22.9}, "paper_lora": 72.9, "paper_emloc": 18.6}
    models = {"26B": tuned, "8B": {**known, "paper_lora": None, "paper_emloc": None}}
    assert render({"kind": "shapes", "models": models}).splitlines()[2:] == [
        "| 26B | 49.9 | 51.8 | 63.1 (72.9) | 22.9 at 0.17 (18.6) |",
        "| 8B | 49.9 | 51.8 | 63.1 | – |",
    ]
