"""An ablation's file: which cells it makes, and every error told before anything starts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ablations import runs
from ablations.cells import Ablation, read_ablation

from emloc_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "configs" / "ablations").glob("*.yaml") if path.name != "base.yaml")
RATIO = "emulator.compression_ratio"
Write = Callable[..., Path]


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
    assert ablation.overrides == {"finetune.max_steps": 9}


@pytest.mark.parametrize(
    ("given", "told"), [("seed=5", r"seed: .*give seeds=\[…\]"), ("data.format=text", "has its own")]
)
def test_an_override_that_would_change_nothing_is_refused(given: str, told: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=told):
        read_ablation(write(), [given])


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
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "align": "prose"}]},
            "method x has align, which trains what pruning kept: add prune to it",
        ),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "prune": "random", "align": "code"}]},
            "method x aligns on code, a data set itself",
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
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "prune": "random", "start": "weights"}]},
            "method x has prune and start",
        ),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", RATIO: 1.0, "start": "weights"}]},
            "method x has a start, and its emulator is the original: set emulator.quantization",
        ),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "start": "weights", "adapter.method": "dora"}]},
            "method x has a start, which is of LoRA of one rank on all linears",
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
    assert "layers, and the first and the last have to stay" in line


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
