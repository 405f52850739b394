"""Training with each adapter method, in this process: broken off and gone on with it ends in the same files."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import CASES, TARGETS, settings
from dying_session import DyingSession, Killed
from payloads import Leaves
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from stage_artifacts import Artifacts
from tiny import save_emulator
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from emloc_ray.data.packing import num_sequences
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.errors import DamagedArtifactError, StageError
from emloc_ray.io.formats.json_lines import append_object, read_objects
from emloc_ray.modeling.adapter import attach_adapter, load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_files import CONFIG_NAME, WEIGHTS_NAME, Adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import token_loss
from emloc_ray.stages.finetune import training, validation
from emloc_ray.stages.finetune.finetune import finetune, mean_loss
from emloc_ray.stages.finetune.job import FinetuneJob, OriginalJob, ValidationJob
from emloc_ray.stages.finetune.session import LoneSession, own_environment
from emloc_ray.stages.finetune.trainer import EmulatorTrainer
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.finetune.validation import Validation
from emloc_ray.stages.ray.tasks import Resources


@pytest.fixture(scope="module")
def job(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> FinetuneJob:
    root = tmp_path_factory.mktemp("training")
    return FinetuneJob(
        emulator_dir=save_emulator(artifacts.model_dir, root / "emulator"),
        tokens_dir=artifacts.tokens_dir,
        out_dir=root / "adapter",
        storage_dir=root / "storage",
        name="training",
        adapter={},
        portable_targets=TARGETS["llama"],
        base_model="the/original",
        max_steps=4,
        batch_size=4,
        training_arguments={"save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "disable_tqdm": True},
    )


@pytest.fixture(autouse=True)
def own_environment_variables() -> Iterator[None]:
    with own_environment():
        yield


QUICK = ("lora", "prefix", "ia3")


def test_a_training_beside_one_that_is_scored_is_not(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    # Healing and the last steps on the original have the fine-tuning's arguments, and no rows to be scored on.
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    arguments = {**job.training_arguments, "eval_on_start": True}
    job = replace(job, adapter=options, training_arguments=arguments, max_steps=1, out_dir=tmp_path / "adapter")
    assert train(replace(job, storage_dir=tmp_path), LoneSession(tmp_path / "training"))["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.deep) for case in CASES]
)
def test_it_goes_on_from_its_checkpoint(
    case: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("PEFT chose a device"))
    options = settings(case, "llama", [spec.name for spec in artifacts.specs])
    if case != "prefix":  # which the config refuses
        job = replace(job, training_arguments={**job.training_arguments, "gradient_checkpointing": True})
    job = replace(job, adapter=options, storage_dir=tmp_path)
    whole = replace(job, name="whole", out_dir=tmp_path / "whole-adapter")
    assert train(whole, LoneSession(tmp_path / "whole"))["resumed"] is False
    broken = replace(job, name="broken", out_dir=tmp_path / "broken-adapter")
    with pytest.raises(Killed):
        train(broken, DyingSession(tmp_path / "broken"))
    found = train(broken, LoneSession(tmp_path / "broken"))
    assert found["resumed"] is True
    assert found["steps"] == 4
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (broken.out_dir / name).read_bytes() == (whole.out_dir / name).read_bytes(), name


def test_how_often_it_is_saved_changes_nothing(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    written = []
    for every in (1, 100):
        arguments = {**job.training_arguments, "save_steps": every, "save_total_limit": every}
        one = replace(
            job, adapter={**options, "lora_dropout": 0.1}, name=f"every-{every}", training_arguments=arguments
        )
        one = replace(one, out_dir=tmp_path / f"{every}-adapter", storage_dir=tmp_path)
        train(one, LoneSession(tmp_path / one.name))
        written.append([(one.out_dir / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)])
        written[-1].append(one.log_path.read_bytes())
    assert written[0] == written[1]


def test_the_loss_of_a_training_that_goes_on_is_that_of_all_its_steps(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    arguments = {**job.training_arguments, "logging_steps": 3}  # between two of which it is saved
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(
        job, adapter=options, training_arguments=arguments, storage_dir=tmp_path, out_dir=tmp_path / "adapter"
    )
    whole = train(replace(job, name="whole"), LoneSession(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(job, DyingSession(tmp_path / "broken"))
    assert train(job, LoneSession(tmp_path / "broken"))["resumed"]
    lines = {line["step"]: line for line in read_objects(job.log_path.read_bytes())}
    assert mean_loss([lines[step] for step in sorted(lines)]) == pytest.approx(whole["train_loss"], abs=1e-4)


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_what_was_logged_after_the_checkpoint_is_done_and_logged_again(
    has_checkpoint: bool, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    """At the steps that are asked for now."""
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, out_dir=tmp_path / "adapter")
    with pytest.raises(Killed):
        train(job, DyingSession(tmp_path / "broken"))
    before = job.log_path.read_bytes() if has_checkpoint else b""
    for path in (job.log_path, job.validation_path):
        append_object(path, {"step": 3, "loss": 1000.0})
    rarely = replace(job, training_arguments={**job.training_arguments, "logging_steps": 100})
    train(rarely, LoneSession(tmp_path / ("broken" if has_checkpoint else "anew")))
    steps = [line["step"] for line in read_objects(job.log_path.read_bytes())]
    assert steps == ([1, 2, 4] if has_checkpoint else [2, 4])
    assert job.log_path.read_bytes().startswith(before)
    assert read_objects(job.validation_path.read_bytes()) == []


def test_the_last_step_is_logged_where_it_is_not_saved(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    """Of steps that are not logged ``train_loss`` has one rank's part alone."""
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    rarely = {**job.training_arguments, "save_strategy": "no", "logging_steps": 2}
    job = replace(job, adapter=options, storage_dir=tmp_path, out_dir=tmp_path / "adapter", max_steps=5)
    made = train(replace(job, training_arguments=rarely), LoneSession(tmp_path / "own"))
    lines = [*read_objects(job.log_path.read_bytes())]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert made["train_loss"] == pytest.approx(mean_loss(lines), abs=1e-4)


