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
    scaled back where rounding has them sum to more than 1. A token may be masked in both, its logit and its log-probability
    -Inf. A float32 scalar, with gradients to ``logits``.
    """
    logits, ids, log_probs = logits.float(), ids.long(), log_probs.float()
    is_whole = ids.shape[-1] == logits.shape[-1]
    excess = log_probs.logsumexp(dim=-1, keepdim=True)
    # Where the least likely of the top has no probability, nor has what is not in it.
    has_all = (log_probs.amin(dim=-1, keepdim=True) == -torch.inf) | is_whole
    p = (log_probs - torch.where(has_all, excess, excess.clamp_min(0))).exp()
    z = torch.where(p > 0, logits.gather(-1, ids), 0.0)  # of a masked token it may be -Inf, and 0 · Inf no number
    total = logits.logsumexp(dim=-1) - (p * z).sum(dim=-1) + torch.xlogy(p, p).sum(dim=-1)
    if not is_whole:
        rest = torch.where(has_all[:, 0], 0.0, 1 - p.sum(dim=-1)).clamp_min(0)
        # Where there is no rest all others may be -Inf: then the top stays among them, so that gradients are finite.
        left_out = torch.zeros_like(rest).masked_fill_(rest > 0, -torch.inf).unsqueeze(-1).expand(ids.shape)
        others = logits.scatter(-1, ids, left_out).logsumexp(dim=-1)
        total = total - rest * others + torch.xlogy(rest, rest)
    return total.sum()
