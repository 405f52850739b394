"""The turns of a run by itself: SIGTERM stops the stage that runs."""

from __future__ import annotations

import os
import signal
import time

import pytest

from emloc_ray.errors import Stopped
from emloc_ray.runs.turns import AtOnce
from emloc_ray.stages.ray.tasks import Resources


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)  # where Python calls its handlers


def test_a_termination_stops_the_stage_where_it_asks() -> None:
    before, turns = signal.getsignal(signal.SIGTERM), AtOnce()

    def train() -> None:
        with turns.take("finetune", Resources(), 1):
            assert not turns.stopped()
            terminate()
            assert turns.stopped()
            raise Stopped("finetune was stopped at 1 of 2.")  # after it has saved a checkpoint

    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit), turns.take("correct", Resources(), 1):
        pytest.fail("the next stage begins")


@pytest.mark.parametrize("patience_s", [0.05, 60.0])
def test_a_stage_that_does_not_ask_is_broken_off_by_time_or_a_second_signal(patience_s: float) -> None:
    turns = AtOnce(patience_s)

    def read() -> None:
        with turns.take("data", Resources(), 1):
            terminate()
            if patience_s > 1:
                terminate()
            time.sleep(30)

    with pytest.raises(SystemExit) as ended:
        read()
    assert ended.value.code == 143
