"""An ablation's file: which cells it makes, and every error told before anything starts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablations import records, runs
from ablations.cell_figures import Cells, figures
from ablations.cells import Ablation, read_ablation
from ablations.statistics import summarize
from safetensors.torch import load_file, save_file

from emloc_ray.errors import ConfigError
from emloc_ray.io.run_directory import RunDirectory

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "configs" / "ablations").glob("*.yaml") if path.name != "base.yaml")
RATIO = "emulator.compression_ratio"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Write:
    """``write(**keys)``: a file of three methods at two ratios, some keys changed."""

    def written(**keys: Any) -> Path:
        base = {"model": {"source": str(tiny_model_dir())}, "data": {"max_seq_length": 64}}
        base |= {"calibration": {"num_calibration_samples": 64}, "correction": {"method": "projection"}}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        values = {
            "base": "base.yaml",
            "run_dir": str(tmp_path / "run"),
            "datasets": ["summaries", "code"],
            "seeds": [0, 1],
            "upper_bound": "lora",
            "methods": [
                {"name": "lora", RATIO: 1.0},
                {"name": "paper"},
                {"name": "fixed", "emulator": {"compression_ratio": 0.4}, "finetune.max_steps": 3},
            ],
            "grid": {RATIO: [0.5, 0.25]},
        }
        values = {key: value for key, value in {**values, **keys}.items() if value is not None}
        (tmp_path / "try.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "try.yaml"

    return written


def cells_of(ablation: Ablation, method: str) -> list[Any]:
    return [cell for cell in ablation.cells if cell.method == method]


def test_a_method_is_varied_by_what_it_does_not_fix_itself(write: Write) -> None:
    ablation = read_ablation(write(calibrations={"own": {}, "worse": {"shuffle": True}}))
    assert Counter(cell.method for cell in ablation.cells) == {"lora": 4, "paper": 16, "fixed": 8}
    assert {cell.config.emulator.compression_ratio for cell in cells_of(ablation, "fixed")} == {0.4}
    assert {cell.config.finetune.max_steps for cell in cells_of(ablation, "fixed")} == {3}
    assert {cell.config.seed for cell in ablation.cells} == {0, 1}
    assert len({cell.name for cell in ablation.cells}) == len(ablation.cells)
    first = cells_of(ablation, "paper")[0]
    assert first.name == "summaries-paper-compression_ratio=0.5-calibration=own-seed=0"
    assert first.config.data.format == "prompt_completion"
    assert Path(str(first.config.data.calibration.path)) == ablation.data_dir("summaries", 0) / "calibration-own.jsonl"
    assert cells_of(ablation, "lora")[-1].config.data.format == "text"


def test_overrides_go_to_the_file_or_to_every_run(write: Write) -> None:
    given = ["seeds=[7]", f"grid.{RATIO}=[0.3]", "finetune.max_steps=9", "rows.eval=5", "methods=[paper, lora]"]
    ablation = read_ablation(write(), given)
    assert [cell.method for cell in ablation.cells] == ["paper", "lora"] * 2
    assert {cell.config.finetune.max_steps for cell in ablation.cells} == {9}
    assert {cell.config.seed for cell in ablation.cells} == {7}
    assert cells_of(ablation, "paper")[0].config.emulator.compression_ratio == 0.3
    assert ablation.config.rows.eval == 5


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"run_dir": None}, "run_dir is missing: set it."),
        ({"methodes": []}, "methodes"),
        ({"datasets": ["prose"]}, "datasets.0 is 'prose'"),
        ({"seeds": [1, 1]}, "seeds holds 1 twice"),
        ({"upper_bound": "best"}, "upper_bound is 'best', which is no method (lora, paper, fixed)"),
        ({"upper_bound": "paper"}, f"upper_bound paper is not LoRA on the original: set its {RATIO} to 1.0"),
        ({"methods": [{"name": "a b"}]}, "the name 'a b' is no safe file name"),
        ({"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "finetune.max_stepz": 3}]}, "finetune.max_stepz"),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", RATIO: 1.0, "prune": "layers"}]},
            "leaves nothing out",
        ),
        ({"grid": {"emulator.ratioz": [1]}}, "emulator.ratioz"),
        ({"grid": {"seed": [1]}}, "grid.seed is what seeds is for"),
        ({"calibrations": {"odd": {"foreign": "code"}}}, "calibrations.odd takes rows of code, a data set itself"),
        ({"calibrations": {"odd": {"share": 0.5}}}, "share is that of foreign rows"),
        ({"compare_with": {"method": "other"}}, "compare_with.method is 'other', none of lora, paper, fixed"),
        ({"compare_with": {"ratio": 0.5}}, "compare_with.ratio is none of correction, method, calibration"),
        ({"compare_with": {"correction": "none"}}, "compare_with.correction is 'none', none of projection"),
        ({"corrections": {"projection": {"method": "none"}}}, "corrections.projection has the name of the runs' own"),
        ({"corrections": {"a": {"method": "auto"}}}, "corrections.a.method is 'auto'"),
        ({"rows": {"calibration": 8}}, "method paper takes 64 calibration rows of 8: raise rows.calibration"),
        ({"run_dir": "s3://bucket/x"}, "run_dir is on an object store"),
        ({"shared": "s3://bucket/x"}, "shared is on an object store"),
        ({"base": "none.yaml"}, "none.yaml"),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "heal_on": "code", "emulator.healing.steps": 3}]},
            "method x heals on code, a data set itself",
        ),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "prune": "random", "adapter.method": "dora"}]},
            "method x is pruned, and an adapter of dora cannot be recovered",
        ),
        (
            {
                "methods": [
                    {"name": "lora", RATIO: 1.0},
                    {"name": "x", "adapter.method": "ia3", "correction.method": "auto"},
                ],
                "corrections": {"none": {"method": "none"}},
            },
            "method x trains ia3, which adds to no weight: take corrections out",
        ),
        ({"rows": {"eval": 500}}, "rows.eval makes 500 rows and evaluation.num_samples reads 256 of them"),
    ],
)
def test_what_is_wrong_is_told(write: Write, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_ablation(write(**keys))
    assert told in str(caught.value)


def test_several_errors_are_told_at_once(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        read_ablation(write(), ["finetune.max_stepz=3", "emulator.ratioz=3"])
    assert "max_stepz" in str(caught.value)
    assert "ratioz" in str(caught.value)


def test_an_override_takes_no_point_of_the_grid_away_and_goes_before_methods(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"emulator\.compression_ratio is what the grid varies: give grid\.emulator"):
        read_ablation(write(), [f"{RATIO}=0.3"])
    assert read_ablation(write(), ["finetune.learning_rate=1e-3"]).notes == ()
    ablation = read_ablation(write(), ["finetune.max_steps=9"])
    assert ablation.notes == ("finetune.max_steps=9 goes before what the file says of fixed.",)
    assert {cell.config.finetune.max_steps for cell in ablation.cells} == {9}


def test_a_check_tells_what_cannot_be_pruned(write: Write, tiny_model_dir: Callable[..., Path]) -> None:
    methods = [{"name": "lora", RATIO: 1.0}, {"name": "cut", "prune": "layers"}]
    with pytest.raises(ConfigError) as caught:
        runs.check(read_ablation(write(methods=methods, grid={RATIO: [0.5, 0.25]})), lambda done, total: None)
    [line, *_] = str(caught.value).splitlines()
    assert line.startswith("summaries-cut-")
    assert "layers, of which the first and the last have to stay" in line


def test_a_check_starts_and_writes_nothing(write: Write, tmp_path: Path) -> None:
    path = write(methods=[{"name": "lora", RATIO: 1.0}, {"name": "cut", "prune": "random"}])
    assert runs.check(read_ablation(path), lambda done, total: None) > 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"adapter\.target_modules"):
        runs.check(read_ablation(path, ["adapter.target_modules=no_such_linear"]), lambda done, total: None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_file_is_valid_and_carries_its_exact_command(path: Path) -> None:
    assert read_ablation(path).cells
    head = path.read_text().split("base:")[0]
    assert f"python pipelines/ablation.py configs/ablations/{path.name}\n" in head
    assert "hours" in head or "minutes" in head


def done(loss: float, **losses: float) -> dict[str, Any]:
    """A cell's figures."""
    known = {"original": 4.0, "emulator": 6.0, "emulator_adapter": 4.5, "uncorrected": loss + 0.1, "corrected": loss}
    return {"losses": {**known, **losses}, "num_tokens": 9, "parameters_kept": 0.5, "versions": {"torch": "2"}}


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
    assert shown["cut", 1, None]["losses"] == {"original": 4, "emulator": 5, "emulator_adapter": 4.4, "corrected": 3.6}
    for key in (("paper", 1, "projection"), ("paper", 1, "half"), ("cut", 0, None)):
        assert (shown[key]["status"], shown[key]["gap_closed"]) == ("missing", None)
    assert shown["paper", 1, "none"]["reason"] == "memory ran out"
    assert "not run yet" in shown["cut", 0, None]["reason"]


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
    other = read_ablation(write(), ["finetune.max_steps=7"])
    assert with_rows(other, rows).read(other.cells[0]) is None


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


def test_a_smaller_model_has_the_originals_tokens_and_is_not_pruned(write: Write, tmp_path: Path) -> None:
    original = read_ablation(write()).bound.config.model.source
    model = shutil.copytree(original, tmp_path / "smaller")
    smaller = {"name": "smaller", "model.source": str(model), RATIO: 1.0}
    methods = [{"name": "lora", RATIO: 1.0}, smaller]
    ablation = read_ablation(write(methods=methods, grid={}))
    assert not any(map(ablation.has_the_original, cells_of(ablation, "smaller")))
    runs.check(ablation, lambda done, total: None)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    [token, other] = list(tokenizer["model"]["vocab"])[-2:]
    swapped = tokenizer["model"]["vocab"]
    swapped[token], swapped[other] = swapped[other], swapped[token]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"method smaller: .* has other tokens than the original"):
        runs.check(ablation, lambda done, total: None)
    cut = {**smaller, "prune": "layers", RATIO: 0.5}
    with pytest.raises(ConfigError, match=r"method smaller prunes .*: take model out of it"):
        read_ablation(write(methods=[methods[0], cut], grid={}))


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
        "emulator": {"parameters_kept": 0.5},
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
