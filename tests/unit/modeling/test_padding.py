"""Right-padded rows without a mask: what comes out is what comes out with one, in every pass that is made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from adapter_cases import CASES, attached
from stage_artifacts import half_rows
from tiny import PAD, VOCABULARY, save_emulator
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig
from vlms import VLMS, save_vlm

from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import collate
from emloc_ray.modeling import inputs
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.experts import unfuse
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.inputs import model_call, sees_later_tokens
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import teacher_logits, token_loss
from emloc_ray.modeling.scoring import losses_by_row, score_rows

PADDED = collate(half_rows(13, 5, 8), PAD)
ROWS = [Tokens(list(range(5, 5 + length)), [False, False, *[True] * (length - 2)]) for length in (13, 5, 8)]
DECODERS = [family for family in families.FAMILIES if family not in ("T5", "BART")]
SCORED: dict[str, Any] = {"batch_size": 3, "loss_on": "completion", "pad_token_id": PAD}


def training(model: Any, batch: dict[str, Tensor]) -> Any:
    result = token_loss(model, batch, "all")
    result.loss_sum.backward()
    return result.loss_sum.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def calibration(model: Any, batch: dict[str, Tensor]) -> Any:
    hooks = GramHooks(model, [[spec.name] for spec in block_linears(model)])
    hooks.forward(batch)
    return [gram.symmetric() for gram in hooks.grams.values()]


def gradients(model: Any, batch: dict[str, Tensor]) -> Any:
    hooks = GradientHooks(model, [spec.name for spec in block_linears(model)], loss_on="all")
    hooks.forward(batch, "all", range(3))
    return [gram.symmetric() for gram in hooks.grams.values()]


def teacher(model: Any, batch: dict[str, Tensor]) -> Any:
    return [row.log_probs for row in teacher_logits(model, batch, "all", 5)]


def evaluation(model: Any, batch: dict[str, Tensor]) -> Any:
    return torch.tensor(score_rows(model, ROWS, **SCORED, name="x").loss_sum)


def search(model: Any, batch: dict[str, Tensor]) -> Any:
    return losses_by_row(model, ROWS, **SCORED).sums


PASSES: tuple[Callable[..., Any], ...] = (training, calibration, gradients, teacher, evaluation, search)


def both_ways(
    run: Callable[..., Any], model: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """What a pass gives without a mask, and with one."""
    asked: list[bool] = []
    results = []
    for some, masked in ((model, False), (copy.deepcopy(model), True)):
        monkeypatch.setattr(inputs, "sees_later_tokens", lambda config, masked=masked: asked.append(masked) or masked)
        results.append(tree_leaves(run(some, batch)))
    assert set(asked) == {False, True}
    return results[0], results[1]


def assert_equal(results: tuple[list[Tensor], list[Tensor]]) -> None:
    assert results[0]
    for plain, masked in zip(*results, strict=True):
        torch.testing.assert_close(plain, masked, rtol=1e-3, atol=1e-6 + 1e-3 * float(masked.abs().max()))


@pytest.mark.parametrize("run", PASSES, ids=lambda run: run.__name__)
def test_each_pass_is_what_it_is_with_a_mask(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("Llama", "Mixtral"):
        model = unfuse(families.build(family).requires_grad_(run is training))
        assert_equal(both_ways(run, model, PADDED, monkeypatch))
        monkeypatch.undo()


@pytest.mark.parametrize("family", DECODERS)
def test_each_family_s_loss_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if sees_later_tokens(families.FAMILIES[family]()):  # GPT-NeoX might, as its config has it
        assert family == "GPT-NeoX"
        return
    assert_equal(both_ways(training, families.build(family), PADDED, monkeypatch))


@pytest.mark.parametrize("kind", VLMS)
def test_each_family_that_reads_images(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_vlm(kind, tmp_path)
    images = ImageInputs(directory)
    blank = images.blank_row()
    shown = Tokens([*blank.input_ids, 7, 8, 9], [False] * len(blank) + [True] * 3, blank.images)
    longer = Tokens([5] * (len(shown) + 9), [True] * (len(shown) + 9))
    batch = collate([shown, longer], PAD, images)
    assert_equal(both_ways(training, load_model(directory).requires_grad_(True), batch, monkeypatch))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", ["lora", "prefix", "prompt"])
def test_an_adapter_s(
    case: str, family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert case in CASES
    model = attached(save_emulator(tiny_model_dir(family), tmp_path / "emulator"), case, family).eval()
    assert_equal(both_ways(training, model, PADDED, monkeypatch))


def test_an_encoder_s_padding_is_masked_and_its_decoder_s_is_not() -> None:
    called = model_call(families.FAMILIES["T5"](), PADDED).inputs
    assert not called["attention_mask"].all()
    assert called["decoder_attention_mask"] is None


@pytest.mark.parametrize(("model_type", "expected"), [("bert", True), ("xlnet", True), ("llama", False)])
def test_a_token_that_sees_later_ones(model_type: str, expected: bool) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY)
    assert sees_later_tokens(config) is expected
    assert (model_call(config, PADDED).inputs["attention_mask"] is not None) is expected
