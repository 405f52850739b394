"""Columns of a weight rounded one after another, each making up for those before it.

All arrays have a column of the weight in each row, ``(n, out)``, in the order of rounding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def round_in_turn(
    targets: Tensor, mixing: Tensor, left: Tensor, scales: Tensor, zeros: Tensor, top: int, codes: Tensor, made: Tensor
) -> None:
    """Writes the ``codes`` q, uint8, and what is ``made`` of them, x:

        t_k = targets_k + Σ_{j<k} mixing_kj x_j,    q_k = the nearest of 0 … top to t_k / s_k + z_k,
        x_k = left_k − s_k (q_k − z_k)

    ``mixing (n, n)`` is read below its diagonal, all else is ``(n, out)``. On CUDA by one kernel, where Triton compiles it.
    """
    arguments = (targets, mixing, left, scales, zeros)
    if targets.is_cuda:
        on_cuda()(*(tensor.contiguous() for tensor in arguments), top, codes, made)
    else:
        step_by_step(*arguments, top, codes, made)


def step_by_step(
    targets: Tensor, mixing: Tensor, left: Tensor, scales: Tensor, zeros: Tensor, top: int, codes: Tensor, made: Tensor
) -> None:
    """As :func:`round_in_turn`, by torch alone."""
    for k in range(len(targets)):
        target = torch.addmv(targets[k], made[:k].T, mixing[k, :k])
        code = target.div_(scales[k]).add_(zeros[k]).round_().clamp_(0, top)
        codes[k] = code
        torch.sub(left[k], code.sub_(zeros[k]).mul_(scales[k]), out=made[k])


@functools.cache
def on_cuda() -> Callable[..., None]:
    """The kernel; :func:`step_by_step` where there is no Triton, or it compiles nothing here: it needs a C compiler."""
    try:
        from emloc_ray.core.rounding_kernel import in_one_kernel

        one = torch.ones(2, 8, device="cuda")
        codes = torch.empty(2, 8, dtype=torch.uint8, device="cuda")
        in_one_kernel(one, one[:, :2].contiguous(), one, one, one, 3, codes, torch.empty_like(one))
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"Triton cannot compile what rounds weights to integers ({type(error).__name__}), so that making an emulator takes"
            " many times as long: install a C compiler, such as gcc, beside torch's own triton.",
            stacklevel=2,
        )
        return step_by_step
    return in_one_kernel
