"""An ablation's file: which cells it makes, and every error told before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablations import runs
from ablations.cells import Ablation, read_ablation

from emloc_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
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
    assert str(first.config.data.calibration.path).endswith("/run/data/summaries-0/calibration-own.jsonl")
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
        ({"base": "none.yaml"}, "none.yaml"),
        (
            {"methods": [{"name": "lora", RATIO: 1.0}, {"name": "x", "heal_on": "code", "emulator.healing.steps": 3}]},
            "method x heals on code, a data set itself",
        ),
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


def test_a_check_starts_and_writes_nothing(write: Write, tmp_path: Path) -> None:
    path = write(methods=[{"name": "lora", RATIO: 1.0}, {"name": "cut", "prune": "random"}])
    assert runs.check(read_ablation(path), lambda done, total: None) > 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"adapter\.target_modules"):
        runs.check(read_ablation(path, ["adapter.target_modules=no_such_linear"]), lambda done, total: None)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda path: path.name)
def test_a_committed_file_is_valid_and_carries_its_exact_command(path: Path) -> None:
    if path.name == "base.yaml":
        return
    assert read_ablation(path).cells
    head = path.read_text().split("base:")[0]
    assert f"python pipelines/ablation.py configs/ablations/{path.name}\n" in head
    assert "hours" in head or "minutes" in head
