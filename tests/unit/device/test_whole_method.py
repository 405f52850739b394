"""What ``tests/gpu`` asks of a GPU, asked of devices that are here: the whole method, and a group of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_on_device import trained_alone, trained_by_group, whole_method
from pretend_device import moved


@pytest.mark.slow
def test_the_whole_method_gives_what_the_cpu_does(device: torch.device) -> None:
    here, there = whole_method(lambda module: module), whole_method(moved)
    assert here["emulator_adapter"] < here["emulator"]
    assert here["merged"] < here["original"] - 0.1
    assert here["correction"] > 0
    assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.deep
def test_a_group_s_adapter_is_that_of_one_process(tmp_path: Path) -> None:
    alone, together = trained_alone("cpu"), trained_by_group(["cpu", "cpu"], tmp_path)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)
    assert any(float(tensor.abs().sum()) > 0 for name, tensor in alone.items() if "lora_B" in name)
