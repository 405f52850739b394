"""The pretend device itself: it computes what the CPU does, mixes nothing, and counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretend_device import Meter, MixedDevicesError, moved
from tiny import VOCABULARY, make_model
from torch import Tensor, nn


@pytest.mark.parametrize(
    "mixed",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here.T,
        lambda here, there: torch.where(there > 0, here, here),
        lambda here, there: here.addmm_(there.T, there),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: nn.functional.linear(here, there),
    ],
)
def test_two_devices_in_one_operation_raise(device: torch.device, mixed: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(MixedDevicesError, match="two devices"):
        mixed(torch.ones(3, 3, device=device), torch.ones(3, 3))


def test_numbers_and_indices_may_lie_on_the_cpu(device: torch.device) -> None:
    here = torch.arange(6.0, device=device).reshape(2, 3)
    assert (here + torch.tensor(1.0)).device == device
    assert here[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    ("waits", "ask"),
    [
        (1, lambda x: x.sum().item()),
        (1, lambda x: x.cpu()),
        (1, lambda x: x.to("cpu")),
        (1, lambda x: x.tolist()),
        (1, lambda x: bool(x.any())),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 0]),
        (1, lambda x: x.masked_fill(x > 0, 0)[x > 1]),
        (1, lambda x: torch.zeros(2, 3).copy_(x)),
        (0, lambda x: x[torch.zeros(1, dtype=torch.long, device=x.device)]),
        (0, lambda x: torch.where(x > 0, x, 0).sum()),
        (1, lambda x: torch.tensor([1, 2], device=x.device)),
        (1, lambda x: torch.zeros(2).to(x.device)),
        (0, lambda x: torch.zeros(2).to(x.device, non_blocking=True)),
        (1, lambda x: x.copy_(torch.zeros(2, 3))),
        (0, lambda x: x.copy_(torch.zeros(2, 3), non_blocking=True)),
        (1, lambda x: x[torch.tensor([0])]),
        (1, lambda x: x[[0]]),
        (0, lambda x: x.to("meta")),
    ],
)
def test_the_host_s_waits_are_counted(
    device: torch.device, meter: Meter, waits: int, ask: Callable[[Tensor], Any]
) -> None:
    x = torch.ones(2, 3).to(device)
    meter.restart()
    ask(x)
    assert meter.waits.total() == waits, meter.waits


def test_bytes_are_counted_once_for_all_views(device: torch.device, meter: Meter) -> None:
    before = meter.current
    x = torch.zeros(8, 16, device=device)
    views = [x.T, x[2:], x.flatten()]
    assert meter.current - before == 8 * 16 * 4
    y = x + 1
    assert meter.current - before == 2 * 8 * 16 * 4
    del x, views, y
    assert meter.current == before
    assert meter.peak - before == 2 * 8 * 16 * 4


# transformers looks at a GPT-2's first and last tokens, by a list of places, for padding where there is no mask.
@pytest.mark.parametrize(("family", "waits"), [("llama", 0), ("gpt2", 2)])
def test_a_model_computes_what_it_does_on_the_cpu(family: str, waits: int, device: torch.device, meter: Meter) -> None:
    model = make_model(family, tied=True)
    there = moved(copy.deepcopy(model))
    assert there.get_output_embeddings().weight is there.get_input_embeddings().weight
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    given_there = ids.to(device)
    meter.restart()
    for some, given in ((model, ids), (there, given_there)):
        some(input_ids=given).logits.square().mean().backward()
    assert meter.waits.total() == waits
    for one, other in zip(model.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-4, atol=1e-6)
