"""Figures of cells: what they follow from, what counts as missing, and what records and published results make of them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ablation import run
from ablations import cell_figures, records
from ablations.cell_figures import Cells, disagreeing, figures
from ablations.cells import Ablation, read_ablation
from ablations.statistics import summarize
from rich.console import Console
from safetensors.torch import load_file, save_file

from emloc_ray.io.runs.directory import RunDirectory

RATIO = "emulator.compression_ratio"
Write = Callable[..., Path]


def cells_of(ablation: Ablation, method: str) -> list[Any]:
    return [cell for cell in ablation.cells if cell.method == method]


def done(loss: float, **losses: float) -> dict[str, Any]:
    """A cell's figures."""
    known = {"original": 4.0, "emulator": 6.0, "emulator_adapter": 4.5, "uncorrected": loss + 0.1, "corrected": loss}
    kept = {"parameters_kept": 0.5, "bits_per_weight": 8.0}
    return {"losses": {**known, **losses}, "num_tokens": 9, **kept, "versions": {"torch": "2"}}


def test_records_are_paired_by_data_set_and_seed_and_tell_what_is_missing(write: Write) -> None:
    methods = [{"name": "lora", RATIO: 1.0}, {"name": "paper"}, {"name": "cut", "prune": "random"}]
    corrections = {"none": {"method": "none"}, "half": {"method": "covariance", "strength": 0.5}}
    ablation = read_ablation(write(methods=methods, corrections=corrections, grid={}, datasets=["code"]))
    cells = Cells(ablation, {("code", 0): {"train": "a"}, ("code", 1): {"train": "b"}})
    by_name = {(cell.method, cell.seed): cell for cell in ablation.cells}
    cells.write(by_name["lora", 0], done(3.0))
    cells.write(by_name["lora", 1], done(3.2))
    cells.write(by_name["paper", 0], done(3.5))
    cells.write_measured(by_name["paper", 0], {"none": 3.6, "half": 3.4})
    cells.write(by_name["cut", 1], done(4.4, original=5.0))
    assert cells.read(by_name["cut", 1]) is None  # its adapter is gone before it was measured
    run = RunDirectory(by_name["cut", 1].config.run_dir)
    run.create({})
    scores = {variant: {"loss": loss} for variant, loss in done(4.4, original=5.0)["losses"].items()}
    run.write_metrics({"evaluation": {**scores, "corrected": {"loss": 4.3}}})
    assert cells.read(by_name["cut", 1]) is None  # another adapter was trained there since
    run.write_metrics({"evaluation": scores})
    assert cells.is_to_be_measured(by_name["cut", 1])
    cells.write_measured(by_name["cut", 1], {"original": 4.0, "recovered": 3.6})
    found = records.collect(ablation, cells, {by_name["paper", 1].name: "memory ran out"})
    shown = {(r["method"], r["seed"], r["correction"]): r for r in found}
    assert len(found) == len(shown) == 2 + 2 + 2 * 3
    assert shown["lora", 1, None]["gap_closed"] == 1
    assert shown["paper", 0, "projection"]["gap_closed"] == pytest.approx(0.5)
    assert shown["paper", 0, "projection"]["gap_closed_uncorrected"] == pytest.approx(0.4)
    assert shown["paper", 0, "projection"]["gap_closed_by_emulator"] == pytest.approx(-0.5)
    assert shown["paper", 0, "half"]["gap_closed"] == pytest.approx(0.6)
    assert shown["paper", 0, "half"]["losses"]["corrected"] == 3.4
    assert shown["cut", 1, None]["gap_closed"] == pytest.approx(0.5)
    assert shown["cut", 1, None]["losses"] == {"original": 4, "emulator": 5, "emulator_adapter": 4.5, "corrected": 3.6}
    for key in (("paper", 1, "projection"), ("paper", 1, "half"), ("cut", 0, None)):
        assert (shown[key]["status"], shown[key]["gap_closed"]) == ("missing", None)
    assert shown["paper", 1, "none"]["reason"] == "memory ran out"
    assert "not run yet" in shown["cut", 0, None]["reason"]


