"""Work that kills each worker it is given: tried a few times, each told, then given up by name."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import task_rows, write_jsonl

from emloc_ray.data import units
from emloc_ray.data.formats import Tokens
from emloc_ray.data.reading import Row, scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.tokenizing import TokenizeOptions, first_unwritten, tokenize_splits
from emloc_ray.errors import StageError
from emloc_ray.stages.ray import pace
from emloc_ray.stages.ray.losses import Losses
from emloc_ray.stages.ray.slots import run_slots, start_slot
from emloc_ray.stages.ray.tasks import Resources, bounded
from emloc_ray.stages.tokens.tokens import retried, watched

pytestmark = pytest.mark.usefixtures("ray_session")
SIZES = {"train": 20}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Losses, "delays", (0.0,))


def test_a_task_that_kills_its_worker_is_given_up_and_others_are_not() -> None:
    def work(poison: bool) -> int:
        if poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    told: list[str] = []
    task: Any = Resources().task(work)
    pieces = [("layer k", functools.partial(task.remote, False)), ("layer q", functools.partial(task.remote, True))]
    losses = Losses("factorize", told.append, bound=1)
    with pytest.raises(StageError, match=r"^factorize: layer q lost its worker 2 times, the last time because"):
        bounded(pieces, 2, losses)
    assert [line.split(" because")[0] for line in told] == ["factorize: layer q lost its worker"]
    assert bounded(pieces[:1], 2, losses) == [7]


def test_a_slot_is_given_up_at_the_shard_that_kills_it(tmp_path: Path) -> None:
    class Slot:
        def position(self) -> int:
            return max((int(path.name) for path in tmp_path.iterdir()), default=-1)

        def accumulate(self, unit: int) -> int:
            if unit == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            (tmp_path / str(unit)).touch()
            return unit

    def start(slot: int) -> Any:
        return start_slot(Resources(), f"calibrate: slot {slot}", range(4), Slot)

    finished: list[int] = []
    losses = Losses("calibrate", bound=1)
    with pytest.raises(StageError, match="slot 0 at token shard 2 lost its worker 2 times"):
        run_slots(start, [range(4)], "token shard", losses, done=lambda slot, unit: finished.append(unit))
    assert sorted(set(finished)) == [0, 1]


def test_a_slot_that_was_at_its_end_is_not_begun(tmp_path: Path) -> None:
    class Slot:
        def position(self) -> int:
            return 1

        def accumulate(self, unit: int) -> int:
            return unit

        def commit(self) -> None:
            pass

    begun: list[int] = []

    def start(slot: int) -> Any:
        begun.append(slot)
        return start_slot(Resources(), f"calibrate: slot {slot}", work[slot], Slot, node=gone)

    gone = "a" * 56  # a node that left
    work, shown, finished = [[0, 3], [1, 4, 7], [2, 5]], [], []
    progress: Any = lambda done, total: shown.append((done, total))  # noqa: E731
    done: Any = lambda slot, unit: finished.append((slot, unit))  # noqa: E731
    run_slots(start, work, "token shard", Losses("calibrate"), progress, done, safe=[3, 1, 5])
    assert begun == [1]
    assert finished == [(1, 1), (1, 4), (1, 7)]
    assert shown[0] == (5, 7)
    assert shown[-1] == (7, 7)


@pytest.fixture(params=["small data", "large data"])
def data_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data are tokenized by one process, large ones by Ray Data's."""
    if request.param == "large data":
        monkeypatch.setattr(units, "SMALL_ROWS", 0)


@pytest.mark.usefixtures("data_size")
def test_a_row_that_kills_its_worker_names_its_shard_and_keeps_the_others(
    tmp_path: Path,
) -> None:
    out_dir, fixed = tmp_path / "tokens", tmp_path / "fixed"

    class Poisoned(TokenizeOptions):
        def tokens(self, rows: Iterable[tuple[str, Row]], whole: bool = False) -> Iterator[list[Tokens] | None]:
            for where, _ in rows:
                if where.endswith("row 51") and not fixed.exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                yield [Tokens([1, 2], [False, True])]

    splits = {"train": RowSelection.all_rows((scan(write_jsonl(tmp_path / "rows.jsonl", task_rows(100))),))}
    options = Poisoned("", "prompt_completion", 8)
    told: list[str] = []

    def work() -> dict[str, dict[str, int]]:
        return tokenize_splits(splits, options, out_dir, rows_per_shard=SIZES, num_workers=1)

    def run() -> dict[str, dict[str, int]]:
        piece = functools.partial(first_unwritten, splits, out_dir, SIZES)
        return retried(work, Losses("data", told.append, bound=1), piece)

    with pytest.raises(StageError, match="data: token shard 2 of train lost its worker 2 times"):
        run()
    assert len(told) == 1
    kept = (out_dir / "train" / "shard-00000.arrow").stat().st_ino
    fixed.touch()
    assert run()["train"]["rows"] == 100
    assert (out_dir / "train" / "shard-00000.arrow").stat().st_ino == kept


@pytest.mark.usefixtures("data_size")
def test_tokenizing_that_hangs_is_ended_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_dir, hung = tmp_path / "tokens", tmp_path / "hung"

    class Hanging(TokenizeOptions):
        def tokens(self, rows: Iterable[tuple[str, Row]], whole: bool = False) -> Iterator[list[Tokens] | None]:
            for where, _ in rows:
                if where.endswith("row 51") and not hung.exists():
                    hung.write_text(str(os.getpid()))
                    time.sleep(600)
                yield [Tokens([1, 2], [False, True])]

    splits = {"train": RowSelection.all_rows((scan(write_jsonl(tmp_path / "rows.jsonl", task_rows(100))),))}
    options = Hanging("", "prompt_completion", 8)
    told: list[str] = []
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(pace, "bound", lambda took, planned_s: (3.0, "1 s is usual") if took else None)

    def work() -> dict[str, dict[str, int]]:
        progress = watched(lambda done, total: shown.append((done, total)), 0.0)
        return tokenize_splits(splits, options, out_dir, rows_per_shard=SIZES, num_workers=1, progress=progress)

    piece = functools.partial(first_unwritten, splits, out_dir, SIZES)
    counts = retried(work, Losses("data", told.append, bound=1), piece)
    assert counts["train"]["rows"] == 100
    [line] = told
    assert line.startswith("data: token shard 2 of train lost its worker because it gave nothing for ")
    assert line.endswith(", where 1 s is usual; restarted (1 of 1).")
    assert max(shown.count((done, 5)) for done in (1, 2)) > 2  # looked at while it hung, and Ray Data held a row back
    with pytest.raises(ProcessLookupError):
        os.kill(int(hung.read_text()), 0)
