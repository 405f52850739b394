"""Refinement: what an emulator has of a block is fitted to what the original's gives (AA-SVD, https://arxiv.org/abs/2604.02119).

The block reads what the emulator's blocks before it give, ``h'``, and aims at what the original's gives for its own input,
``F(h)``: its factors and integers lower

    Σ_tokens ‖F'(h') − F(h)‖² / ‖F(h)‖²

so that they make up for each other's errors, and for those of the blocks before. Each token's error is divided by the token's
own square: the norm that begins the next block divides by it too. In a sum of plain squares the first tokens of rows, which are
hundreds of times as large, would be nearly all.
"""

import math

import torch
from torch import Tensor

from emloc_ray.core.factorization import LowRankFactors

_WARMUP = 5
_LEAST = 1e-12  # of a token's square, where it is all zeros
_TINY = 1e-60


def balanced(up: Tensor, down: Tensor) -> LowRankFactors:
    """The same product in factors of one scale: ``up = A Σ^½ (out, r)`` and ``down = Σ^½ Bᵀ (r, in)``, float32, of its SVD
    ``A Σ Bᵀ``, from the QR of both, in float64; ``r ≤ out, in``. Singular values below 1e-8 of the largest count as that: the
    product is the same.

    A step of Adam changes all elements by about as much: it should be as large beside those of the one as of the other.
    """
    left, upper = torch.linalg.qr(up.double())
    right, other = torch.linalg.qr(down.double().T)
    core = upper @ other.T
    # An SVD takes many times as long, on a GPU above all. With C = A Σ Bᵀ it is Σ^½ Bᵀ = Σ^-½ Aᵀ C.
    squares, a = torch.linalg.eigh(core @ core.T)
    root = squares.clamp_min(1e-16 * squares[-1]).clamp_min(_TINY).pow(0.25)
    return LowRankFactors((left @ (a * root)).float(), ((a.T @ core / root[:, None]) @ right.T).float())


def step_size(step: int, steps: int) -> float:
    """The share of the learning rate at a step, from 0 on: rising over the first five, then a cosine that falls to 0."""
    return min(1.0, (step + 1) / _WARMUP) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def token_error(given: Tensor, wanted: Tensor, counted: Tensor | None = None) -> Tensor:
    """``Σ ‖given − wanted‖² / ‖wanted‖²`` of ``(…, features)`` in float32, over the tokens where ``counted (…)`` is true; else
    all. What the others hold, NaN or Inf, is in neither the sum nor its gradients."""
    wanted = wanted.float()
    difference, squares = given.float() - wanted, wanted.square().sum(dim=-1)
    if counted is not None:  # an index would wait for its size
        difference = difference.masked_fill_(~counted.unsqueeze(-1), 0.0)
        squares = torch.where(counted, squares, 1.0)
    return (difference.square().sum(dim=-1) / squares.clamp_min(_LEAST)).sum()