def test_a_cell_counts_by_the_adapter_that_it_ends_with(write: Write) -> None:
    methods = [{"name": "lora", RATIO: 1.0}, {"name": "exact", "finetune": {"exact_steps": 2}}]
    ablation = read_ablation(write(methods=methods, grid={}, datasets=["code"], seeds=[0]))
    cells = Cells(ablation, {})
    for cell in ablation.cells:
        cells.write(cell, done(3.0) if cell.method == "lora" else done(3.5, finished=3.2))
    [exact] = [record for record in records.collect(ablation, cells, {}) if record["method"] == "exact"]
    assert (exact["loss"], exact["gap_closed"]) == (3.2, pytest.approx(0.8))


def test_figures_of_other_settings_or_rows_count_as_missing(write: Write) -> None:
    ablation = read_ablation(write())
    cell = ablation.cells[0]
    rows = {"train": "a", "eval": "b", "calibration-own": "c"}

    def with_rows(ablation: Ablation, rows: dict[str, str]) -> Cells:
        return Cells(ablation, {(cell.dataset, cell.seed): rows})

    with_rows(ablation, rows).write(cell, done(3.0))
    assert with_rows(ablation, rows).read(cell) is not None
    assert with_rows(ablation, {**rows, "calibration-shuffled": "d"}).read(cell) is not None  # which it does not read
    assert with_rows(ablation, {**rows, "eval": "d"}).read(cell) is None
    assert with_rows(ablation, {**rows, "calibration-own": "d"}).read(cell) is None
    for override in ("finetune.max_steps=7", "data.train.num_samples=7"):
        other = read_ablation(write(), [override])
        assert with_rows(other, rows).read(other.cells[0]) is None, override


def test_figures_of_other_weights_or_another_adapter_count_as_missing(write: Write, tmp_path: Path) -> None:
    vera = [{"name": "lora", RATIO: 1.0}, {"name": "vera", "adapter.method": "vera"}]
    wide = [{"name": "lora", RATIO: 1.0}, {"name": "vera", "adapter": {"method": "vera", "r": 8}}]
    ablation = read_ablation(write(methods=vera, grid={}))
    [cell, *_] = cells_of(ablation, "vera")
    Cells(ablation, {}).write(cell, done(3.0))
    assert Cells(ablation, {}).read(cell) is not None
    other = read_ablation(write(methods=wide, grid={}))
    assert Cells(other, {}).read(cells_of(other, "vera")[0]) is None  # r is 256 where nothing is said
    model = shutil.copytree(cell.config.model.source, tmp_path / "model")
    moved = read_ablation(write(methods=vera, grid={}), [f"model.source={model}"])
    [same, *_] = cells_of(moved, "vera")
    assert Cells(moved, {}).read(same) is not None
    shard, *_ = model.glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    assert Cells(moved, {}).read(same) is None


def test_a_pruned_model_follows_from_its_kind_and_structured_ones_from_calibration(write: Write) -> None:
    methods = [{"name": "lora", RATIO: 1.0}, *({"name": kind, "prune": kind} for kind in ("random", "structured"))]
    ablation = read_ablation(write(methods=methods, grid={"calibration.num_calibration_samples": [4, 8]}, seeds=[0]))
    rows = {("summaries", 0): {"calibration-own": "a"}, ("code", 0): {"calibration-own": "b"}}
    cells = Cells(ablation, rows)
    digests = {
        kind: {cells.pruned_digest(cell) for cell in cells_of(ablation, kind)} for kind in ("random", "structured")
    }
    assert len(digests["random"]) == 1
    assert len(digests["structured"]) == 4
    assert not digests["random"] & digests["structured"]
    shorter = Cells(read_ablation(write(methods=methods, grid={}, seeds=[0]), ["data.max_seq_length=32"]), rows)
    longer = Cells(read_ablation(write(methods=methods, grid={}, seeds=[0])), rows)
    for kind, differs in (("random", False), ("structured", True)):
        one, other = (made.pruned_digest(cells_of(made.ablation, kind)[0]) for made in (shorter, longer))
        assert (one != other) == differs


