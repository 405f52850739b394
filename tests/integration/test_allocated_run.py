"""Runs whose ranks follow from the data and whose factors keep predictions: end to end, again, after kills, from a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save
from image_rows import serve, write_image_rows
from plain_runs import plain_run
from small_runs import (
    WEIGHED,
    FinishedRun,
    KillingReporter,
    Stopping,
    make_values,
    redone,
    run_values,
    task_rows,
    write_jsonl,
)
from transformers import AutoModelForCausalLM
from vlms import save_vlm

from emloc_ray.config.reading import parse_config
from emloc_ray.config.steps import VERBS
from emloc_ray.core.ranks import factor_parameters
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import Stopped
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.runs.cache import ArtifactCache, EntryGone
from emloc_ray.modeling.loading import load_model
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.factorize.spend import read_ranks

ALL = ["data", "calibrate", "gradients", "allocate", "factorize", *VERBS[3:]]  # not healed


@pytest.fixture(scope="session")
def weighed_run(make_run: Callable[..., FinishedRun], task_file: Path) -> FinishedRun:
    """The tiny Llama's run by sensitivity and predictions; read it, or spoil a copy."""
    return make_run(task_file, emulator=WEIGHED)


def tail(step: str) -> list[str]:
    return ALL[ALL.index(step) :]


@torch.no_grad()
def divergence(run: FinishedRun, directory: Path) -> float:
    """The KL divergence of an emulator's predictions from the original's at a run's calibration completions, nats a token."""
    original, emulator = load_model(run.model_dir), load_model(directory)
    total, count = 0.0, 0
    shards = TokenShards(run.root / "data" / "tokens" / "calibration")
    for position in range(len(shards)):
        row = shards.row(position)
        ids = torch.tensor([row.input_ids])
        keep = torch.tensor(row.completion_mask)[1:]
        ours, theirs = (m(input_ids=ids).logits[0, :-1][keep].log_softmax(-1) for m in (emulator, original))
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += int(keep.sum())
    return total / count


def test_the_budget_is_uniform_s_and_the_predictions_are_nearer(
    weighed_run: FinishedRun, llama_run: FinishedRun
) -> None:
    layout = prepare(parse_config(llama_run.values)).layout
    specs = {spec.name: spec for spec in layout.specs}
    ranks = read_ranks(weighed_run.root / "allocation")
    used = sum(factor_parameters(s.out_features, s.in_features, ranks[name]) for name, s in specs.items())
    told, uniform = weighed_run.metrics["emulator"], llama_run.metrics["emulator"]
    left = weighed_run.metrics["allocation"]["left"]
    assert used + left == layout.parameters_factorized
    assert left < min(s.out_features + s.in_features for s in layout.specs)
    assert told["parameters"] == uniform["parameters"] - left
    assert told["parameters_kept"] == pytest.approx(used / layout.parameters_targeted)
    assert (told["allocation"], told["objective"]) == ("sensitivity", "predictions")
    assert (uniform["allocation"], uniform["objective"]) == ("uniform", "activations")
    assert len(set(ranks.values())) > 3
    for name, layer in told["layers"].items():
        assert layer["rank"] == (ranks[name] or min(specs[name].out_features, specs[name].in_features))
        kept = factor_parameters(specs[name].out_features, specs[name].in_features, ranks[name])
        assert layer["share"] == pytest.approx(kept / specs[name].num_parameters)
    assert divergence(weighed_run, weighed_run.root / "emulator") < divergence(llama_run, llama_run.root / "emulator")


def test_all_that_follows_takes_these_ranks(weighed_run: FinishedRun) -> None:
    ranks = {name: rank for name, rank in read_ranks(weighed_run.root / "allocation").items() if rank is not None}
    config = json.loads((weighed_run.root / "emulator" / "config.json").read_text())
    assert config["ranks"] == ranks
    emulator = AutoModelForCausalLM.from_pretrained(weighed_run.root / "emulator")
    assert all(emulator.get_submodule(name).up.weight.shape[1] == rank for name, rank in ranks.items())
    evaluation = weighed_run.metrics["evaluation"]
    assert evaluation["merged"]["loss"] == pytest.approx(evaluation["corrected"]["loss"], abs=1e-3)
    assert evaluation["corrected"]["loss"] < evaluation["original"]["loss"]
    merged = {entry.name for entry in Checkpoint(weighed_run.root / "merged")}
    assert merged == {entry.name for entry in Checkpoint(weighed_run.model_dir)}


