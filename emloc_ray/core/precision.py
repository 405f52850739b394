"""Products of float32 in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """While it lasts products of float32 tensors are exact to float32's rounding; what was set before is set again after.

    TF32 and bf16 products keep 10 and 7 bits, too few for Grams, factors and corrections, whose differences are small
    beside what they are taken of. A user may want them in a model's own passes, by ``allow_tf32``,
    ``set_float32_matmul_precision`` or ``fp32_precision``, which torch refuses to read as one another where they differ.
    """
    each = [getattr(matmul, "fp32_precision", None) for matmul in _MATMULS]  # since torch 2.9
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:
        named = None
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if named is not None:
            torch.set_float32_matmul_precision(named)
        for matmul, precision in zip(_MATMULS, each, strict=True):
            if precision is not None:
                matmul.fp32_precision = precision
