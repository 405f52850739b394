"""Committed ablations at a small size: all records are whole, and the same command again does nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ablation import run
from ablations import runs
from ablations.cells import Ablation, read_ablation
from rich.console import Console
from tiny import make_model, make_tokenizer

from emloc_ray.io.formats.yaml_text import read_yaml, write_yaml

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "ablations"
SMALL = [
    "data.max_seq_length=400",
    "datasets=[summaries]",
    "seeds=[0]",
    "rows={train: 16, selection: 4, eval: 6, calibration: 8}",
    "finetune.max_steps=2",
    "finetune.per_device_train_batch_size=2",
    "max_concurrent=4",
]
EIGHT = "calibration.num_calibration_samples=8"
# Those that differ in more than their runs' own keys, of each some of the methods.
FEWER = {
    "baselines": [
        EIGHT,
        "methods=[lora, nf4_lora, paper_auto, emloc_nf4, plain_svd, other_healing, layer_dropping, random_pruning,"
        " structured_pruning]",
    ],
    "calibration_size": [
        "grid.calibration.num_calibration_samples=[2, 8]",
        "compare_with={calibration.num_calibration_samples: 2}",
    ],
    "correction": [EIGHT, "methods=[lora, predictions]"],
    "degraded_calibration": [
        EIGHT,
        "calibrations={own: {}, shuffled: {shuffle: true}, prose_50: {foreign: prose, share: 0.5}}",
    ],
    "exact": [EIGHT, "methods=[lora, tuned_60, tuned_57_exact_3]"],
    "rivals": [EIGHT, "unrounded=false", "methods=[lora, int2, int2_cloq]"],
}
CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def small(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Ablation]:
    """A committed file with a random model of four blocks; what files share is made once."""
    root = tmp_path_factory.mktemp("ablations")
    make_model("llama", num_hidden_layers=4, max_position_embeddings=512).save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")

    def read(path: Path) -> Ablation:
        places = [f"model.source={root / 'model'}", f"run_dir={root / path.stem}", f"shared={root / 'shared'}"]
        return read_ablation(path, [*SMALL, *FEWER.get(path.stem, [EIGHT, "unrounded=false"]), *places])

    return read


def records_of(ablation: Ablation) -> list[dict[str, Any]]:
    return json.loads((ablation.root / "results.json").read_text())["records"]


@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"base", *FEWER}))
def test_all_cells_of_any_other_file_fit_their_model(small: Callable[[Path], Ablation], name: str) -> None:
    ablation = small(FOLDER / f"{name}.yaml")
    checked: list[tuple[int, int]] = []
    assert runs.check(ablation, lambda *at: checked.append(at)) > 0
    assert checked[-1][0] == checked[-1][1] > 0
    assert not ablation.root.exists()


@pytest.mark.parametrize("name", FEWER)
def test_a_committed_file_runs_and_again_does_nothing(
    small: Callable[[Path], Ablation], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation = small(FOLDER / f"{name}.yaml")
    assert run(ablation, CONSOLE) == 0
    records = records_of(ablation)
    corrected = sum(cell.compresses for cell in ablation.cells)
    assert len(records) == len(ablation.cells) + corrected * len(ablation.config.corrections)
    assert {record["cell"] for record in records} == {cell.name for cell in ablation.cells}
    for record in records:
        assert record["status"] == "done", record
        assert {"original", "emulator_adapter", "corrected"} <= record["losses"].keys()
        finished = "exact" in record["method"]
        assert record["loss"] == record["losses"]["finished" if finished else "corrected"]
        healed = record["method"] in ("other_healing", "emloc_nf4")
        stages = ["heal"] * healed + ["finetune"] + ["finish"] * finished
        if "cloq" in record["method"]:  # trained after its run
            assert record["training"]["wall_s"] > 0
        else:
            assert record["training"]["wall_s"] == sum(record["wall_s"][name] for name in stages)
        assert record["training"]["planned_bytes"] > 2**20
        assert {"torch", "peft", "transformers"} <= record["versions"].keys()
    # All were held against the same rows and the same bound.
    assert len({record["losses"]["original"] for record in records}) == 1
    assert len({record["upper_bound_loss"] for record in records}) == 1
    for cell in ablation.cells:
        assert not (ablation.root / "tasks" / cell.name / "merged").exists()

    written = {file: file.stat().st_mtime_ns for file in (ablation.shared / "cells").glob("*")}
    for name in ("run_batch", "prepare_batch", "measure_all", "pruned_models"):
        monkeypatch.delattr(runs, name)
    assert run(ablation, CONSOLE) == 0
    assert {file: file.stat().st_mtime_ns for file in (ablation.shared / "cells").glob("*")} == written
    assert records_of(ablation) == records


def test_what_was_lost_is_done_again_alone(small: Callable[[Path], Ablation]) -> None:
    ablation = small(FOLDER / "baselines.yaml")
    run(ablation, CONSOLE)
    before = {record["cell"]: record for record in records_of(ablation)}
    lost, *_ = (cell for cell in ablation.cells if cell.method == "random_pruning")
    cells = runs.known_data(ablation)
    cells.measured_path(lost).unlink()
    written = {file: file.stat().st_mtime_ns for file in (ablation.shared / "cells").glob("*")}
    assert run(ablation, CONSOLE, only_collect=True) == 1
    missing = [record for record in records_of(ablation) if record["status"] == "missing"]
    assert [record["cell"] for record in missing] == [lost.name]
    assert run(ablation, CONSOLE) == 0
    after = {record["cell"]: record for record in records_of(ablation)}
    assert after[lost.name]["loss"] == pytest.approx(before[lost.name]["loss"])
    assert written.items() <= {file: file.stat().st_mtime_ns for file in (ablation.shared / "cells").glob("*")}.items()


def test_pruned_models_are_scored_on_the_original(small: Callable[[Path], Ablation]) -> None:
    ablation = small(FOLDER / "baselines.yaml")
    run(ablation, CONSOLE)
    by_method = {record["method"]: record for record in records_of(ablation)}
    original = by_method["lora"]["losses"]["original"]
    for method in ("layer_dropping", "random_pruning", "structured_pruning"):
        record = by_method[method]
        assert record["losses"]["original"] == original
        assert record["losses"]["emulator"] != original  # the pruned model itself
        assert record["loss"] != original  # an adapter that was recovered does something
        assert 0 < record["parameters_kept"] <= 0.5


def test_a_smaller_model_is_held_against_the_original(ray_session: None, tmp_path: Path) -> None:
    for name, depth in (("original", 4), ("smaller", 2)):
        make_model("llama", num_hidden_layers=depth, max_position_embeddings=512).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    base = read_yaml((FOLDER / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(write_yaml(base | {"model": {"source": str(tmp_path / "original")}}))
    whole = {"emulator.compression_ratio": 1.0}
    smaller = {"name": "smaller", "model.source": str(tmp_path / "smaller")}
    methods = [{"name": "lora", **whole}, {**smaller, **whole}]
    values = {"base": "base.yaml", "run_dir": str(tmp_path / "run"), "upper_bound": "lora", "methods": methods}
    (tmp_path / "smaller.yaml").write_text(write_yaml({**values, "datasets": ["code"]}))
    learning = ["finetune.max_steps=8", "finetune.learning_rate=1e-2", "finetune.warmup_steps=0"]
    ablation = read_ablation(tmp_path / "smaller.yaml", [*SMALL, *learning])
    assert run(ablation, CONSOLE) == 0
    bound, found = (record["losses"] for record in records_of(ablation))
    assert found["original"] != bound["original"]  # its own model's
    gap = (bound["original"] - found["corrected"]) / (bound["original"] - bound["corrected"])
    assert records_of(ablation)[1]["gap_closed"] == pytest.approx(gap)
