"""Products of float32 in float32, and where float64 is slow."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from emloc_ray.core.overlapping import Overlapping

P = ParamSpec("P")
R = TypeVar("R")

_MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
# Whose precision theirs is where it is "none"; CUDA's stands at cuDNN.
_PARENTS: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)


def _make_exact() -> tuple[str | None, list[str]]:
    pairs = [(matmul.fp32_precision, parent.fp32_precision) for matmul, parent in zip(_MATMULS, _PARENTS, strict=True)]
    each = ["none" if own == inherited else own for own, inherited in pairs]  # so that it goes on following its parent
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:
        named = None
    torch.set_float32_matmul_precision("highest")
    return named, each


def _set_again(before: tuple[str | None, list[str]]) -> None:
    named, each = before
    if named is not None:
        torch.set_float32_matmul_precision(named)
    for matmul, precision in zip(_MATMULS, each, strict=True):
        matmul.fp32_precision = precision


_EXACT = Overlapping(_make_exact, _set_again)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """While it lasts products of float32 tensors are exact to float32's rounding, in all threads; what was set before is set
    again after the last of those that overlap.

    TF32 and bf16 products keep 10 and 7 bits, too few for Grams, factors and corrections, whose differences are small
    beside what they are taken of. A user may want them in a model's own passes, by ``allow_tf32``,
    ``set_float32_matmul_precision`` or ``fp32_precision``, which torch refuses to read as one another where they differ.
    """
    with _EXACT.block():
        yield


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While it lasts products on a device are of the dtypes that their tensors have, and no weight is kept as autocast casts
    it: older versions of torch give one that was cast without gradients to passes that want them."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def exact_products(function: Callable[P, R]) -> Callable[P, R]:
    """The function as under :func:`exact_float32` and :func:`without_autocast`, on the device of the first tensor it is given."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with exact_float32(), without_autocast(next(devices, torch.device("cpu"))):
            return function(*args, **kwargs)

    return exact


# Of NVIDIA's compute capabilities those with float64 at half float32's speed; others have a 32nd or a 64th of it.
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def computes_bfloat16(device: torch.device | str) -> bool:
    """Whether a GPU has instructions for bfloat16; False of any other device."""
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_fast_float64(device: torch.device) -> bool:
    """Whether a device computes in float64 at about half its speed in float32."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) in FAST_FLOAT64
    return device.type in ("cpu", "cuda")
