"""Weights out of their bytes: what a GPU would compute in one kernel is what a CPU computes step by step, to the bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from emloc_ray.core.integer_forms import BITS, packed_width
from emloc_ray.core.unpacking import by_elements, by_shapes, by_words, cuda_unpacking

SHAPES = [(3, 1, 8), (5, 24, 24), (4, 100, 56), (7, 576, 64), (2, 84, 40)]


def drawn(rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    groups = math.ceil(columns / group_size)
    shapes = [(rows, packed_width(columns, bits)), (rows, groups), (rows, groups)]
    tensors = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]
    return *tensors, torch.tensor(-24.0, dtype=dtype), bits, columns, group_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_both_ways_give_the_same_bits(bits: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, group_size = shape
    arguments = drawn(rows, columns, bits, group_size, dtype)
    weight = by_words(*arguments)
    assert weight.shape == (rows, columns)
    assert weight.dtype == dtype
    assert torch.equal(by_elements(*arguments), weight)


def test_no_more_shapes_are_compiled_than_there_are_graphs() -> None:
    taken: list[str] = []

    def tell(name: str) -> Any:
        return lambda *arguments: taken.append(name) or by_words(*arguments)

    function = by_shapes(tell("compiled"), tell("step by step"), limit=2)
    for columns, bits in ((64, 4), (32, 4), (64, 4), (64, 2), (32, 4)):
        function(*drawn(3, columns, bits, 32, torch.bfloat16))
    assert taken == ["compiled", "compiled", "compiled", "step by step", "compiled"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    cuda_unpacking.cache_clear()
    yield
    cuda_unpacking.cache_clear()


@pytest.mark.slow  # inductor compiles C++ for some seconds
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
@pytest.mark.parametrize("bits", BITS)
def test_it_compiles_to_one_kernel_for_each_shape(bits: int) -> None:
    from torch._inductor import metrics

    compiled = cuda_unpacking(torch.device("cpu"))
    metrics.reset()
    shapes = ((7, 576, 64), (9, 320, 64), (16, 128, 32))
    for rows, columns, group_size in (*shapes, *shapes):
        arguments = drawn(rows, columns, bits, group_size, torch.bfloat16)
        # A scale, a power of two, may differ in its last bit in float32.
        found, weight = compiled(*arguments), by_words(*arguments)
        torch.testing.assert_close(found, weight, rtol=2**-7, atol=0)
        assert (found == weight).float().mean() > 0.999
    assert metrics.generated_kernel_count == len(shapes)


def test_a_second_thread_has_as_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config

    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *arguments: torch.tensor(config.recompile_limit))
    unpack = cuda_unpacking(torch.device("cpu"))
    with ThreadPoolExecutor(1) as other:
        assert other.submit(unpack).result() == unpack() >= 256


def test_where_nothing_compiles_it_goes_on_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("Failed to find C compiler.")

        return fail

    monkeypatch.setattr(torch, "compile", lacking)
    with pytest.warns(UserWarning, match=r"kernel that unpacks weights of few bits cannot .* install a C compiler"):
        assert cuda_unpacking(torch.device("cpu")) is by_words
