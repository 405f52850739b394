"""A kernel that cannot be compiled is told of, and what computes the same is taken."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from emloc_ray.core.compiled import compiled_or


def fallback() -> int:
    return 1


def kernel() -> int:
    return 2


def test_a_kernel_that_compiles_is_taken() -> None:
    assert compiled_or(fallback, lambda: kernel, "counts") is kernel


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no triton"),
        RuntimeError("Failed to find C compiler."),
        subprocess.CalledProcessError(1, ["gcc"]),  # as where Python.h is missing
    ],
)
def test_whatever_a_compiler_raises_the_fallback_is_taken_and_that_is_told(error: Exception) -> None:
    def fail() -> Callable[[], int]:
        raise error

    told = rf"The kernel that counts cannot be compiled here \({type(error).__name__}\).* install a C compiler"
    with pytest.warns(UserWarning, match=told):
        assert compiled_or(fallback, fail, "counts") is fallback
