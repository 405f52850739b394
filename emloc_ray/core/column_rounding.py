"""Columns of a weight rounded one after another, each making up for those before it.

All arrays have a column of the weight in each row, ``(n, out)``, in the order of rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from emloc_ray.core.compiled import compiled_or


def round_in_turn(
    targets: Tensor,
    mixing: Tensor,
    reference: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: int,
    codes: Tensor,
    changes: Tensor,
) -> None:
    """Writes the ``codes`` q, uint8, and the ``changes`` x of the columns:

        t_k = targets_k + Σ_{j<k} mixing_kj x_j,    q_k = the nearest of 0 … top to t_k / s_k + z_k,
        x_k = reference_k − s_k (q_k − z_k)

    ``mixing (n, n)`` is read below its diagonal, all else is ``(n, out)``. On CUDA by one kernel, where Triton compiles it.
    """
    arguments = (targets, mixing, reference, scales, zeros)
    if targets.is_cuda:
        cuda_rounding()(*(tensor.contiguous() for tensor in arguments), top, codes, changes)
    else:
        step_by_step(*arguments, top, codes, changes)


def step_by_step(
    targets: Tensor,
    mixing: Tensor,
    reference: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: int,
    codes: Tensor,
    changes: Tensor,
) -> None:
    """As :func:`round_in_turn`, by torch alone."""
    for k in range(len(targets)):
        target = torch.addmv(targets[k], changes[:k].T, mixing[k, :k])
        code = target.div_(scales[k]).add_(zeros[k]).round_().clamp_(0, top)
        codes[k] = code
        torch.sub(reference[k], code.sub_(zeros[k]).mul_(scales[k]), out=changes[k])


@functools.cache
def cuda_rounding() -> Callable[..., None]:
    """The kernel; :func:`step_by_step` where nothing here compiles it."""
    return compiled_or(step_by_step, _compiled, "rounds weights to integers")


def _compiled() -> Callable[..., None]:
    from emloc_ray.core.rounding_kernel import round_by_kernel

    one, codes = torch.ones(2, 8, device="cuda"), torch.empty(2, 8, dtype=torch.uint8, device="cuda")
    round_by_kernel(one, torch.ones(2, 2, device="cuda"), one, one, one, 3, codes, torch.empty_like(one))
    return round_by_kernel
