"""The divergence from a teacher's top logits, against torch's own over whole vocabularies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from emloc_ray.core.distillation import divergence, top_log_probs


def logits(*shape: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_whole_vocabulary_is_torchs_kl_div_with_gradients() -> None:
    teacher = logits(7, 50, seed=0)
    ours, theirs = (logits(7, 50, seed=1).requires_grad_() for _ in range(2))
    found = divergence(ours, *top_log_probs(teacher, 50))
    expected = F.kl_div(theirs.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 49])
def test_all_other_tokens_count_as_one(k: int) -> None:
    teacher, student = logits(7, 50, seed=0), logits(7, 50, seed=1).double().requires_grad_()
    ids, log_probs = top_log_probs(teacher, k)
    p, q = teacher.double().softmax(-1), student.softmax(-1)
    assert torch.equal(ids, p.argsort(-1, descending=True)[:, :k])
    tops = (p.gather(-1, ids), q.gather(-1, ids))
    joined_p, joined_q = (torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1) for top in tops)
    expected = (joined_p * (joined_p / joined_q).log()).sum()
    ours = student.detach().float().requires_grad_()
    found = divergence(ours, ids, log_probs)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    whole = F.kl_div(student.log_softmax(-1), p.log(), reduction="sum", log_target=True)
    assert found <= whole + 1e-4
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, student.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [4, 50])
def test_a_model_that_is_its_teacher_has_none_and_stays(k: int) -> None:
    teacher = logits(7, 50, seed=0)
    student = teacher.clone().requires_grad_()
    found = divergence(student, *top_log_probs(teacher, k))
    assert abs(float(found.detach())) < 1e-4
    found.backward()
    assert float(student.grad.abs().max()) < 1e-5


def test_half_precision_on_disk_moves_it_little() -> None:
    teacher, student = logits(200, 5000, seed=0), logits(200, 5000, seed=1)
    ids, log_probs = top_log_probs(teacher, 64)
    exact, rounded = divergence(student, ids, log_probs), divergence(student, ids.int(), log_probs.half())
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)


def test_a_teacher_that_is_certain_leaves_finite_gradients() -> None:
    teacher = torch.zeros(3, 20)
    teacher[:, 0] = 1e4
    ids, log_probs = top_log_probs(teacher, 4)
    student = logits(3, 20, seed=1).requires_grad_()
    found = divergence(student, ids, log_probs.half())
    torch.testing.assert_close(found, F.cross_entropy(student, torch.zeros(3, dtype=torch.long), reduction="sum"))
    found.backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [2, 14, 20])
def test_tokens_that_both_mask_count_for_nothing(k: int, dtype: torch.dtype) -> None:
    """Of 20 the last 8: with k of 14 the top holds masked ones and all others are, with 20 it is the whole vocabulary."""
    teacher, student = logits(7, 20, seed=0), logits(7, 20, seed=1)
    teacher[:, 12:] = student[:, 12:] = -torch.inf
    ids, log_probs = top_log_probs(teacher, k)
    ours, plain = student.requires_grad_(), student.detach()[:, :12].requires_grad_()
    found = divergence(ours, ids, log_probs.to(dtype))
    kept = min(k, 12)
    expected = divergence(plain, ids[:, :kept], log_probs[:, :kept].to(dtype))
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad[:, :12], plain.grad)
    assert not ours.grad[:, 12:].any()
