"""Whole models on a device of their own: results are the CPU's, and the host waits no more often than a budget allows.

The budgets: a micro-step 0 times once warmed, a step twice, a batch of calibration four times. For a dense model the host
waits in none of them but the step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import CASES, IDS, attached
from families import build
from pretend_device import Meter, moved
from stage_artifacts import random_rows
from tiny import PAD, VOCABULARY, make_model, save_emulator
from torch import Tensor

from emloc_ray.data.packing import join
from emloc_ray.data.token_shards import collate
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.block_outputs import BlockOutput
from emloc_ray.modeling.experts import unfuse
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import teacher_logits, token_loss
from emloc_ray.modeling.packing import as_one_row
from emloc_ray.modeling.replay import BlockReplay
from emloc_ray.modeling.scoring import complete, losses_by_row, score_rows
from emloc_ray.stages.finetune.batches import RankBatches
from emloc_ray.stages.finetune.trainer import EmulatorTrainer

close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


PADDED, EVEN = collate(random_rows(13, 5, 16), PAD), collate(random_rows(16, 16, 16), PAD)
BATCHES = {"padded": PADDED, "even": EVEN}
PACKED = collate([join(random_rows(13, 5)), join(random_rows(16))], PAD)
STEPS = {**BATCHES, "packed": PACKED, "in one row": as_one_row(PACKED)}


def groups_of(model: Any) -> list[list[str]]:
    empty = empty_model(model.config)
    return trace_inputs(empty, block_linears(empty)).groups


@pytest.fixture(scope="module")
def emulator_dir(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_emulator(tiny_model_dir("llama"), tmp_path_factory.mktemp("emulator") / "llama")


def gradients(model: Any) -> list[Tensor]:
    return [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]


# Of experts that run one by one it is asked once a layer which tokens each was sent.
@pytest.mark.parametrize(("family", "waits"), [("llama", 0), ("qwen2", 0), ("mixtral", 2)])
def test_grams(family: str, waits: int, meter: Meter) -> None:
    model = unfuse(make_model(family))
    here, there = (GramHooks(some, groups_of(model)) for some in (model, moved(copy.deepcopy(model))))
    for hooks in (here, there):
        meter.restart()
        hooks.forward(PADDED)
    assert meter.waits.total() == waits, meter.waits
    there.check_finite()  # once a shard
    assert meter.waits.total() == waits + 1
    for name, gram in here.grams.items():
        assert there.grams[name].num_tokens == gram.num_tokens
        close(there.grams[name].symmetric().cpu(), gram.symmetric(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sums_of_gradients(family: str, batch: str, meter: Meter) -> None:
    model = make_model(family).requires_grad_(False)
    names = [spec.name for spec in block_linears(model)]
    here, there = (GradientHooks(some, names) for some in (model, moved(copy.deepcopy(model))))
    for hooks in (here, there, here, there):
        meter.restart()
        hooks.forward(BATCHES[batch], "all", [0, 1, 2])
    assert not meter.waits, meter.waits
    for name, gram in here.grams.items():
        assert there.grams[name].num_tokens == gram.num_tokens
        close(there.grams[name].symmetric().cpu(), gram.symmetric(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["Mixtral", "T5"])
def test_a_loss_and_its_gradients(family: str, device: torch.device) -> None:
    model = unfuse(build(family)).eval()
    there = moved(copy.deepcopy(model))
    for loss_on in ("completion", "all"):
        here, other = (token_loss(some, PADDED, loss_on) for some in (model, there))
        close(other.loss_sum.cpu(), here.loss_sum)
        for result in (here, other):
            result.loss_sum.backward()
    for expected, found in zip(gradients(model), gradients(there), strict=True):
        close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_s_forward_and_backward_pass(case: str, emulator_dir: Path, device: torch.device) -> None:
    model = attached(emulator_dir, case, "llama").eval()
    there = moved(copy.deepcopy(model))
    for some, ids in ((model, IDS), (there, IDS.to(device))):
        some(input_ids=ids).logits.square().mean().backward()
    assert gradients(model)
    for expected, found in zip(gradients(model), gradients(there), strict=True):
        close(found, expected, rtol=1e-3)


@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_dropped_rows_are_drawn_where_they_are_dropped(
    case: str, emulator_dir: Path, device: torch.device, meter: Meter
) -> None:
    model = moved(attached(emulator_dir, case, "llama")).train()
    for module in model.modules():
        if hasattr(module, "rank_dropout"):
            module.rank_dropout["default"] = 0.5
    ids = IDS.to(device)
    for _ in range(2):  # of which the first warms it
        meter.restart()
        model(input_ids=ids).logits.square().mean().backward()
    assert not meter.waits, meter.waits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("taught", [False, True])
def test_a_step(
    taught: bool, name: str, checkpointing: bool, emulator_dir: Path, device: torch.device, meter: Meter
) -> None:
    """As the Trainer takes it: batches are made on the CPU, tensors are moved, what else is in them is ours to move."""
    batch = STEPS[name]
    job: Any = SimpleNamespace(loss_on="completion")
    losses, found = [], []
    for model in (attached(emulator_dir, "lora", "llama"), moved(attached(emulator_dir, "lora", "llama"))):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        made = RankBatches(job, None, 1).called(batch, model.config)  # type: ignore[arg-type]
        call = model_call(model.config, batch, "completion")
        inputs = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in made.items()}
        if taught:
            top = teacher_logits(make_model("llama"), batch, "completion", 8)
            inputs["teacher"] = type(top[0])(*(torch.cat(parts) for parts in zip(*map(vars_of, top), strict=True)))
        accelerator = SimpleNamespace(unwrap_model=lambda model: model, num_processes=1, scaler=None)
        trainer: Any = SimpleNamespace(accelerator=accelerator, model=model, is_deepspeed_enabled=False)
        count = torch.tensor(len(call.targets), device=model.device)
        for _ in range(2):  # of which the first warms it
            meter.restart()
            loss = EmulatorTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=count)
            loss.backward()
        assert not meter.waits, meter.waits
        meter.restart()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        trainer.norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        assert EmulatorTrainer.gradients_are_finite(trainer)
        optimizer.step()
        assert meter.waits.total() == (model.device == device)  # of two: the log reads the loss with the other
        losses.append(loss.detach().cpu())
        found.append([p.detach().cpu() for p in model.parameters() if p.requires_grad])
    close(*losses)
    for one, other in zip(*found, strict=True):
        close(other, one, rtol=1e-3)


def vars_of(top: Any) -> tuple[Tensor, Tensor]:
    return top.ids, top.log_probs


def test_a_micro_step_s_logits_are_of_a_chunk(emulator_dir: Path, device: torch.device, meter: Meter) -> None:
    model = moved(attached(emulator_dir, "lora", "llama"))
    batch = collate(random_rows(*[16] * 32), PAD)
    meter.restart()
    token_loss(model, batch, "all").loss_sum.backward()
    assert meter.largest < 32 * 15 * VOCABULARY * 4 / 2


# The host reads the sum and the correct ones of each batch, once all batches are under way.
def test_scores(meter: Meter, device: torch.device) -> None:
    model, many = make_model("llama"), random_rows(13, 5, 8, 21, 4)
    there = moved(copy.deepcopy(model))
    options: dict[str, Any] = {"batch_size": 2, "loss_on": "completion", "pad_token_id": PAD}
    score_rows(there, many, **options, name="x")
    meter.restart()
    found, expected = score_rows(there, many, **options, name="x"), score_rows(model, many, **options, name="x")
    assert meter.waits.total() == 2 * 3, meter.waits
    assert (found.num_correct, found.num_tokens) == (expected.num_correct, expected.num_tokens)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    meter.restart()
    close(losses_by_row(there, many, **options), losses_by_row(model, many, **options))
    assert meter.waits.total() == 3, meter.waits


def test_a_teacher_s_logits(meter: Meter, device: torch.device) -> None:
    model = make_model("llama")
    there = moved(copy.deepcopy(model))
    teacher_logits(there, PADDED, "all", 5)
    meter.restart()
    found = teacher_logits(there, PADDED, "all", 5)
    assert meter.waits.total() == 2
    for one, other in zip(teacher_logits(model, PADDED, "all", 5), found, strict=True):
        close(vars_of(other), vars_of(one))


def test_a_block_is_replayed(tiny_model_dir: Callable[..., Path], device: torch.device, meter: Meter) -> None:
    directory = tiny_model_dir("llama")
    sums, outputs = [], []
    for where in ("cpu", str(device)):
        replay = BlockReplay(directory, device=where)
        call = model_call(replay.model.config, PADDED)
        known: dict[int, BlockOutput] = {}
        groups = groups_of(load_model(directory))
        for position in range(2):
            replay.load_block(position)
            hooks = GramHooks(replay.model, [group for group in groups if f".{position}." in group[0]])
            meter.restart()
            with hooks.counting(call.counted):
                given = replay.forward(position, call.to(replay.device).inputs, known)
            assert not meter.waits, meter.waits
            assert given is not None
            known[position] = given
        sums.append(hooks.grams)
        outputs.append(known[1].tensors[0])
    assert outputs[1].device == device
    close(outputs[1].cpu(), outputs[0], rtol=1e-3)
    for name, gram in sums[0].items():
        close(sums[1][name].symmetric().cpu(), gram.symmetric(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["none", "lora", "prompt"])
def test_completions(case: str, emulator_dir: Path, device: torch.device, tokenizer: Any) -> None:
    model = load_model(emulator_dir) if case == "none" else attached(emulator_dir, case, "llama").eval()
    options: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 2}
    there = moved(copy.deepcopy(model))
    assert complete(there, tokenizer, random_rows(8, 11), **options) == complete(
        model, tokenizer, random_rows(8, 11), **options
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("kind", ["original", "emulator"])
def test_weights_go_from_their_files_to_the_device(
    family: str, kind: str, tiny_model_dir: Callable[..., Path], tmp_path: Path, device: torch.device
) -> None:
    directory = tiny_model_dir(family)
    directory = save_emulator(directory, tmp_path / "emulator") if kind == "emulator" else directory
    here, there = load_model(directory, device="cpu"), load_model(directory, device=str(device))
    assert not hasattr(there, "hf_device_map")  # by which trainers take a model for one in parts
    named = {name: (one, other) for (name, one), other in zip(here.named_parameters(), there.parameters(), strict=True)}
    assert {other.device for _, other in named.values()} == {device}
    for one, other in (*named.values(), *zip(here.buffers(), there.buffers(), strict=True)):
        assert torch.equal(other.cpu(), one)
    close(there(input_ids=IDS.to(device)).logits.cpu(), here(input_ids=IDS).logits)
