"""The pipeline is held to ``pipelines/reference.py`` step by step, and both to pinned losses."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from gguf_files import write_gguf
from peft import LoraConfig, PeftModel, get_peft_model
from plain_runs import PlainRun, plain_run
from reference import Row, Settings
from small_runs import task_rows, write_jsonl
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from emloc_ray.config.steps import VARIANTS
from emloc_ray.core.correction import Method
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.stage import correction_job

ROWS = task_rows(96)
PARTS = {"train": ROWS[24:], "calibration": ROWS[24:48], "selection": ROWS[16:24], "eval": ROWS[:16]}
SETTINGS = Settings(
    max_seq_length=20,  # some rows are cut
    num_calibration_samples=24,
    r=4,
    steps=8,
    learning_rate=5e-3,
    correction="covariance",
    clamp=0.5,
    strength=0.75,
)
PINNED = Path(__file__).with_name("pinned_losses.json")
HOW_TO_PIN = (
    "where the change is meant, pin them again: REPIN=1 python -m pytest tests/unit/pipelines/test_reference.py"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_model(directory: Path, family: str) -> Path:
    """A model whose blocks move its predictions, of weights that are the same however transformers begins a model."""
    model, generator = make_model(family), torch.Generator().manual_seed(7)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    model.save_pretrained(directory, max_shard_size="100KB")
    make_tokenizer().save_pretrained(directory)
    return directory


def config_values(root: Path, model_dir: Path, settings: Settings) -> dict[str, Any]:
    """What the pipeline calls the reference's settings, its run and the rows of each split in ``root``."""
    splits = {name: {"path": str(write_jsonl(root / f"{name}.jsonl", rows))} for name, rows in PARTS.items()}
    return {
        "run_dir": str(root / "run"),
        "seed": settings.seed,
        "model": {"source": str(model_dir)},
        "data": {"format": "prompt_completion", "max_seq_length": settings.max_seq_length, **splits},
        "calibration": {"num_calibration_samples": settings.num_calibration_samples},
        "emulator": {"compression_ratio": settings.compression_ratio},
        "adapter": {"r": settings.r, "lora_alpha": settings.lora_alpha},
        "finetune": {
            "max_steps": settings.steps,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "logging_steps": 1,
        },
        "correction": {"method": settings.correction, "clamp": settings.clamp, "strength": settings.strength},
        "evaluation": {"num_exact_match": 0, "num_generations": 0},
    }


