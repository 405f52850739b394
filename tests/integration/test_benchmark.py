"""The benchmarks that the README's tables come from, at a small size: what they publish is what its tables are made of."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark
import pytest
from ablations.tables import render
from benchmarks import (
    allocation,
    data_path,
    figures,
    many_tasks,
    memory,
    methods,
    offloading,
    selection,
    whole_runs,
    within_inference,
)
from faulting.task import make_config
from gguf_files import write_gguf
from small_runs import task_rows, write_jsonl
from tiny import make_model, make_tokenizer

from emloc_ray.io.formats.yaml_text import read_yaml, write_yaml
from emloc_ray.planning.machine import cpu_capabilities, has_bfloat16
from emloc_ray.stages.correct.search import AUTO

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "pipelines" / "results"
SMALL = {
    "calibration": {"num_workers": 1},
    "emulator": {"num_workers": 1, "healing": {"steps": 2, "r": 2}},
    "finetune": {"max_steps": 4, "cpus_per_worker": 1, "learning_rate": 5e-3},
    "correction": {"num_selection_samples": 4, "max_share": None},
    "merge": {"cpus_per_worker": 1},
    "evaluation": {"num_workers": 1, "num_samples": 16, "num_exact_match": 0, "num_generations": 0},
}

LITTLE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def publish(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """``publish(name)``: what ``benchmark.py NAME --publish`` published, and all its figures, of a small model and task."""
    write_gguf(tmp_path / "model.gguf")
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(240))
    config = tmp_path / "small.yaml"
    values = {
        "base": str(ROOT / "configs" / "docstrings.yaml"),
        "model": {"source": str(tmp_path / "model.gguf")},
        "data": {"generate": None, "train": {"path": str(rows)}},
        **SMALL,
    }
    config.write_text(write_yaml(values))
    monkeypatch.setattr(figures, "DOCSTRINGS", config)
    monkeypatch.setattr(whole_runs, "QUICKSTART", config)
    monkeypatch.setattr(within_inference, "LOW_RANK", config)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")

    def run(names: str) -> tuple[dict[str, Any], dict[str, Any]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *names.split(), "--publish", "--out", "out"])
        benchmark.main()
        (file,) = (tmp_path / "results").iterdir()
        published = json.loads(file.read_text())
        assert published["command"] == f"python pipelines/benchmark.py {names}"
        return published, json.loads((tmp_path / "out" / "benchmark.json").read_text())

    return run


def header(result: dict[str, Any]) -> str:
    return render(result).splitlines()[0]


def little_config(folder: Path) -> Path:
    """The small task with a narrower model and less of everything."""
    config = make_config(folder, hidden_size=32)
    write_jsonl(folder / "rows.jsonl", task_rows(240))
    values = read_yaml(config.read_text())
    values["calibration"] |= {"num_calibration_samples": 16, "rows_per_shard": 8}
    values["emulator"]["healing"] = {"steps": 2, "r": 2}
    values["correction"] = {"method": "projection"}
    values["evaluation"] |= {"num_samples": 8, "num_exact_match": 0, "num_generations": 0}
    config.write_text(write_yaml(values))
    return config


def committed(name: str) -> dict[str, Any]:
    return json.loads((COMMITTED / name).read_text())


def test_every_published_table_is_made_by_a_test_and_by_the_command_that_it_names() -> None:
    source = Path(__file__).read_text()
    made = set(re.findall(r"""publish\("(\w+)"\)""", source)) | {"gpu"}  # tests/integration/test_gpu_benchmark.py
    assert benchmark.PUBLISHED.keys() == made
    assert benchmark.TABLES.keys() == set(re.findall(r"""publish\(" "\.join\(benchmark\.TABLES\["([\w.]+)""", source))
    commands = {table: " ".join(parts) for table, parts in benchmark.TABLES.items()}
    commands |= {file: part for part, file in benchmark.PUBLISHED.items() if (COMMITTED / file).exists()}
    for file, parts in commands.items():
        assert committed(file)["command"] == f"python pipelines/benchmark.py {parts}"


def test_speed(publish: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LAYERS", ("256x512",))
    for name, few in {
        "DEPTH": 1,
        "ROWS": 32,
        "REPEATS": 1,
        "TIMES": (2,),
        "SIZES": {"small": (8, 1, 8), "large": (16, 4, 16)},
    }.items():
        monkeypatch.setattr(whole_runs, name, few)
    monkeypatch.setattr(offloading, "LARGE", LITTLE)
    monkeypatch.setattr(offloading, "DEPTH", 2)
    monkeypatch.setattr(offloading, "SHAPE", (1, 16))
    published, found = publish(" ".join(benchmark.TABLES["speed.json"]))
    assert header(published) == header(committed("speed.json"))
    lines = {what: line for part in published["parts"].values() for what, line in part.items()}
    assert lines == found
    assert all(line["ours"] > 0 and line["baseline"] > 0 for what, line in lines.items() if "Ray" not in what)
    shown = committed("speed.json")["parts"]
    assert list(shown) == list(published["parts"])
    for part in shown.keys() - {"layers"}:
        assert [what for what in shown[part] if "4 ×" not in what] == list(published["parts"][part])


def test_many_tasks(publish: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"TASKS": 2, "STEPS": 2, "SLEEPERS": (2, 4, 8), "SLEEPING_CPUS": 2, "TRAININGS": 1}
    for name, value in {**few, "make_config": little_config}.items():
        monkeypatch.setattr(many_tasks, name, value)
    published, found = publish(" ".join(benchmark.TABLES["tasks.json"]))
    assert header(published) == header(committed("tasks.json"))
    assert {what: line for part in published["parts"].values() for what, line in part.items()} == found
    assert all(line["ours"] > 0 and line["baseline"] > 0 for what, line in found.items() if "scheduling" not in what)
    assert {name: len(part) for name, part in published["parts"].items()} == {
        name: len(part) for name, part in committed("tasks.json")["parts"].items()
    }


def test_rows_of_any_number(publish: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_path, "POWERS", (1, 2))
    published, found = publish(" ".join(benchmark.TABLES["data.json"]))
    assert header(published) == header(committed("data.json"))
    (lines,), (shown,) = published["parts"].values(), committed("data.json")["parts"].values()
    assert lines == found
    assert [what.replace("10^2", "10^6") for what in lines] == list(shown)
    assert all(line["ours"] > 0 and line["baseline"] > 0 for line in lines.values())


def test_better_ranks(publish: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "WAYS", (("sensitivity", "predictions", "pivoted"),))
    published, found = publish("allocation")
    assert header(published) == header(committed("better_ranks.json"))
    assert [(row["ranks"], row["factors"]) for row in published["rows"]] == [
        ("uniform", "activations"),
        ("sensitivity", "predictions, pivoted"),
    ]
    losses = [row["losses"][str(ratio)] for row in published["rows"] for ratio in allocation.RATIOS]
    assert all(loss > 0 for loss in losses)
    assert len(set(losses)) == len(losses)
    assert all(
        line["baseline"] == pytest.approx(losses[n] - published["original"], abs=2e-3)
        for n, line in enumerate(found.values())
    )


def test_memory(publish: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", LITTLE)
    monkeypatch.setattr(memory, "BATCHES", (1,))
    published, found = publish("memory")
    large = "bfloat16" if has_bfloat16(cpu_capabilities()) else "float32"
    assert [row["model"] for row in published["rows"]] == [
        f"{memory.MODELS[0]}, float32",
        f"{memory.MODELS[1]}, {large}",
    ]
    peaks = [row["mib"]["1"] for row in published["rows"]]
    assert all(peak > 0 for both in peaks for peak in both)
    assert [[line["ours"], line["baseline"]] for line in found.values()] == peaks
    assert "1 row" in header(published)


def test_shapes_are_the_committed_ones(publish: Callable[[str], Any]) -> None:
    published, _ = publish("shapes")
    assert published == committed("paper_shapes.json")


def test_quickstart(publish: Callable[[str], Any]) -> None:
    published, found = publish("quickstart")
    assert header(published) == header(committed("quickstart.json"))
    losses = {row["what"].partition(" (")[0]: row["loss"] for row in published["rows"]}
    assert losses["LoRA on the original"] < losses["original"]
    gap = losses["original"] - losses["LoRA on the original"]
    for row in published["rows"]:
        assert row["gap_closed"] == pytest.approx((losses["original"] - row["loss"]) / gap)
    assert found["quickstart wall time"]["ours"] > 0


def test_stages_within_inference(publish: Callable[[str], Any]) -> None:
    published, found = publish("within")
    lines = render(published).splitlines()
    assert len(lines) == 2 + len(published["rows"]) + 1
    assert lines[-1].startswith("| inference |")
    assert {"gradients", "finetune", "evaluate"} <= {row["stage"] for row in published["rows"]}
    assert [figure["ours"] for figure in found.values()] == [row["measured"][0] for row in published["rows"]]
    assert all(row["seconds"][0] > 0 for row in published["rows"])


def test_methods(publish: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "random"
    make_model("llama", num_hidden_layers=4, max_position_embeddings=512).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    small = (
        f"model.source={place}",
        "unrounded=false",
        "rows={train: 16, selection: 4, eval: 6, calibration: 8}",
        "calibration.num_calibration_samples=8",
        "data.max_seq_length=400",
        "finetune.max_steps=2",
    )
    monkeypatch.setattr(methods, "SETTINGS", (*methods.SETTINGS, *small))
    few = {"frontier.yaml": ("lora", "int2"), "rivals.yaml": ("lora", "pruned_half_nf4")}
    monkeypatch.setattr(methods, "METHODS", few)
    published, found = publish("methods")
    assert header(published) == header(committed("methods.json"))
    lora, two, pruned = published["rows"]
    assert [row["method"] for row in published["rows"]] == ["lora", "int2", "pruned_half_nf4"]
    assert lora["made_s"] is None
    assert two["made_s"] > 0
    assert max(two["bits_per_weight"], pruned["bits_per_weight"]) < lora["bits_per_weight"]
    assert all(row["tokens_per_s"] > 0 and row["held_mib"] > 0 for row in published["rows"])
    assert [line["baseline"] for line in found.values()] == [lora["held_mib"]] * 2
    assert sum(len(names) - 1 for names in methods.METHODS.values()) == len(found)


def test_selection(publish: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "random"
    make_model("llama", num_hidden_layers=2, max_position_embeddings=512).save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    small = (
        f"model.source={place}",
        "unrounded=false",
        "rows={train: 32, selection: 12, eval: 6, calibration: 8}",
        "correction.num_selection_samples=12",
        "calibration.num_calibration_samples=8",
        "data.max_seq_length=400",
        "finetune={max_steps: 6, learning_rate: 1e-2}",
    )
    monkeypatch.setattr(selection, "SETTINGS", (*selection.SETTINGS, *small))
    monkeypatch.setattr(selection, "METHODS", ("int2",))
    published, found = publish("selection")
    assert header(published) == header(committed("selection.json"))
    (row,) = published["rows"]
    assert row["rows"] == 12
    assert row["gap"] > 0
    assert [correction["method"] for correction in row["corrections"]] == [c.method for c in AUTO[1:]]
    for correction in row["corrections"]:
        # A model that is corrected is another one, which moves what each row loses.
        assert all(0 < correction[kind]["error_at_64"] < math.inf for kind in ("labels", "predicted"))
        assert correction["labels"]["gain"] <= row["best"]
    assert list(row["draws"]["labels"]) == ["3", "6"]
    assert all(0 <= drawn["worse"] <= 1 for drawn in row["draws"]["both"].values())
    assert [line["baseline"] for line in found.values()] == [row["best"]]


def test_methods_are_each_listed_once_and_have_a_published_gap() -> None:
    names = [name for number, those in enumerate(methods.METHODS.values()) for name in those[number > 0 :]]
    assert len(set(names)) == len(names)
    assert [row["method"] for row in committed("methods.json")["rows"]] == names
