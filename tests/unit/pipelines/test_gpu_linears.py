"""What the benchmark of a GPU says of single linears is of their work, not of the first call in a process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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


def test_a_model_s_seconds_hold_the_roots_of_its_grams(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's queries, keys and values read one tensor, its gate and its up projection another."""
    figures = {"factorize_s": 1.0, "cholesky_s": 10.0}
    monkeypatch.setattr(session, "measure", lambda part, case, *_: _note(session, part, case, figures))
    linears.on_device(session)
    [(what, line)] = [each for each in session.parts["factorization"].items() if "at ratio" in each[0]]
    blocks = session.shapes.model["num_hidden_layers"]
    assert what == "6 of the model's 14 linears at ratio 0.5, and the roots of 8 Grams"
    assert line["ours"] == blocks * (3 * 1.0 + 4 * 10.0)


def _note(session: Session, part: str, case: str, figures: dict[str, Any]) -> dict[str, Any]:
    session.measured.setdefault(part, {})[case] = figures
    return figures
