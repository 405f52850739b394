"""What stands of an earlier config, or behind a stage that is redone, is not shown as done and not handed on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_calls import invoke

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import CARD, RunDirectory
from emloc_ray.io.store.atomic import write_bytes
from emloc_ray.ui.cards import write_cards
from emloc_ray.ui.publishing import part_folder, result_name

STEPS = ["data", "calibrate", "factorize", "finetune", "correct", "finish", "merge", "evaluate"]
FOLDERS = {"correct": "adapter", "finish": "adapter_finished", "merge": "merged"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run all of whose stages are done."""
    directory = RunDirectory(tmp_path / "mine")
    directory.create({}, steps=STEPS)
    for step in STEPS:
        file = directory.path(FOLDERS.get(step, step), "weights")
        write_bytes(file, b"1")
        directory.commit(step, "key", [file], {"usage": {"wall_s": 2.0, "peak_pss_bytes": 2**30}})
    return directory


def marks(run: RunDirectory) -> dict[str, str]:
    """What ``status`` says of each stage: its mark, and the words after its name where it is not done."""
    shown = invoke("status", str(run.root))
    assert shown.exit_code == 0, shown.output
    rows = [line.split(maxsplit=2) for line in shown.output.splitlines() if line[:1] in "✓·"]
    return {stage: "✓" if mark == "✓" else rest for mark, stage, rest in rows}


def test_a_redo_that_was_killed_leaves_no_stage_behind_it_done(run: RunDirectory) -> None:
    assert set(marks(run).values()) == {"✓"}
    assert [result_name(run, "adapter"), result_name(run, "merged")] == ["adapter_finished", "merged"]
    assert [part_folder(run, part) for part in ("adapter", "emulator")] == ["adapter_finished", "emulator"]
    run.forget("factorize")
    run.commit("factorize", "other key", [], {"usage": {"wall_s": 2.0, "peak_pss_bytes": 2**30}})
    run.forget("finetune")
    assert marks(run) == {
        **dict.fromkeys(STEPS[:3], "✓"),
        "finetune": "not done",
        **dict.fromkeys(STEPS[4:], "out of date"),
    }
    for part, folder in (("adapter", "adapter"), ("merged", "merged")):
        with pytest.raises(ConfigError, match=f"^{folder}/ in .*mine is out of date: run it up to there, emloc-ray"):
            result_name(run, part)  # type: ignore[arg-type]
    write_cards(run)
    assert not any(run.path(folder, CARD).exists() for folder in FOLDERS.values())


def test_a_run_that_is_never_merged_is_not_told_to(run: RunDirectory) -> None:
    run.create({"adapter": {"method": "prefix_tuning"}}, steps=[step for step in STEPS if step != "merge"])
    with pytest.raises(
        ConfigError, match="has no merged/, as prefix tuning changes no weight: use adapter/, by PEFT on"
    ):
        result_name(run, "merged")


def test_a_stage_that_the_config_leaves_out_now_is_none_of_its_results(run: RunDirectory) -> None:
    run.create({}, steps=[step for step in STEPS if step != "finish"])
    assert marks(run) == {step: "✓" if step != "finish" else "out of date" for step in STEPS}
    assert result_name(run, "adapter") == "adapter"
    write_cards(run)
    assert [run.path(folder, CARD).exists() for folder in FOLDERS.values()] == [True, False, True]
