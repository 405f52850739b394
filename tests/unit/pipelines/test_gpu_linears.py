"""What the benchmark of a GPU says of single linears is of their work, not of the first call in a process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import linears
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import SHAPES

from emloc_ray.core.whitening import Whitening


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("cpu", replace(SHAPES["tiny"], linears=((64, 64), (64, 128))), tmp_path, minutes=1)


def test_each_kind_of_work_runs_once_under_sums_of_its_own_before_it_is_timed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, tuple[int, ...], Whitening]] = []

    def noting(name: str) -> Callable[..., Any]:
        work = getattr(linears, name)

        def run(weight: Any, whitening: Whitening, *rest: Any) -> Any:
            calls.append((name, tuple(weight.shape), whitening))
            return work(weight, whitening, *rest)

        return run

    for name in ("factorize", "quantize", "spectrum"):
        monkeypatch.setattr(linears, name, noting(name))
    linears.on_device(session)
    counts = Counter((name, shape) for name, shape, _ in calls)
    ratios = len(linears.RATIOS)
    assert counts["factorize", (64, 64)] == counts["factorize", (64, 128)] == 2 * ratios
    assert counts["quantize", (64, 64)] == counts["quantize", (64, 128)] == counts["spectrum", (64, 64)] == 2
    assert len({id(whitening) for *_, whitening in calls}) == len(calls)


def test_a_model_s_seconds_are_of_all_linears_that_a_measured_shape_holds(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the roots of its Grams: a block's queries, keys and values read one tensor, its gate and its up projection
    another."""
    figures = {"factorize_s": 1.0, "cholesky_s": 10.0, "s": 2.0}
    monkeypatch.setattr(session, "measure", lambda part, case, *_: _note(session, part, case, figures))
    linears.on_device(session)
    [(what, line)] = [each for each in session.parts["factorization"].items() if "at ratio" in each[0]]
    blocks = session.shapes.model["num_hidden_layers"]
    larger = "4 as long as of a larger shape"
    assert what == f"10 of the model's 14 linears at ratio 0.5, {larger}, and the roots of 8 Grams"
    assert line["ours"] == blocks * (5 * 1.0 + 4 * 10.0)
    assert session.parts["correction"][f"10 of the model's 14 linears, {larger}"]["ours"] == blocks * 5 * 2.0


def test_the_cpu_is_warm_too_when_it_corrects(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_ups: list[int] = []

    def timed(action: Callable[[], Any], repeats: int, warm_up: int) -> float:
        action()
        warm_ups.append(warm_up)
        return 1.0

    def measure(part: str, case: str, _: float, action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return _note(session, part, case, action() if part == "correction" else {})

    session.is_cuda, session.device = True, torch.device("cpu", 0)  # another than the CPU
    monkeypatch.setattr(session, "timed", timed)
    monkeypatch.setattr(session, "measure", measure)
    linears.on_cpu(session)
    assert warm_ups == [1, 1]


def _note(session: Session, part: str, case: str, figures: dict[str, Any]) -> dict[str, Any]:
    session.measured.setdefault(part, {})[case] = figures
    return figures