def test_the_page_and_the_log_tell_of_it(weighed_run: FinishedRun) -> None:
    page = (weighed_run.root / "report.html").read_text()
    assert "ranks by sensitivity" in page
    assert "factors keep predictions" in page
    steps = [json.loads(line) for line in (weighed_run.root / "log.jsonl").read_text().splitlines()]
    started = [event["stage"] for event in steps if event["event"] == "started"]
    assert started == ALL


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("evaluation", {"num_workers": 1}, []),
        ("calibration", {"num_workers": 1}, []),
        ("emulator", {"gradient_dampening_frac": 0.1}, tail("allocate")),
        ("emulator", {"compression_ratio": 0.3}, tail("allocate")),
        ("emulator", {"objective": "activations"}, tail("allocate")),
        ("emulator", {"allocation": "uniform"}, tail("factorize")),
        ("emulator", {"allocation": "uniform", "objective": "activations"}, tail("factorize")),
        ("finetune", {"loss_on": "all"}, tail("gradients")),
        ("calibration", {"tokens": "completion"}, tail("calibrate")),
    ],
)
def test_a_changed_config_redoes_what_depends_on_it(
    weighed_run: FinishedRun, tmp_path: Path, section: str, keys: dict[str, Any], expected: list[str]
) -> None:
    assert redone(weighed_run.copy(tmp_path).changed(**{section: keys})) == expected


def test_from_a_stage_redoes_it_with_its_steps(weighed_run: FinishedRun, tmp_path: Path) -> None:
    copied = weighed_run.copy(tmp_path)
    assert redone(copied.values, begin="factorize") == tail("allocate")
    assert redone(copied.values, begin="calibrate") == tail("calibrate")
    assert redone(copied.values) == []


def test_from_factorize_after_a_kill_begins_anew_and_without_it_goes_on(
    weighed_run: FinishedRun, tmp_path: Path
) -> None:
    copied = weighed_run.copy(tmp_path)

    def broken_off() -> dict[str, int]:
        with pytest.raises(Stopped):
            run_values(copied.values, Stopping("factorize", 1), begin="factorize", until="factorize")
        return written()

    def written() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (copied.root / "emulator").rglob("*.safetensors")}

    left = broken_off()
    run_values(copied.values, until="factorize")
    assert left.items() & written().items()
    left = broken_off()
    # Ranks are found anew: shards of those before need not have them.
    run_values(copied.values, begin="factorize", until="factorize")
    assert left
    assert not left.items() & written().items()


class KillingGradients(KillingReporter):
    """Kills a worker once a shard of gradients is counted."""

    victim = "gradients: slot"

    def start(self, stage: str) -> Callable[[int, int], None]:
        told = super().start(stage)
        return self._progress if stage == "gradients" else (told if stage != "calibrate" else lambda done, total: None)


def test_a_killed_worker_leaves_no_trace(weighed_run: FinishedRun, tmp_path: Path) -> None:
    copied = weighed_run.copy(tmp_path)
    reporter = KillingGradients()
    run_values(copied.values, reporter, begin="calibrate", until="factorize")
    assert len(reporter.killed) == 1
    assert any(note.startswith("gradients: slot") for note in reporter.notes)
    for folder in ("gradients", "allocation", "emulator"):
        files = sorted(file.name for file in (weighed_run.root / folder).iterdir() if file.is_file())
        assert sorted(file.name for file in (copied.root / folder).iterdir() if file.is_file()) == files
        for name in files:
            expected, found = (run.root / folder / name for run in (weighed_run, copied))
            assert found.read_bytes() == expected.read_bytes(), f"{folder}/{name}"


def test_sums_that_are_not_kept_are_gathered_again_where_they_are_of_use(
    weighed_run: FinishedRun, tmp_path: Path
) -> None:
    copied = weighed_run.copy(tmp_path)
    values = copied.changed(calibration={"keep": "none"})
    assert run_values(values).started == []
    for folder in ("calibration", "gradients"):
        assert not (copied.root / folder).exists()
    assert run_values(values).started == []
    smaller = {**values, "emulator": {**values["emulator"], "compression_ratio": 0.3}}
    assert run_values(smaller, until="factorize").started == ["calibrate", "gradients", "allocate", "factorize"]
    assert run_values(smaller, until="factorize").started == []