def test_what_was_measured_on_another_adapter_counts_as_missing(write: Write) -> None:
    ablation = read_ablation(write(corrections={"none": {"method": "none"}}))
    cells, [cell, *_] = Cells(ablation, {}), cells_of(ablation, "paper")
    cells.write(cell, done(3.0))
    cells.write_measured(cell, {"none": 3.1})
    assert cells.measured(cell) == {"none": 3.1}
    cells.write(cell, done(2.9))
    assert cells.measured(cell) is None


def test_healing_from_the_cache_says_nothing_of_its_time() -> None:
    usage = {"wall_s": 3.0}
    metrics = {
        "versions": {},
        "stages": {"heal": usage, "finetune": usage},
        "planned_memory": {"heal": 1, "finetune": 2, "inference": 3},
        "correction": {"method": "none", "clamp": None, "strength": 1.0},
        "evaluation": {"original": {"loss": 4.0, "num_tokens": 9}},
        "emulator": {"parameters_kept": 0.5, "bits_per_weight": 8.0},
    }
    assert figures(metrics)["training"] == {"wall_s": 6.0, "planned_bytes": 2}
    metrics["stages"] = {"heal": {**usage, "taken_from": "another"}, "finetune": usage}
    assert figures(metrics)["training"]["wall_s"] is None


