"""Kernels that are compiled where they are first used, on machines that may lack what that takes."""

import warnings
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def compiled_or(fallback: F, compile_kernel: Callable[[], F], purpose: str) -> F:
    """What ``compile_kernel()`` gives once it has run; where it raises, a warning and the ``fallback``, which computes the same.

    ``purpose`` completes "the kernel that …".
    """
    try:
        return compile_kernel()
    except Exception as error:  # noqa: BLE001  a compiler's, its linker's, Triton's: whatever it is, the fallback serves
        warnings.warn(
            f"The kernel that {purpose} cannot be compiled here ({type(error).__name__}), and without it that takes several times"
            " as long: install a C compiler, such as gcc, and Python's headers.",
            stacklevel=2,
        )
        return fallback
