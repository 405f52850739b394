"""The divergence from a teacher in a model's head: in chunks as whole, for decoders and encoder-decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import build
from stage_artifacts import half_rows
from tiny import PAD, VOCABULARY, make_model

from emloc_ray.data.token_shards import collate
from emloc_ray.errors import ArtifactError
from emloc_ray.modeling import loss
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import TopLogProbs, teacher_logits, token_loss


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    return collate(half_rows(*lengths), PAD)


def joined(rows: list[TopLogProbs]) -> TopLogProbs:
    return TopLogProbs(torch.cat([row.ids for row in rows]), torch.cat([row.log_probs for row in rows]))


def plain_divergence(student: Any, teacher: Any, batch: dict[str, torch.Tensor], loss_on: str) -> torch.Tensor:
    """By torch, from both models' whole logits."""
    call = model_call(student.config, batch, loss_on)
    with torch.no_grad():
        target = teacher(**call.inputs).logits[call.predicting].float().log_softmax(-1)
    ours = student(**call.inputs).logits[call.predicting].float().log_softmax(-1)
    return F.kl_div(ours, target, reduction="sum", log_target=True)


@pytest.mark.parametrize("share", [1, 16])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_torchs_own_with_gradients(
    monkeypatch: pytest.MonkeyPatch, family: str, loss_on: str, share: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK_SHARE", share)
    batch = batch_of(13, 5, 8)
    teacher = make_model(family, seed=1)
    rows = teacher_logits(teacher, batch, loss_on, VOCABULARY)
    assert [len(row.ids) for row in rows] == ([7, 3, 4] if loss_on == "completion" else [12, 4, 7])
    ours, theirs = make_model(family), make_model(family)
    result = token_loss(ours, batch, loss_on, teacher=joined(rows))
    expected = plain_divergence(theirs, teacher, batch, loss_on)
    torch.testing.assert_close(result.loss_sum, expected, rtol=1e-4, atol=1e-5)
    assert result.num_tokens == sum(len(row.ids) for row in rows)
    assert int(result.num_correct) == int(token_loss(ours, batch, loss_on).num_correct)
    result.loss_sum.backward()
    expected.backward()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=1e-3, atol=1e-5)


def test_top_logits_in_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("llama"), batch_of(13, 5, 8)
    monkeypatch.setattr(loss, "CHUNK_SHARE", 1)
    whole = joined(teacher_logits(model, batch, "all", 4))
    monkeypatch.setattr(loss, "CHUNK_SHARE", 21)  # three tokens
    parts = joined(teacher_logits(model, batch, "all", 4))
    assert torch.equal(whole.ids, parts.ids)
    torch.testing.assert_close(whole.log_probs, parts.log_probs)
    assert "forward" not in vars(model.lm_head)
    assert not whole.log_probs.requires_grad


def test_a_row_of_one_token_has_no_label() -> None:
    model, batch = make_model("llama"), batch_of(1, 5)
    rows = teacher_logits(model, batch, "all", 4)
    assert [len(row.ids) for row in rows] == [0, 4]
    assert token_loss(model, batch, "all", teacher=joined(rows)).num_tokens == 4
    alone = batch_of(1)
    nothing = token_loss(model, alone, "all", teacher=joined(teacher_logits(model, alone, "all", 4)))
    assert float(nothing.loss_sum.detach()) == 0
    assert nothing.num_tokens == 0


def test_an_encoder_decoder() -> None:
    model, teacher, batch = build("T5"), build("T5"), batch_of(13, 5, 8)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    rows = teacher_logits(teacher, batch, "completion", VOCABULARY)
    assert [len(row.ids) for row in rows] == [7, 3, 4]
    found = token_loss(model, batch, "completion", teacher=joined(rows)).loss_sum
    expected = plain_divergence(model, teacher, batch, "completion")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_other_rows_is_refused() -> None:
    model = make_model("llama")
    rows = teacher_logits(model, batch_of(5), "all", 4)
    with pytest.raises(ArtifactError, match="of 4 labels, the batch has 7"):
        token_loss(model, batch_of(8), "all", teacher=joined(rows))
