"""What a changed config would redo or remove: said before anything starts, and not done unasked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_runs import make_values, task_rows, write_jsonl
from stage_artifacts import write_tokens

from emloc_ray.config.reading import parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.planning.memory import BASE_BYTES
from emloc_ray.planning.prepared import Prepared, prepare, splits_of
from emloc_ray.runs.batch.tasks import Task
from emloc_ray.runs.batch.work import PipelineWork
from emloc_ray.runs.changes import check_accepted, find_changes, is_finished, outdated_stage, unfinished
from emloc_ray.runs.run import run as run_pipeline
from emloc_ray.runs.status import current_stages
from emloc_ray.runs.versions import made_with, redone_from
from emloc_ray.stages.context import Context
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.tokens.stage import DATA
from emloc_ray.ui.shell import agrees

RESULT = {"usage": {"wall_s": 1.0, "peak_pss_bytes": 1}, "num_tokens": 1, "splits": {}}


@pytest.fixture
def values(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    rows = write_jsonl(tmp_path / "rows.jsonl", task_rows(40))
    values = make_values(tmp_path / "run", tiny_model_dir(), rows, finetune={"exact_steps": 2})
    return values


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> Prepared:
    return prepare(
        parse_config({**values, **{name: {**values.get(name, {}), **keys} for name, keys in sections.items()}})
    )


def finish(values: dict[str, Any], until: str = "evaluate") -> None:
    """A run whose stages up to this one are done, each with a file in what it writes."""
    prepared = changed(values)
    steps = [stage for stage in STEPS if stage.wanted(prepared)]
    written = (prepared.written_config or prepared.config).model_dump(mode="json")
    prepared.run.create(written, steps=[stage.name for stage in steps])
    context = Context(prepared, prepared.source.directory)
    for stage in steps[: [stage.name for stage in steps].index(until) + 1]:
        for output in stage.outputs:
            prepared.run.path(output).mkdir(parents=True, exist_ok=True)
            prepared.run.path(output, "a.json").write_text(stage.name)
        if stage is DATA:
            for split in splits_of(prepared.config):
                write_tokens(prepared.run.path("data", "tokens", split), 16, 8)
        context.made[stage.name] = key = fingerprint(stage.inputs(context))
        files = [prepared.run.path(output) for output in stage.outputs]
        prepared.run.commit(stage.name, key, files, RESULT, made_with(stage))


def write_config(prepared: Prepared) -> None:
    """Creates the run anew under another config, as a command does that goes on to run."""
    steps = [stage.name for stage in STEPS if stage.wanted(prepared)]
    prepared.run.create(prepared.config.model_dump(mode="json"), steps=steps, outdated=outdated_stage(prepared))


def test_the_same_config_changes_nothing(values: dict[str, Any]) -> None:
    assert find_changes(changed(values)) is None  # nothing is there yet
    finish(values)
    assert find_changes(changed(values)) is None


def test_a_run_is_finished_where_no_stage_is_left(values: dict[str, Any]) -> None:
    def finished(prepared: Prepared, forced: Collection[str] = (), until: str = VERBS[-1]) -> bool:
        return is_finished(prepared, unfinished(prepared, forced, until), until)

    assert not finished(changed(values))
    finish(values, until="finish")
    assert finished(changed(values), until="correct")  # the verb that both belong to
    assert not finished(changed(values))
    finish(values)
    assert finished(changed(values, evaluation={"num_workers": 1}))
    assert not finished(changed(values), redone_from("merge"))
    assert not finished(changed(values, finetune={"learning_rate": 1e-3}))
    assert not finished(changed(values, finetune={"exact_steps": 0}))  # which removes what they left
    changed(values).run.path("merged", "a.json").unlink()
    assert not finished(changed(values))


def test_what_is_left_is_what_a_changed_config_redoes(values: dict[str, Any]) -> None:
    finish(values)
    assert not unfinished(changed(values)).intersection(current_stages(changed(values).run.manifest()))
    last = {"finetune", "correct", "finish", "merge", "evaluate"}
    wanted = {stage.name for stage in STEPS if stage.wanted(changed(values))}
    assert unfinished(changed(values, finetune={"learning_rate": 1e-3})) & wanted == last
    assert unfinished(changed(values), redone_from("merge")) & wanted == {"merge", "evaluate"}
    shutil.rmtree(changed(values).run.path("calibration"))
    assert unfinished(changed(values)) & wanted == {"calibrate"}


def test_what_a_changed_config_redoes_is_checked_before_anything_is_removed(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(values)
    before = changed(values).run.manifest()
    values["memory_budget"] = BASE_BYTES
    values["data"] = {**values["data"], "max_seq_length": 32}
    monkeypatch.setattr("emloc_ray.runs.run.connection", None)  # it does not come to that
    with pytest.raises(ConfigError, match=r"memory_budget is .* before it reads a row: give it more"):
        run_pipeline(parse_config(values), accept_changes=True)
    assert changed(values).run.manifest() == before


def test_a_result_that_was_edited_is_named_with_what_is_made_anew_in_its_place(values: dict[str, Any]) -> None:
    finish(values)
    changed(values).run.path("adapter", "a.json").write_text("tcerroc")  # of the same size
    said = find_changes(changed(values)) or ""
    assert said.startswith(
        "adapter/a.json is not what correct wrote: that redoes correct, and of finish, merge, evaluate"
    )


def test_what_is_made_again_beside_a_change_is_named(values: dict[str, Any]) -> None:
    finish(values)
    run = changed(values).run
    run.path("calibration", "a.json").write_text("cut")
    run.path("emulator", "a.json").unlink()
    assert find_changes(changed(values)) is None  # as after a crash, nothing is asked
    asked = str(find_changes(changed(values, finetune={"learning_rate": 1e-3})))
    again = "again, missing or altered"
    assert asked.endswith(f"; calibrate makes calibration/a.json {again}; factorize makes emulator/a.json {again}")
    assert "emulator" not in str(find_changes(changed(values, emulator={"compression_ratio": 0.25})).partition(";")[2])


def test_what_is_written_beside_the_model_is_no_part_of_it(values: dict[str, Any], tmp_path: Path) -> None:
    place = Path(shutil.copytree(values["model"]["source"], tmp_path / "model"))
    values["model"] = {**values["model"], "source": str(place)}
    finish(values)
    (place / "eval_results.json").write_text("{}")
    assert find_changes(changed(values)) is None
    (place / "generation_config.json").write_text('{"top_k": 1}')
    assert find_changes(changed(values)) is not None


def test_what_redoes_nothing_is_not_asked_for(values: dict[str, Any]) -> None:
    finish(values)
    assert find_changes(changed(values, evaluation={"num_workers": 1}, finetune={"max_failures": 0})) is None
    assert (
        find_changes(changed(values, finetune={"save_steps": 1, "save_total_limit": 2, "log_level": "error"})) is None
    )
    words = {"logging_steps": 5, "logging_first_step": True, "save_strategy": "no", "project": "mine"}
    assert find_changes(changed(values, finetune={**words, "eval_delay": 2, "num_train_epochs": 3})) is None
    assert find_changes(changed(values, correction={"clamp": None, "strength": 0.5})) is None  # of auto
    assert find_changes(changed(values, correction={"method": "covariance", "strength": 0.5})) is not None


def test_what_a_correction_does_not_read_redoes_nothing(values: dict[str, Any]) -> None:
    plain = {**values, "correction": {"method": "none"}}
    finish(plain)
    assert find_changes(changed(plain, correction={"method": "none", "clamp": None, "strength": 0.5})) is None


def test_what_factors_keep_redoes_nothing_where_there_are_none(values: dict[str, Any]) -> None:
    whole = {**values, "emulator": {**values["emulator"], "compression_ratio": 1.0}}
    finish(whole)
    assert find_changes(changed(whole, emulator={"objective": "predictions", "gradient_dampening_frac": 0.1})) is None


def test_checkpoints_redo_what_is_scored_where_they_are(values: dict[str, Any]) -> None:
    scored = {**values, "finetune": {**values["finetune"], "eval_strategy": "steps"}}
    finish(scored)
    assert find_changes(changed(scored, finetune={"save_steps": 1})) is not None
    other = {**scored, "run_dir": values["run_dir"] + "-other", "finetune": {**scored["finetune"], "eval_steps": 2}}
    finish(other)
    assert find_changes(changed(other, finetune={"save_steps": 1})) is None


def test_a_changed_key_names_what_it_redoes_and_where_that_lies(values: dict[str, Any]) -> None:
    finish(values)
    changes = find_changes(changed(values, finetune={"learning_rate": 1e-3}))
    assert changes == (
        "the config has finetune.learning_rate 0.001 (was 0.005): that redoes finetune, and of correct, finish, merge, evaluate"
        " what follows from it (in adapter_emulator/, adapter/, adapter_finished/, merged/)"
    )


def test_what_is_left_out_is_removed(values: dict[str, Any]) -> None:
    finish(values)
    changes = find_changes(changed(values, finetune={"exact_steps": 0}))
    assert changes is not None
    assert "redoes merge, and of evaluate what" in changes
    assert "removes finish (in merged/, adapter_finished/)" in changes


def test_what_is_new_redoes_what_follows_from_it(values: dict[str, Any]) -> None:
    finish(values)
    changes = find_changes(changed(values, emulator={"healing": {"steps": 2, "r": 2}}))
    assert changes is not None
    assert "that redoes factorize, and" in changes  # healing takes ranks of it


def test_changed_rows_are_told_as_files(values: dict[str, Any], tmp_path: Path) -> None:
    finish(values)
    write_jsonl(tmp_path / "rows.jsonl", task_rows(50))
    changes = find_changes(changed(values))
    assert changes is not None
    assert changes.startswith("files of the model or the data changed: that redoes data, and of calibrate")


def test_what_is_asked_for_by_name_is_not_asked_again(values: dict[str, Any]) -> None:
    finish(values)
    prepared = changed(values, finetune={"learning_rate": 1e-3})
    assert find_changes(prepared, redone_from("finetune")) is None
    assert find_changes(prepared, redone_from("correct")) is not None
    asked = find_changes(prepared, ("factorize", "finetune"), until="finetune")
    assert str(asked).endswith("that makes correct, finish, merge, evaluate out of date")


def test_a_stage_that_is_redone_on_request_goes_before_others(values: dict[str, Any]) -> None:
    finish(values)
    assert find_changes(changed(values), ["factorize"]) is None
    assert find_changes(changed(values), redone_from("calibrate")[:1], until="calibrate") is None


def test_what_a_verb_does_not_reach_is_left_out_of_date(values: dict[str, Any]) -> None:
    finish(values)
    prepared = changed(values, calibration={"num_calibration_samples": 16})
    assert str(find_changes(prepared, until="calibrate")).endswith(
        "that redoes data, and of calibrate what follows from it and makes factorize, finetune, correct, finish, merge,"
        " evaluate out of date (in data/, calibration/)"
    )


def test_a_verb_before_the_changed_stage_leaves_what_follows_out_of_date(values: dict[str, Any]) -> None:
    finish(values)
    prepared = changed(values, emulator={"compression_ratio": 0.25})
    asked = find_changes(prepared, until="calibrate")
    assert asked == (
        "the config has emulator.compression_ratio 0.25 (was 0.5): that makes factorize, finetune, correct, finish, merge,"
        " evaluate out of date"
    )
    write_config(prepared)
    assert current_stages(prepared.run.manifest()) == ["data", "calibrate"]
    assert find_changes(prepared) is None  # which was agreed to


def test_what_was_out_of_date_stands_again_once_the_config_is_changed_back(values: dict[str, Any]) -> None:
    finish(values)
    everything = current_stages(changed(values).run.manifest())
    write_config(changed(values, finetune={"exact_steps": 0}))
    assert current_stages(changed(values).run.manifest())[-1] == "correct"
    write_config(changed(values))
    assert current_stages(changed(values).run.manifest()) == everything


def test_what_is_out_of_date_stands_once_it_is_made_anew_or_confirmed(values: dict[str, Any]) -> None:
    finish(values)
    run = changed(values).run
    for done in (lambda: run.commit("finetune", "key", [], RESULT), lambda: run.confirm("finetune", ahead=["data"])):
        write_config(changed(values, finetune={"learning_rate": 1e-3}))
        assert "finetune" not in current_stages(run.manifest())
        done()
        assert "finetune" in current_stages(run.manifest())


def test_files_that_are_gone_do_not_hide_what_changed(values: dict[str, Any]) -> None:
    """All but those of the last stage that writes any, one after another, from the end."""
    finish(values)
    for folder in ("merged", "adapter_finished", "adapter", "adapter_emulator", "emulator", "calibration", "data"):
        shutil.rmtree(changed(values).run.path(folder))
        assert find_changes(changed(values)) is None
        asked = find_changes(changed(values, adapter={"r": 2}))
        assert asked is not None
        assert "adapter.r 2 (was 4): that redoes" in asked
        assert "evaluate" in asked


def test_an_unfinished_run_goes_on(values: dict[str, Any]) -> None:
    finish(values)
    prepared = changed(values, finetune={"learning_rate": 1e-3})
    prepared.run.create(prepared.config.model_dump(mode="json"), steps=prepared.run.manifest()["steps"])
    prepared.run.forget("finetune")  # agreed to, begun and killed
    assert find_changes(prepared) is None
    (prepared.run.path("calibration") / "a.json").write_text("cut")
    assert find_changes(changed(values)) is None


def test_a_run_is_refused_before_anything_is_written_until_one_agrees(values: dict[str, Any]) -> None:
    finish(values)
    run = changed(values).run
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    values["adapter"] = {"r": 2}
    with pytest.raises(ConfigError, match=r"adapter.r 2 \(was 4\): that redoes .*: give --yes \(in Python accept"):
        run_pipeline(parse_config(values))
    heard: list[str] = []
    with pytest.raises(ConfigError, match="redoes finetune"):
        run_pipeline(parse_config(values), accept_changes=lambda told: bool(heard.extend(told)))
    assert heard[0].startswith(f"run_dir {run.place}: the config has adapter.r 2")
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.name != ".lock" and path.is_file()} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


def test_tasks_that_would_redo_the_same_are_told_together(values: dict[str, Any], tmp_path: Path) -> None:
    tasks = []
    for name in ("a", "b"):
        mine = {**values, "run_dir": str(tmp_path / name)}
        finish(mine)
        tasks.append(Task(name, parse_config({**mine, "adapter": {"r": 2, "lora_alpha": 16}})))
    [told] = PipelineWork(None).changes(tasks)
    assert told.startswith("task a, b: the config has adapter.r 2 (was 4): that redoes finetune")
    with pytest.raises(ConfigError, match="task a, b"):
        check_accepted([told], False)
    check_accepted([told], True)


def test_a_task_s_plan_says_whether_a_finished_stage_is_redone(values: dict[str, Any], tmp_path: Path) -> None:
    finish(values)
    work = PipelineWork(None)

    def edited(**sections: dict[str, Any]) -> bool:
        return work.planned(Task("a", changed(values, **sections).config)).edited

    assert edited(finetune={"learning_rate": 1e-3})
    work.forget(Task("a", changed(values).config))
    assert not edited()
    work.forget(Task("a", changed(values).config))
    assert not edited(evaluation={"num_workers": 1})  # which redoes nothing
    write_jsonl(tmp_path / "rows.jsonl", task_rows(41))
    work.changes([task := Task("a", changed(values).config)])
    assert work.planned(task).edited


@pytest.mark.parametrize("answer", ["y", "n", None])
def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    console = Console(force_terminal=answer is not None, record=True)
    with os.fdopen(terminal) as reading:
        monkeypatch.setattr("sys.stdin", reading)
        if answer == "n":
            with pytest.raises(ConfigError, match="Nothing was changed"):
                agrees(console, ["this redoes merge"])
        else:
            assert agrees(console, ["this redoes merge"]) is (answer == "y")
    os.close(keyboard)
    assert ("this redoes merge." in console.export_text()) is (answer is not None)
