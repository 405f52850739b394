"""What the benchmark of a GPU notes of a case is of the case alone, and is all that tells its figures from others."""

from __future__ import annotations

import warnings

import pytest
import torch
from benchmarks.gpu.training import host_syncs


def test_that_torch_finds_waits_at_all_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(mode: str) -> None:  # as torch's own, once a process
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations.", stacklevel=2)

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", told)
    assert host_syncs(lambda: None) == 0
    assert host_syncs(wait) == 1
