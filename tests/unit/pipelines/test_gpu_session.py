"""What the benchmark of a GPU notes of a case is of the case alone, and is all that tells its figures from others."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import speeds
from benchmarks.gpu.session import Session, machine
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.training import host_syncs

from emloc_ray.planning.machine import Speeds


def test_that_torch_finds_waits_at_all_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(mode: str) -> None:  # as torch's own, once a process
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations.", stacklevel=2)

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at …)", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", told)
    assert host_syncs(lambda: None) == 0
    assert host_syncs(wait) == 1


def test_a_case_that_was_warned_says_so(tmp_path: Path) -> None:
    """As where a kernel is not compiled, and what takes several times as long is measured in its place."""

    def warn() -> dict[str, Any]:
        for _ in range(2):
            warnings.warn("The kernel cannot be compiled here.", stacklevel=2)
            warnings.warn("That name is old.", FutureWarning, stacklevel=2)
        return {"s": 1.0}

    def fail() -> dict[str, Any]:
        warn()
        raise ValueError("No.")

    session = Session("cpu", SHAPES["tiny"], tmp_path, minutes=1)
    for case, action in {"warned": warn, "failed": fail, "silent": dict}.items():
        session.measure("part", case, 0, action)
    measured = json.loads((tmp_path / "gpu.json").read_text())["measured"]["part"]
    assert measured["warned"]["warned"] == measured["failed"]["warned"] == ["The kernel cannot be compiled here."]
    assert "warned" not in measured["silent"]


def test_a_device_that_fails_for_good_ends_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving memory back, which waits for it, raises from then on; what was measured before makes its lines."""
    session = Session("cpu", SHAPES["tiny"], tmp_path, minutes=1)
    broken = False

    def give_back() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal address. More")

    def fail() -> dict[str, Any]:
        nonlocal broken
        broken = True
        raise ValueError("No.")

    def fail_later() -> dict[str, Any]:
        nonlocal broken
        broken = True
        return {"s": 2.0}

    monkeypatch.setattr(session, "give_back", give_back)
    session.measure("part", "whole", 0, lambda: {"s": 1.0})
    session.measure("part", "last", 0, fail_later)
    session.measure("part", "none", 0, lambda: pytest.fail("on a device that no longer works"))
    broken = False
    session.measure("part", "failing", 0, fail)
    measured = json.loads((tmp_path / "gpu.json").read_text())["measured"]["part"]
    for case in measured.values():
        del case["seconds"]
    sentence = "RuntimeError: CUDA error: an illegal address."
    assert measured == {
        "whole": {"s": 1.0},
        "last": {"s": 2.0, "failed": sentence},
        "none": {"failed": sentence},
        "failing": {"failed": "ValueError: No."},
    }


def test_on_a_slower_card_more_time_has_to_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what cases that ended well took: those that failed or were left out say nothing of it."""
    now = 0.0

    def measured(needs_s: float, takes_s: float, error: Exception | None = None) -> dict[str, Any]:
        def action() -> dict[str, Any]:
            nonlocal now
            now += takes_s
            if error is not None:
                raise error
            return {}

        return session.measure("part", "case", needs_s, action)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    session = Session("cpu", SHAPES["full"], tmp_path, minutes=5)
    measured(10, 5)
    assert measured(295, 0, ValueError("No."))["seconds"] == 0  # on a quicker card no less is asked for
    assert "left_out" in measured(296, 0)
    measured(10, 75)
    measured(1, 50, ValueError("No."))
    measured(1, 50, ImportError("No."))
    left_out = "It takes about 124 s, and 120 s were left."  # four times 31
    assert measured(31, 0) == {"left_out": left_out}
    assert measured(30, 0)["seconds"] == 0


def test_small_shapes_say_nothing_of_a_card(tmp_path: Path) -> None:
    session = Session("cpu", SHAPES["tiny"], tmp_path, minutes=1)
    assert all("left_out" not in session.measure("part", "case", 1000, dict) for _ in range(2))


def test_a_machine_says_what_compiles_kernels_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = machine(torch.device("cpu"))
    assert found["gcc"] is False
    assert {"triton", "torch", "peft"} <= found.keys()


def test_a_plan_s_speeds_stand_beside_the_data_sheet_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session("cpu", SHAPES["tiny"], tmp_path, minutes=1)
    speeds.speeds(session)
    assert not session.measured
    monkeypatch.setattr(session, "is_cuda", True)
    monkeypatch.setattr(session, "give_back", lambda: None)
    monkeypatch.setattr(speeds, "assumed_speeds", lambda: Speeds(1.0, 7e14, 5e13, 5e10, 2e12))
    monkeypatch.setattr(speeds, "measured_speeds", lambda: Speeds(1.0, 8e14, 4e13, 55e9, 3e12, measured=True))
    speeds.speeds(session)
    sides = [(line["ours"], line["baseline"]) for line in session.parts["speeds"].values()]
    assert sides == [(800.0, 700.0), (40.0, 50.0), (55.0, 50.0), (3000.0, 2000.0)]
    monkeypatch.setattr(speeds, "measured_speeds", lambda: Speeds(1.0))
    speeds.speeds(session)
    assert "nvidia-smi" in session.measured["speeds"]["a plan's"]["failed"]
