"""Fixtures of the integration tests: finished runs that several tests read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, ON_RAY, save
from image_rows import serve, write_image_rows
from plain_runs import plain_run
from small_runs import (
    HEALING,
    WEIGHED,
    FinishedRun,
    make_values,
    run_values,
    task_rows,
    write_jsonl,
)
from vlms import save_vlm


@pytest.fixture(scope="session")
def make_run(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> Callable[..., FinishedRun]:
    """``make_run(data, family=…, dtype=…, **changes)``: a run from end to end."""

    def make(data: Path, family: str = "llama", dtype: str = "float32", /, **changes: Any) -> FinishedRun:
        model_dir = tiny_model_dir(family, dtype=dtype)
        root = tmp_path_factory.mktemp("runs") / f"{family}-{dtype}"
        values = make_values(root, model_dir, data, **changes)
        reporter = run_values(values)
        return FinishedRun(root, values, model_dir, reporter)

    return make


@pytest.fixture(scope="session")
def llama_run(make_run: Callable[..., FinishedRun], task_file: Path) -> FinishedRun:
    """A tiny Llama's run in float32; read it, or spoil a copy."""
    return make_run(task_file)


@pytest.fixture(scope="session")
def healed_run(llama_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The Llama's run with healing, in a copy of its directory."""
    copied = llama_run.copy(tmp_path_factory.mktemp("healed"))
    values = copied.changed(emulator={"healing": HEALING})
    return FinishedRun(copied.root, values, copied.model_dir, run_values(values))


@pytest.fixture(scope="session")
def pivoted_run(make_run: Callable[..., FinishedRun], task_file: Path) -> FinishedRun:
    """A tiny Qwen2's run, which has biases, by sensitivity and predictions; read it, or spoil a copy."""
    return make_run(task_file, "qwen2", emulator={**WEIGHED, "storage": "pivoted"})


@pytest.fixture(scope="session")
def family_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], FinishedRun]]:
    """``family_run(name)``: a family's run, from a checkpoint as transformers saves it to the merged model; made once."""
    made: dict[str, FinishedRun] = {}
    servers: list[Any] = []

    def get(family: str) -> FinishedRun:
        if family not in made:
            root = tmp_path_factory.mktemp("family")
            if family in FAMILIES:
                model_dir = save(family, root / "model")
                rows = write_jsonl(root / "rows.jsonl", task_rows(64))
                changes: dict[str, Any] = {}
            else:
                model_dir = save_vlm(family, root / "model")
                (root / "rows").mkdir()
                server, url = serve(root / "rows")
                servers.append(server)
                rows = write_image_rows(root / "rows", url)
                ratios = {r".*(vision_tower|visual)\..*": 0.7}
                if family != "Gemma 3 (vision)":  # whose projector is no linear
                    ratios[r".*(projector|merger)\..*"] = 0.6
                data = {"format": "messages", "max_seq_length": 128, "image_hosts": ["127.0.0.1"]}
                changes = {"data": data, "emulator": {"ratios": ratios}}
            one = {"num_workers": 1}
            sections: dict[str, dict[str, Any]] = {
                "calibration": {**one, "num_calibration_samples": 16, "min_expert_tokens": 0},
                "emulator": one,
                "finetune": one,
                "correction": {"method": "covariance", "clamp": 0.05},  # which some columns exceed
                "merge": one,
                "evaluation": one,
            }
            for section, keys in changes.items():
                sections[section] = {**sections.get(section, {}), **keys}
            values = make_values(root / "run", model_dir, rows, **sections)
            if family in ON_RAY:
                request.getfixturevalue("ray_session")
                made[family] = FinishedRun(root / "run", values, model_dir, run_values(values))
            else:
                made[family] = plain_run(values, model_dir)
        return made[family]

    yield get
    for server in servers:
        server.shutdown()
