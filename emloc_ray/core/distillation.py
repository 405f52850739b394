"""Distillation: how far a model's predictions are from a teacher's, of whose distribution the top is known."""

import torch
from torch import Tensor


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` likeliest tokens of each position of ``logits (N, V)``, likeliest first, all where there are no more:
    ``ids (N, k)`` int64 and ``log_probs (N, k)`` float32, logits less their log-sum-exp."""
    logits = logits.float()
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return ids, values - logits.logsumexp(dim=-1, keepdim=True)


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """``Σ_n KL(p ‖ q)`` in nats, with all tokens that are not among the teacher's top counted as one:

        KL = Σ_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)

    which is at most the divergence over the whole vocabulary (data processing), and the same where k is all of it. With
    ``q = softmax(z)`` it is ``logsumexp(z) − Σ_k p_k z_k − p_rest logsumexp(z_rest) − H(p)``: no log-softmax is made.

    ``logits`` are the student's ``z (N, V)``; ``ids`` and ``log_probs``, ``(N, k)`` in any float type, are the teacher's,
    scaled back where rounding has them sum to more than 1. A float32 scalar, with gradients to ``logits``.
    """
    logits, ids, log_probs = logits.float(), ids.long(), log_probs.float()
    is_whole = ids.shape[-1] == logits.shape[-1]
    excess = log_probs.logsumexp(dim=-1, keepdim=True)
    p = (log_probs - (excess if is_whole else excess.clamp_min(0))).exp()
    total = logits.logsumexp(dim=-1) - (p * logits.gather(-1, ids)).sum(dim=-1) + torch.xlogy(p, p).sum(dim=-1)
    if not is_whole:
        rest = (1 - p.sum(dim=-1)).clamp_min(0)
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)
        total = total - rest * others + torch.xlogy(rest, rest)
    return total.sum()
