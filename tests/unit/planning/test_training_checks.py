"""A check of transformers' arguments leaves the process as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.planning.training_checks import check_training


def config_of(**finetune: Any) -> RunConfig:
    return parse_config({"run_dir": "r", "model": {"source": "m"}, "data": {"train": "a.jsonl"}, "finetune": finetune})


def reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def no_state() -> Iterator[None]:
    """Accelerate has no state before, nor after."""
    reset()
    yield
    reset()


@pytest.mark.parametrize("finetune", [{}, {"lr_scheduler_type": "greedy", "eval_strategy": "no"}])
def test_a_live_accelerator_trains_on_after_a_check(no_state: None, finetune: dict[str, Any]) -> None:
    accelerator, weight = Accelerator(cpu=True, gradient_accumulation_steps=3), torch.ones(1, requires_grad=True)
    if finetune:
        with pytest.raises(ConfigError, match=r"^finetune: transformers refuses"):
            check_training(config_of(**finetune))
    else:
        check_training(config_of())
    assert accelerator.device == torch.device("cpu")
    accelerator.backward(weight.sum())
    assert weight.grad is not None
    assert GradientState().num_steps == 3


def test_an_accelerator_after_a_check_does_not_find_the_cpu_asked_for(no_state: None) -> None:
    check_training(config_of())
    assert not PartialState._shared_state


def test_two_checks_at_once_leave_what_was_before(no_state: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first_is_in, second_is_in, real = threading.Event(), threading.Event(), transformers.TrainingArguments

    def meet(**given: Any) -> Any:
        arguments = real(**given)
        if threading.current_thread() is first:
            first_is_in.set()
            second_is_in.wait(0.5)
        else:  # where it began within the first, it began with the state that the first one made
            second_is_in.set()
            first.join()
        return arguments

    monkeypatch.setattr(transformers, "TrainingArguments", meet)
    first = threading.Thread(target=check_training, args=(config_of(),))
    first.start()
    first_is_in.wait(60)
    check_training(config_of())
    assert not PartialState._shared_state