def test_what_two_files_ask_for_is_one_run(write: Write, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    ours = read_ablation(write(shared=shared, corrections={"none": {"method": "none"}}))
    [known] = cells_of(ours, "lora")[:1]
    compressed = cells_of(ours, "paper")[0]
    cells = Cells(ours, {})
    for cell in (known, compressed):
        cells.write(cell, done(3.0))
    methods = [{"name": "lora", RATIO: 1.0}, {"name": "renamed"}]
    theirs = read_ablation(write(shared=shared, run_dir=str(tmp_path / "other"), methods=methods))
    found = Cells(theirs, {})
    same = next(cell for cell in cells_of(theirs, "renamed") if cell.point == compressed.point)
    assert found.read(cells_of(theirs, "lora")[0]) is not None
    assert found.read(same) is not None
    assert found.run_of(same).run_dir == compressed.config.run_dir != same.config.run_dir
    assert theirs.data_dir("code", 0) == ours.data_dir("code", 0)
    assert theirs.batch.cache.path == ours.batch.cache.path == str(tmp_path / "shared" / "cache")
    alone = read_ablation(write(methods=methods, run_dir=str(tmp_path / "alone")))
    assert Cells(alone, {}).read(cells_of(alone, "lora")[0]) is None


def test_what_is_published_holds_numbers_config_and_versions_and_no_place(write: Write, tmp_path: Path) -> None:
    ablation = read_ablation(write())
    cells = Cells(ablation, {})
    cells.write(ablation.cells[0], done(3.0))
    found = records.collect(ablation, cells, {})
    rows = summarize(found, records.label_keys(ablation), {})
    published = records.published(ablation, cells, found, rows)
    text = json.dumps(published)
    assert str(tmp_path) not in text
    assert '"torch": ["2"]' in text
    assert "run_dir" not in text


def test_published_cells_are_taken_where_the_inputs_are_the_same(write: Write, tmp_path: Path) -> None:
    corrections = {"none": {"method": "none"}}
    ours = read_ablation(write(corrections=corrections))
    rows = {(cell.dataset, cell.seed): {"train": "a"} for cell in ours.cells}
    cells, compressed = Cells(ours, rows), cells_of(ours, "paper")[0]
    cells.write(compressed, done(3.0))
    cells.write_measured(compressed, {"none": 3.1})
    known = cells.known()

    elsewhere = read_ablation(write(corrections=corrections, run_dir=str(tmp_path / "elsewhere")))
    found, same = Cells(elsewhere, rows), cells_of(elsewhere, "paper")[0]
    assert found.take(known) == 2
    assert found.take(known) == 0
    assert found.read(same) == {key: value for key, value in done(3.0).items() if key != "run_dir"}
    assert found.measured(same) == {"none": 3.1}
    found.measured_path(same).unlink()
    assert found.read(same) is None  # its adapter is not here to be measured

    other = Cells(elsewhere, {place: {"train": "b"} for place in rows})
    assert other.take(known) == 0
    assert other.read(same) is None


def test_an_aligned_model_is_another_than_the_pruned_one_that_it_is_made_from(write: Write) -> None:
    both = [{"name": "cut", "prune": "structured"}, {"name": "aligned", "prune": "structured", "align": "prose"}]
    asked: dict[str, Any] = {"methods": [{"name": "lora", RATIO: 1.0}, *both], "seeds": [0], "datasets": ["code"]}
    ablation = read_ablation(write(**asked))
    one, other = (Cells(ablation, {("code", 0): {"healing-prose": content}}) for content in "ab")
    cut, aligned = (cells_of(ablation, name)[0] for name in ("cut", "aligned"))
    assert len({one.digest(cut), one.digest(aligned), other.digest(aligned)}) == 3
    assert one.digest(cut) == other.digest(cut)
    assert one.pruned_digest(cut) == one.pruned_digest(aligned)
    shorter = cells_of(read_ablation(write(**asked), ["data.max_seq_length=16"]), "aligned")[0]
    assert len({one.aligned_digest(aligned), other.aligned_digest(aligned), one.aligned_digest(shorter)}) == 3


def test_figures_of_other_code_count_as_missing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    ablation = read_ablation(write(methods=[{"name": "lora", RATIO: 1.0}, {"name": "cut", "prune": "random"}]))
    cells = Cells(ablation, {})
    before = [(cells.digest(cell), cells.pruned_digest(cell)) for cell in ablation.cells]
    cells.write(ablation.cells[0], done(3.0))
    monkeypatch.setattr(cell_figures, "CODE", "another")
    after = [(cells.digest(cell), cells.pruned_digest(cell)) for cell in ablation.cells]
    assert not set(sum(before, ())) & set(sum(after, ()))
    assert cells.read(ablation.cells[0]) is None


def test_results_that_disagree_are_told_from_others() -> None:
    ours, theirs = {"losses": {"corrected": 3.0}}, {"losses": {"corrected": 3.1}}
    published = {"old": {"a": ours, "b": ours}, "new": {"a": theirs, "c": ours}, "other": {"b": ours, "d": theirs}}
    assert disagreeing(published) == ["new", "old"]
    assert disagreeing({name: published[name] for name in ("new", "other")}) == []


def test_no_figure_is_taken_from_results_that_disagree(write: Write, tmp_path: Path) -> None:
    ablation = read_ablation(write(datasets=["code"], seeds=[0], grid={}))
    cells, (bound, paper, fixed) = Cells(ablation, {}), ablation.cells
    for cell, loss in ((bound, 3.0), (paper, 3.5), (fixed, 3.6)):
        cells.write(cell, done(loss))
    known = cells.known()
    old = {name: known[name] for name in (cells.digest(bound), cells.digest(paper))}
    new = {cells.digest(paper): done(3.4)}
    other = {cells.digest(fixed): known[cells.digest(fixed)]}
    elsewhere = read_ablation(write(datasets=["code"], seeds=[0], grid={}, run_dir=str(tmp_path / "elsewhere")))
    console = Console(file=io.StringIO(), width=400)
    published = {name: {"cells": held} for name, held in {"new": new, "old": old, "other": other}.items()}
    assert run(elsewhere, console, only_collect=True, published={**published, "speed": {}}) == 1
    found = Cells(elsewhere, {})
    assert [found.read(cell) is not None for cell in elsewhere.cells] == [False, False, True]
    assert "No figure is taken from new.json, old.json: " in console.file.getvalue()  # type: ignore[attr-defined]