@pytest.mark.parametrize("harm", ["damaged", "removed", "not linked"])
def test_an_emulator_that_the_cache_held_and_does_not_give_is_made_here(
    weighed_run: FinishedRun, tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ArtifactCache(str(tmp_path / "cache"))

    def run(name: str) -> dict[str, str | None]:
        """From which run each stage was taken."""
        run_values({**weighed_run.values, "run_dir": str(tmp_path / name)}, until="factorize", cache=cache)
        stages = json.loads((tmp_path / name / "manifest.json").read_text())["stages"]
        return {stage: entry["result"].get("taken_from") for stage, entry in stages.items()}

    assert set(run("first").values()) == {None}
    if harm == "damaged":
        shard = next((tmp_path / "cache").rglob("emulator/model-*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        cache = ArtifactCache(str(tmp_path / "cache"))
    else:  # removed by another task between the look at what is there and its use, or whole and never to be linked
        link, left = ArtifactCache.link, ["factorize"]

        def gone(self: ArtifactCache, entry: Any, *args: Any, **options: Any) -> Any:
            if entry.stage in left:
                if harm == "removed":
                    left.remove(entry.stage)
                    self._at.remove(entry.stage, entry.key)
                raise EntryGone("it is there no more")
            return link(self, entry, *args, **options)

        monkeypatch.setattr(ArtifactCache, "link", gone)
    taken = dict.fromkeys(("data", "calibrate", "gradients", "allocate", "factorize"), "first")
    assert run("second") == {**taken, "factorize": None}
    for name in ("model.safetensors.index.json", "config.json"):
        first, second = (tmp_path / run / "emulator" / name for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    monkeypatch.undo()
    assert run("third") == {**taken, "factorize": "first" if harm == "not linked" else "second"}


def test_factors_of_the_weights_are_their_truncated_svd(weighed_run: FinishedRun, tmp_path: Path) -> None:
    copied = weighed_run.copy(tmp_path)
    run_values(copied.changed(emulator={"allocation": "uniform", "objective": "weights"}), until="factorize")
    plain, original = Checkpoint(copied.root / "emulator"), Checkpoint(weighed_run.model_dir)
    for name, rank in json.loads((copied.root / "emulator" / "config.json").read_text())["ranks"].items():
        u, s, vh = torch.linalg.svd(original.read(f"{name}.weight"), full_matrices=False)
        product = plain.read(f"{name}.up.weight") @ plain.read(f"{name}.down.weight")
        torch.testing.assert_close(product, (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-3, atol=1e-5)
    assert "factors keep weights" in (copied.root / "report.html").read_text()


def one_worker(root: Path, model_dir: Path, rows: Path, /, **changes: dict[str, Any]) -> dict[str, Any]:
    one = {"num_workers": 1}
    sections: dict[str, dict[str, Any]] = {
        "calibration": {**one, "num_calibration_samples": 16},
        "emulator": {**one, **WEIGHED},
        "finetune": {**one, "max_steps": 2},
        "correction": {"method": "covariance"},
        "merge": one,
        "evaluation": {**one, "num_exact_match": 0, "num_generations": 0},
    }
    for section, keys in changes.items():
        sections[section] = {**sections.get(section, {}), **keys}
    return make_values(root / "run", model_dir, rows, **sections)


@pytest.mark.parametrize("family", ["Mixtral", "T5"])
def test_experts_and_encoders_are_allocated_too(family: str, tmp_path: Path) -> None:
    model_dir, rows = save(family, tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", task_rows(64))
    run = plain_run(one_worker(tmp_path, model_dir, rows), model_dir)
    ranks = allocated_ranks(run)
    if family == "Mixtral":
        assert any(".experts." in name for name in ranks)


def test_conv1d_in_4_bits_is_allocated_too(ray_session: None, tmp_path: Path) -> None:
    model_dir, rows = save("GPT-2", tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", task_rows(64))
    values = one_worker(tmp_path, model_dir, rows, emulator={"quantization": "nf4"})
    run = FinishedRun(tmp_path / "run", values, model_dir, run_values(values))
    assert None not in allocated_ranks(run).values()  # a Conv1D cannot be stored dense in 4 bits


def allocated_ranks(run: FinishedRun) -> dict[str, int | None]:
    """A run's ranks, of all layers and several, with which its emulator opens and its adapter was merged."""
    ranks = read_ranks(run.root / "allocation")
    assert set(ranks) == set(prepare(parse_config(run.values)).layout.allocated)
    assert len(set(ranks.values())) > 2
    losses = {variant: scores["loss"] for variant, scores in run.metrics["evaluation"].items()}
    assert losses["merged"] == pytest.approx(losses["corrected"], abs=1e-2)
    load_model(run.root / "emulator")
    return ranks


def test_a_vision_tower_is_allocated_too(ray_session: None, tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "model")
    (tmp_path / "rows").mkdir()
    server, url = serve(tmp_path / "rows")
    try:
        rows = write_image_rows(tmp_path / "rows", url)
        data = {"format": "messages", "max_seq_length": 128, "image_hosts": ["127.0.0.1"]}
        values = one_worker(tmp_path, model_dir, rows, data=data, calibration={"batch_size": 1})
        run_values(values, until="factorize")
    finally:
        server.shutdown()
    told = json.loads((tmp_path / "run" / "allocation" / "ranks.json").read_text())["layers"]
    tower = {name: layer["loss"] is not None for name, layer in told.items() if ".vision_tower." in name}
    used = [name for name, is_measured in tower.items() if is_measured]
    assert {name.split("layers.")[1][0] for name in used} == {"0", "1"}
    assert len(used) == 12
    # What the last block gives is not read: it is left as it would be uniformly.
    uniform = prepare(parse_config(values)).layout.ranks
    assert all(told[name]["rank"] == uniform[name] for name, is_measured in tower.items() if not is_measured)