class Twins:
    """One run by the pipeline, and what the reference makes of the same model, rows and settings."""

    def __init__(self, root: Path, family: str) -> None:
        self.model_dir = save_model(root / "model", family)
        self.pipeline: PlainRun = plain_run(config_values(root, self.model_dir, SETTINGS), self.model_dir)
        tokenizer, longest = make_tokenizer(), SETTINGS.max_seq_length
        cut = {name: [reference.tokenize(row, tokenizer, longest) for row in rows] for name, rows in PARTS.items()}
        self.rows: dict[str, list[Row]] = {name: [row for row in rows if row] for name, rows in cut.items()}

    def path(self, *parts: str) -> Path:
        """An artifact of the pipeline's run."""
        return self.pipeline.context.path(*parts)

    @property
    def batches(self) -> list[list[Row]]:
        """The rows of each optimizer step, in the pipeline's order."""
        rows = self.rows["train"]
        order = SampleOrder(len(rows), SETTINGS.batch_size, 0, 1, SETTINGS.seed)
        return [[rows[at] for at in batch.tolist()] for batch in order.batches(0, SETTINGS.steps)]

    @property
    def model(self) -> Any:
        """A fresh original."""
        return AutoModelForCausalLM.from_pretrained(self.model_dir)

    @cached_property
    def grams(self) -> dict[str, torch.Tensor]:
        return reference.gather_grams(self.model, self.rows["calibration"])

    @cached_property
    def emulator(self) -> dict[str, reference.FactorizedLinear]:
        return reference.make_emulator(self.model, self.grams, SETTINGS.compression_ratio)

    @property
    def lora(self) -> PeftModel:
        """A fresh adapter on the original."""
        model = self.model
        targets = [*reference.find_linears(model)]
        config = LoraConfig(r=SETTINGS.r, lora_alpha=SETTINGS.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
        torch.manual_seed(SETTINGS.seed)
        return get_peft_model(model, config)

    @torch.no_grad()
    def corrected(self, settings: Settings) -> PeftModel:
        """The adapter as the pipeline trained it, corrected by the reference."""
        lora, trained = self.lora, Adapter(self.path("adapter_emulator"))
        for name, layer in reference.adapted(lora).items():
            layer.lora_A["default"].weight.copy_(trained.module(name).lora_a)
            layer.lora_B["default"].weight.copy_(trained.module(name).lora_b)
            factors = self.emulator[name]
            delta = layer.base_layer.weight.double() - factors.up.double() @ factors.down.double()
            reference.correct(layer, delta, self.grams[name], settings)
        return lora


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Of a Qwen2: some of its linears have biases."""
    return Twins(tmp_path_factory.mktemp("twins"), "qwen2")


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """``‖found − expected‖_F ≤ relative ‖expected‖_F``."""
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).norm()) <= relative * float(expected.double().norm())


def test_rows(twins: Twins) -> None:
    for name, rows in twins.rows.items():
        tokens = twins.pipeline.rows(name)
        assert [row.ids.tolist() for row in rows] == [row.input_ids for row in tokens]
        assert [row.begin for row in rows] == [row.completion_mask.index(True) for row in tokens]
    assert max(len(row.ids) for row in twins.rows["train"]) == SETTINGS.max_seq_length


def test_grams(twins: Twins) -> None:
    store = GramStore(twins.path("calibration"))
    assert twins.grams.keys() == {name for group in store.index["groups"].values() for name in group}
    for name, gram in twins.grams.items():
        assert_close(store.read(name), gram, 1e-5)


def test_factors(twins: Twins) -> None:
    made = Checkpoint(twins.path("emulator"))
    for name, linear in twins.emulator.items():
        up, down = made.read(f"{name}.up.weight"), made.read(f"{name}.down.weight")
        assert up.shape == linear.up.shape
        assert_close(up @ up.T, linear.up @ linear.up.T, 1e-4)  # the projector: vectors have no sign of their own
        assert_close(up @ down, linear.up @ linear.down, 1e-4)


def test_first_steps(twins: Twins) -> None:
    lora = twins.lora
    reference.plug_into(lora, twins.emulator)
    losses = reference.train(lora, twins.batches, SETTINGS.learning_rate)
    assert losses == pytest.approx(twins.pipeline.step_losses, rel=1e-5)
    trained = Adapter(twins.path("adapter_emulator"))
    for name, layer in reference.adapted(lora).items():
        found = trained.module(name)
        assert found.scale == layer.scaling["default"]
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(found.lora_b @ found.lora_a, update.detach(), 1e-2)


@pytest.mark.parametrize(("method", "clamp"), [("projection", 3.0), ("projection", 0.2), ("covariance", 0.2)])
def test_correction(twins: Twins, method: Method, clamp: float, tmp_path: Path) -> None:
    settings = replace(SETTINGS, correction=method, clamp=clamp)
    job = correction_job(twins.pipeline.context)
    candidate = replace(job.candidates[0], method=method, clamp=clamp)
    correct_adapter(replace(job, candidates=(candidate,), out_dir=tmp_path / "adapter"))
    written = Adapter(tmp_path / "adapter")
    for name, layer in reference.adapted(twins.corrected(settings)).items():
        found = written.module(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(found.lora_b @ found.lora_a, product.detach(), 1e-4)


def test_merged_tensors(twins: Twins) -> None:
    merged, checkpoint = reference.merge(twins.corrected(SETTINGS)).state_dict(), Checkpoint(twins.path("merged"))
    changed = {f"{name}.weight" for name in twins.emulator}
    assert {entry.name for entry in checkpoint} == merged.keys()
    for name, tensor in merged.items():
        if name in changed:
            assert_close(checkpoint.read(name), tensor, 1e-5)
        else:
            assert torch.equal(checkpoint.read(name), tensor), name


def test_losses_of_every_variant(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of each, the order of the training rows alone handed from one to the other."""
    monkeypatch.setattr(reference, "make_batches", lambda rows, size, steps: twins.batches)
    found = dict(reference.run(twins.model, twins.rows["train"], twins.rows["eval"], SETTINGS))
    assert found == pytest.approx(twins.pipeline.losses, rel=1e-4)


def test_pinned_losses(twins: Twins) -> None:
    """What a comparison of the two cannot see: a change of both, or of what both rest on."""
    if os.environ.get("REPIN"):
        found = {name: round(loss, 5) for name, loss in twins.pipeline.losses.items()}
        PINNED.write_text(json.dumps(found, indent=2) + "\n")
    assert twins.pipeline.losses == pytest.approx(json.loads(PINNED.read_text()), abs=1e-3), HOW_TO_PIN


@pytest.mark.parametrize("stored", ["directory", "gguf"])
def test_command_line(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if stored == "gguf":
        write_gguf(tmp_path / "model.gguf")
        model = tmp_path / "model.gguf"
    else:
        model = save_model(tmp_path / "model", "llama")
    rows = tmp_path / "rows.jsonl"
    texts = [json.dumps({**row, "prompt": "\u2028" + row["prompt"]}, ensure_ascii=False) for row in task_rows(40)]
    rows.write_text("\n\n".join(texts))  # a line is what ends in a line feed, and may be blank
    options = ["--steps", "2", "--learning-rate", "1e-2", "--correction", "covariance"]
    monkeypatch.setattr(sys, "argv", ["reference.py", str(model), str(rows), *options])
    try:
        reference.main()
    finally:
        torch.set_default_device(None)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert {*VARIANTS} - {"finished"} <= printed.keys()  # the reference takes no exact steps
    assert float(printed["merged"]) < float(printed["original"])


def test_it_stands_alone() -> None:
    """Readable in one sitting, and no part of what it is the measure of."""
    source = Path(reference.__file__).read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    assert not {module.partition(".")[0] for module in modules} & {"ray", "emloc_ray"}
    assert len(source.splitlines()) <= 250