def test_a_training_that_goes_on_is_saved_as_often_as_is_asked_now(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, out_dir=tmp_path / "adapter", max_steps=5)
    with pytest.raises(Killed):
        train(job, DyingSession(tmp_path / "broken"))
    saved = []

    class Counting(LoneSession):
        def save(self, folder: Path | None, step: int) -> None:
            saved.append(step)

    train(replace(job, training_arguments={**job.training_arguments, "save_steps": 1}), Counting(tmp_path / "broken"))
    assert saved == [3, 4, 5]


def test_a_disk_that_is_full_at_a_checkpoint_is_told(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch does not name the cause."""
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, out_dir=tmp_path / "adapter")

    class Saving(LoneSession):
        def save(self, folder: Path | None, step: int) -> None:
            torch.save(torch.zeros(9), "/dev/full")

    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=4096))
    with pytest.raises(OSError, match="No space left on device"):
        train(job, Saving(tmp_path / "own"))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch's own, as it traces checkpoints
def test_compiled_blocks_train_the_same_adapter_by_a_few_graphs(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    job = replace(job, adapter=settings("lora", "llama", [spec.name for spec in artifacts.specs]), storage_dir=tmp_path)
    job = replace(job, training_arguments={**job.training_arguments, "gradient_checkpointing": True})
    compiled = {**job.training_arguments, "torch_compile": True, "torch_compile_backend": "eager"}
    counters.clear()
    written = []
    for name, arguments in (("plain", job.training_arguments), ("compiled", compiled)):
        assert not counters["stats"]["unique_graphs"]
        one = replace(job, name=name, out_dir=tmp_path / f"{name}-adapter", training_arguments=arguments)
        train(one, LoneSession(tmp_path / name))
        written.append((one.out_dir / WEIGHTS_NAME).read_bytes())
    assert written[0] == written[1]
    # The last block has a linear that is dense; a graph of each kind for the first batch's length, and for any.
    assert 0 < counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
def test_packs_are_trained_on_and_gone_on_with(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, batch_size=2, pack_length=96)
    assert num_sequences(job.tokens_dir, 96) < num_sequences(job.tokens_dir, None)
    whole = replace(job, name="whole", out_dir=tmp_path / "whole-adapter")
    train(whole, LoneSession(tmp_path / "whole"))
    broken = replace(job, name="broken", out_dir=tmp_path / "broken-adapter")
    with pytest.raises(Killed):
        train(broken, DyingSession(tmp_path / "broken"))
    assert train(broken, LoneSession(tmp_path / "broken"))["resumed"] is True
    assert (broken.out_dir / WEIGHTS_NAME).read_bytes() == (whole.out_dir / WEIGHTS_NAME).read_bytes()


def test_lora_plus_trains_b_at_its_own_rate(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    """A step of Adam from zero moves B by the rate it has; with no decay A moves by its own."""
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    largest = {}
    for ratio in (None, 16.0):
        name = f"ratio-{ratio}"
        arguments = {**job.training_arguments, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
        own = replace(job, name=name, out_dir=tmp_path / name, storage_dir=tmp_path, adapter=options, max_steps=1)
        train(replace(own, training_arguments=arguments, loraplus_lr_ratio=ratio), LoneSession(tmp_path / f"{name}-s"))
        saved = load_file(own.out_dir / WEIGHTS_NAME)
        largest[ratio] = max(float(tensor.abs().max()) for key, tensor in saved.items() if "lora_B" in key)
    assert largest[16.0] == pytest.approx(16 * largest[None], rel=1e-3)


def test_a_process_that_sees_two_gpus_splits_no_batch(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Ray hides none, or without Ray."""
    trained = []

    class Seeing(training.TrainingArguments):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert self.n_gpu <= 1
            self._n_gpu = 2

    class Watched(EmulatorTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            trained.append(self.args.n_gpu)
            raise Killed

    monkeypatch.setattr(training, "TrainingArguments", Seeing)
    monkeypatch.setattr(training, "EmulatorTrainer", Watched)
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    with pytest.raises(Killed):
        train(replace(job, adapter=options, storage_dir=tmp_path), LoneSession(tmp_path / "two"))
    assert trained == [1]


def test_ranks_look_for_unused_parameters_where_asked_or_where_there_may_be_some(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []

    class Watched(EmulatorTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            looked.append(self.args.ddp_find_unused_parameters)
            raise Killed

    monkeypatch.setattr(training, "EmulatorTrainer", Watched)
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    for asked in ({}, {"ddp_find_unused_parameters": True}):
        arguments = {**job.training_arguments, **asked}
        own = replace(job, name="looked", adapter=options, storage_dir=tmp_path, training_arguments=arguments)
        with pytest.raises(Killed):
            train(own, LoneSession(tmp_path / "looked"))
    monkeypatch.setattr(training, "UnfusedExperts", torch.nn.Linear)  # as if it had some
    with pytest.raises(Killed):
        train(replace(own, training_arguments=job.training_arguments), LoneSession(tmp_path / "looked"))
    monkeypatch.undo()
    monkeypatch.setattr(training, "EmulatorTrainer", Watched)
    dropped = {**settings("lokr", "llama", [spec.name for spec in artifacts.specs]), "module_dropout": 0.1}
    with pytest.raises(Killed):
        train(replace(job, name="looked", adapter=dropped, storage_dir=tmp_path), LoneSession(tmp_path / "looked"))
    assert looked == [False, True, True, True]


@pytest.mark.parametrize(("case", "pack_length"), [("dora", None), ("lora", 96)])
def test_a_deterministic_training_is_so_from_its_first_product_on(
    case: str,
    pack_length: int | None,
    job: FinetuneJob,
    artifacts: Artifacts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which a new DoRA makes for its magnitudes, and a packed one to see that rows are apart, before there is a Trainer."""
    linear, set_by_then = torch.nn.functional.linear, list[bool]()

    def product(*args: Any) -> torch.Tensor:
        set_by_then.append("CUBLAS_WORKSPACE_CONFIG" in os.environ)
        return linear(*args)

    def begun(*_: Any, **__: Any) -> Any:
        raise Killed

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    monkeypatch.setattr(training, "EmulatorTrainer", begun)
    options = settings(case, "llama", [spec.name for spec in artifacts.specs])
    arguments = {**job.training_arguments, "full_determinism": True}
    job = replace(job, adapter=options, storage_dir=tmp_path, training_arguments=arguments, pack_length=pack_length)
    try:
        with pytest.raises(Killed):
            train(job, LoneSession(tmp_path / "training"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert set_by_then
    assert all(set_by_then)


@pytest.mark.parametrize("hold", ["resident", "offloaded"])
def test_ranks_are_sent_what_is_trained_alone(
    hold: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no micro-step goes through all modules, to count its operations or to find the model."""
    models: list[Any] = []

    class Watched(EmulatorTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            models.append(self.model)
            with monkeypatch.context() as patched:
                patched.setattr(self.accelerator, "unwrap_model", lambda *_: pytest.fail("looked for"))
                return super().training_step(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda *_, **__: pytest.fail("counted"))
    monkeypatch.setattr(training, "EmulatorTrainer", Watched)
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, out_dir=tmp_path / "adapter", max_steps=1, hold=hold)
    train(job, LoneSession(tmp_path / "training"))
    [model] = models
    sent = {name: p for name, p in model.named_parameters() if name not in model._ddp_params_and_buffers_to_ignore}  # noqa: SLF001
    assert sent
    assert sent == {name: p for name, p in model.named_parameters() if p.requires_grad}


def validated(job: FinetuneJob, tmp_path: Path, **asked: Any) -> list[float]:
    """The validation losses of a training, in order."""
    return [line["loss"] for line in scores_of(job, **asked)]


def scores_of(job: FinetuneJob, **asked: Any) -> list[dict[str, float]]:
    """What a training logs of its scores, in order."""
    asked = {"tokens_dir": job.tokens_dir, "every": 1, "batch_size": 4, **asked}
    train(replace(job, validation=ValidationJob(**asked)), LoneSession(job.storage_dir / job.name))
    return [json.loads(line) for line in job.validation_path.read_text().splitlines()]


def loss_of(adapter: Path, job: FinetuneJob, model_dir: Path | None = None) -> float:
    """Of the emulator, or another model, with a saved adapter, on the rows of the training."""
    shards = TokenShards(job.tokens_dir)
    model = load_adapter(load_model(model_dir or job.emulator_dir), adapter).eval()
    batch = collate([row for number in range(shards.num_shards) for row in shards.shard(number)], 0)
    with torch.no_grad():
        result = token_loss(model, batch, job.loss_on)
    return float(result.loss_sum) / result.num_tokens


@pytest.mark.slow
def test_the_adapter_of_the_lowest_validation_loss_is_kept(
    job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    """At a learning rate that ruins it after the first step."""
    arguments = {**job.training_arguments, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, training_arguments=arguments)
    last = replace(job, name="last", out_dir=tmp_path / "last-adapter")
    losses = validated(last, tmp_path)
    assert len(losses) == 4
    assert min(losses) < losses[-1]
    best = replace(job, name="best", out_dir=tmp_path / "best-adapter")
    assert validated(best, tmp_path, keeps_best=True) == losses
    assert loss_of(best.out_dir, job) == pytest.approx(min(losses), rel=1e-5)
    assert loss_of(last.out_dir, job) == pytest.approx(losses[-1], rel=1e-5)
    early = replace(job, name="early", out_dir=tmp_path / "early-adapter")
    turn = losses.index(min(losses))
    assert validated(early, tmp_path, keeps_best=True, patience=1) == losses[: turn + 2]
    assert (early.out_dir / WEIGHTS_NAME).read_bytes() == (best.out_dir / WEIGHTS_NAME).read_bytes()
    broken = replace(job, name="broken", out_dir=tmp_path / "broken-adapter")
    broken = replace(broken, validation=ValidationJob(job.tokens_dir, 1, 4, keeps_best=True))
    with pytest.raises(Killed):
        train(broken, DyingSession(tmp_path / "broken"))
    train(broken, LoneSession(tmp_path / "broken"))
    assert (broken.out_dir / WEIGHTS_NAME).read_bytes() == (best.out_dir / WEIGHTS_NAME).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "hold"), [("lora", "resident"), ("dora", "offloaded"), ("prefix", "all_offloaded")])
def test_the_original_is_scored_with_the_adapter_as_it_is(
    case: str, hold: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    """At every second of three scores and at the last; the training is what it is without."""
    options = settings(case, "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, max_steps=5)
    plain, scored = (replace(job, name=name, out_dir=tmp_path / f"{name}-adapter") for name in ("plain", "scored"))
    original = OriginalJob(artifacts.model_dir, 2, hold)
    lines, expected = scores_of(scored, every=2, original=original), scores_of(plain, every=2)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert [line["step"] for line in lines if "original_loss" in line] == [4, 5]
    assert (plain.out_dir / WEIGHTS_NAME).read_bytes() == (scored.out_dir / WEIGHTS_NAME).read_bytes()
    on_original = loss_of(scored.out_dir, job, artifacts.model_dir)
    is_served = case != "dora"  # whose magnitudes the correction converts
    assert (lines[-1]["original_loss"] == pytest.approx(on_original, rel=1e-5)) is is_served
    assert abs(lines[-1]["original_loss"] - lines[-1]["loss"]) > 1e-4


@pytest.mark.parametrize("hold", ["resident", "offloaded"])
def test_a_fresh_dora_changes_nothing_on_the_original(
    hold: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path
) -> None:
    """The original's rows stay as long as they are: the emulator's are not what is served."""
    options = settings("dora", "llama", [spec.name for spec in artifacts.specs])
    model = attach_adapter(load_model(job.emulator_dir), adapter_config(**options))
    asked = ValidationJob(job.tokens_dir, 1, 4, original=OriginalJob(artifacts.model_dir, 1, hold))
    scores = Validation(job, asked, LoneSession(tmp_path))
    bare = scores.measure(load_model(artifacts.model_dir))
    assert scores.losses(model, 1)["eval_original_loss"] == pytest.approx(bare, rel=1e-5)


@pytest.mark.parametrize("hold", ["resident", "offloaded"])
def test_nothing_of_the_original_stays_after_it_is_scored(
    hold: str, job: FinetuneJob, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def watched(*args: Any, **options: Any) -> Any:
        model = open_model(*args, **options)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(validation, "open_model", watched)
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    model = attach_adapter(load_model(job.emulator_dir), adapter_config(**options))
    asked = ValidationJob(job.tokens_dir, 1, 4, original=OriginalJob(artifacts.model_dir, 1, hold))
    scores = Validation(job, asked, LoneSession(tmp_path))
    gc.disable()
    try:
        assert set(scores.losses(model, 1)) == {"eval_loss", "eval_original_loss"}
        assert [there() for there in opened] == [None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_the_best_adapter_may_be_the_original_s(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    """Its first score and two that are not better by enough end the training; those of the emulator alone do not count."""
    arguments = {**job.training_arguments, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    options = settings("lora", "llama", [spec.name for spec in artifacts.specs])
    job = replace(job, adapter=options, storage_dir=tmp_path, training_arguments=arguments, max_steps=9)
    original = OriginalJob(artifacts.model_dir, 2, decides=True)
    lines = scores_of(job, keeps_best=True, patience=2, threshold=10.0, original=original)
    losses = [line["original_loss"] for line in lines if "original_loss" in line]
    assert (len(lines), len(losses)) == (6, 3)
    assert loss_of(job.out_dir, job, artifacts.model_dir) == pytest.approx(min(losses), rel=1e-5)


def test_what_goes_on_from_an_adapter_of_experts_has_its_dropout(
    job: FinetuneJob, tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its files, those that PEFT loads on fused experts, cannot have."""
    loaded = []

    def seen(*args: Any, **options: Any) -> Any:
        loaded.append(load_adapter(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(training, "load_adapter", seen)
    model_dir = tiny_model_dir("mixtral")
    names = [spec.name for spec in block_linears(load_model(model_dir))]
    options: dict[str, Any] = {"r": 2, "lora_dropout": 0.1, "target_modules": names}
    begun = attach_adapter(load_model(model_dir), adapter_config(**options))
    save_trained_adapter(begun, tmp_path / "begun", targets=["q_proj"], base_model="x")
    assert Adapter(tmp_path / "begun").config["lora_dropout"] == 0
    job = replace(job, emulator_dir=model_dir, start_dir=tmp_path / "begun", adapter={"method": "lora", **options})
    train(replace(job, max_steps=1, out_dir=tmp_path / "adapter", storage_dir=tmp_path), LoneSession(tmp_path / "one"))
    [model] = loaded
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == len(names)
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.1}


@pytest.mark.slow
def test_a_checkpoint_that_holds_code_is_refused(job: FinetuneJob, artifacts: Artifacts, tmp_path: Path) -> None:
    """Everything that the Trainer reads again, torch's weights-only loader reads."""
    job = replace(
        job, storage_dir=tmp_path, adapter=settings(next(iter(CASES)), "llama", [spec.name for spec in artifacts.specs])
    )
    with pytest.raises(Killed):
        train(job, DyingSession(tmp_path / "broken"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        [file] = (tmp_path / "broken").rglob(name)
        saved = file.read_bytes()
        torch.save(Leaves(tmp_path / "mark"), file)
        with pytest.raises(DamagedArtifactError, match=f"{file.parent} holds something else"):
            train(job, LoneSession(tmp_path / "broken"))
        assert not (tmp_path / "mark").exists()
        file.write_bytes(saved)


@pytest.mark.parametrize(
    ("arguments", "zero", "has_bfloat16", "expected"),
    [
        ({}, None, False, False),
        ({"bf16": "auto"}, None, True, True),
        ({"bf16": "auto", "fp16": True}, None, True, False),
        ({"bf16": True}, None, False, True),
        ({"bf16": False}, None, True, False),
        ({"bf16": "auto"}, {"bf16": {"enabled": False}}, True, False),
        ({"bf16": "auto"}, {"bf16": {"enabled": "auto"}}, True, True),
    ],
)
def test_bfloat16_is_trained_in_where_the_gpu_has_it_or_where_it_is_asked_for(
    job: FinetuneJob,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    zero: dict[str, Any] | None,
    has_bfloat16: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(training, "computes_bfloat16", lambda device: has_bfloat16)
    assert training.trains_in_bfloat16(replace(job, training_arguments=arguments, zero_config=zero)) is expected


def test_a_group_that_ran_out_of_memory_is_not_begun_again(
    job: FinetuneJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(job: FinetuneJob, session: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training, "train", run_out)
    monkeypatch.setattr(training, "GroupSession", lambda directory: None)
    settings: dict[str, Any] = {
        "job": replace(job, storage_dir=tmp_path),
        "threads": torch.get_num_threads(),
        "device": "cuda",
    }
    with pytest.raises(torch.OutOfMemoryError):
        training.train_loop(settings)
    assert training.train_loop(settings)["out_of_memory"]

    def runner(job: FinetuneJob, *_: Any) -> dict[str, Any]:
        job.out_of_memory_path.touch()
        return training.train_loop(settings)

    with pytest.raises(StageError, match="finetune: a worker ran out of memory: set memory_budget"):
        finetune(settings["job"], Resources(2), runner=runner)
