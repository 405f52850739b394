"""Columns rounded in turn: by the formula, one number at a time; and the kernel of GPUs, which Triton's interpreter runs here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emloc_ray.core.column_rounding import cuda_rounding, step_by_step

ROOT = Path(__file__).parents[3]


def drawn(n: int, out: int, top: int) -> tuple[Tensor, ...]:
    """targets, mixing, reference, scales and zeros."""
    generator = torch.Generator().manual_seed(n + out)
    targets, reference = (torch.randn(n, out, generator=generator) for _ in range(2))
    mixing = 0.05 * torch.randn(n, n, generator=generator)  # above its diagonal too, which is not read
    scales = 0.2 * torch.rand(n, out, generator=generator) + 0.05
    return targets, mixing, reference, scales, top * torch.rand(n, out, generator=generator)


@pytest.mark.parametrize(("n", "out", "top"), [(1, 3, 15), (9, 5, 3), (20, 4, 255)])
def test_each_column_hears_of_those_before(n: int, out: int, top: int) -> None:
    targets, mixing, reference, scales, zeros = drawn(n, out, top)
    codes, made = torch.empty(n, out, dtype=torch.uint8), torch.empty(n, out)
    before = targets.clone()
    step_by_step(targets, mixing, reference, scales, zeros, top, codes, made)
    assert torch.equal(targets, before)
    for row in range(out):
        x: list[float] = []
        for k in range(n):
            target = float(targets[k, row]) + sum(float(mixing[k, j]) * x[j] for j in range(k))
            place = min(max(target / float(scales[k, row]) + float(zeros[k, row]), 0.0), top)
            code = int(codes[k, row])
            assert abs(code - place) <= 0.5 + 1e-4
            x.append(float(reference[k, row]) - float(scales[k, row]) * (code - float(zeros[k, row])))
            assert float(made[k, row]) == pytest.approx(x[-1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
def test_the_kernel_gives_the_same_bits() -> None:
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_column_rounding import drawn
from emloc_ray.core.column_rounding import step_by_step
from emloc_ray.core.rounding_kernel import round_by_kernel
for n, out, top in ((64, 96, 15), (37, 33, 3), (64, 70, 255)):
    found = []
    for compute in (step_by_step, round_by_kernel):
        found.append((torch.empty(n, out, dtype=torch.uint8), torch.empty(n, out)))
        compute(*drawn(n, out, top), top, *found[-1])
    (codes, made), (others, theirs) = found
    assert torch.equal(codes, others) and torch.equal(made, theirs), (n, out, top)
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_where_nothing_compiles_it_goes_on_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    cuda_rounding.cache_clear()
    with pytest.warns(UserWarning, match=r"kernel that rounds weights to integers cannot .* install a C compiler"):
        assert cuda_rounding() is step_by_step
    cuda_rounding.cache_clear()
