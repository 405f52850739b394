"""Weights as integers: every code, scale and zero point comes back from what is stored, in the bytes that were said."""

import pytest
import torch

from emloc_ray.core.integer_forms import BITS, group_size_of, integer_bytes, num_groups
from emloc_ray.core.integers import IntegerWeight, dense_weight, stored_bits


def _drawn(rows: int, columns: int, bits: int, group_size: int, exponent: int = -20) -> IntegerWeight:
    torch.manual_seed(rows + columns + bits)
    groups = num_groups(columns, group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scales, zeros = (torch.randint(0, 256, (rows, groups), dtype=torch.uint8) for _ in range(2))
    return IntegerWeight(codes, scales, zeros, exponent, bits, group_size_of(columns, groups))


@pytest.mark.parametrize("columns", [1, 5, 8, 24, 64, 100, 576])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_stored_is_the_weight(bits: int, columns: int) -> None:
    drawn = _drawn(3, columns, bits, 64)
    tensors = drawn.tensors(torch.bfloat16)
    step = 255 // (2**bits - 1)
    groups = torch.arange(columns) // drawn.group_size
    scale, zero = drawn.scales.double()[:, groups], drawn.zeros.double()[:, groups]
    wanted = 2 ** (scale / 8 - 20) * (drawn.codes.double() - zero / step)
    assert stored_bits(tensors) == bits
    assert torch.equal(dense_weight(drawn.tensors(torch.float32), columns), drawn.dense())
    assert torch.allclose(drawn.dense().double(), wanted, rtol=1e-5, atol=1e-12)
    assert dense_weight(tensors, columns).dtype == torch.bfloat16
    assert sum(tensor.nbytes for tensor in tensors.values()) == integer_bytes(3, columns, bits, 64, itemsize=2)


@pytest.mark.parametrize(("bits", "bits_an_element"), [(2, 2.25), (3, 3.25), (4, 4.25), (8, 8.25)])
def test_groups_of_64_take_a_quarter_of_a_bit_more(bits: int, bits_an_element: float) -> None:
    assert 8 * (integer_bytes(512, 512, bits, 64) - 4) / 512**2 == bits_an_element


def test_groups_of_a_row_are_of_one_size() -> None:
    assert group_size_of(576, num_groups(576, 64)) == 64
    assert group_size_of(100, num_groups(100, 64)) == 56  # 56 and 44, not 64 and 36
    assert group_size_of(24, num_groups(24, 64)) == 24
    for columns in range(1, 300):
        groups = num_groups(columns, 32)
        size = group_size_of(columns, groups)
        assert size <= 32
        assert num_groups(columns, size) == groups


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_exponent_survives_every_dtype(dtype: torch.dtype) -> None:
    for exponent in (-140, -33, 0, 90):
        drawn = _drawn(2, 16, 4, 16, exponent)
        assert float(drawn.tensors(dtype)["exponent"]) == exponent
