"""Experts by grouped products: what one after another gives, and without a wait for how many tokens each was sent."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build
from pretend_device import Meter, moved
from tiny import PAD, VOCABULARY

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import collate
from emloc_ray.modeling import grouped_experts
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import factorize_modules
from emloc_ray.modeling.experts import experts_of, unfuse
from emloc_ray.modeling.loss import token_loss
from emloc_ray.modeling.scoring import score_rows

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    Tokens(torch.randint(2, VOCABULARY, (length,), generator=GENERATOR).tolist(), [True] * length)
    for length in (13, 5, 16)
]
BATCH = collate(ROWS, PAD)
FAMILIES = ("Mixtral", "Qwen3-MoE", "gpt-oss")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_experts, "KERNELS_ON", {"cpu", "pretend"})


@pytest.fixture(params=["cpu", "pretend"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def original(family: str) -> Any:
    return unfuse(build(family)).requires_grad_(False)


def emulator(family: str) -> Any:
    """All experts at one rank, and a LoRA on each."""
    model = original(family)
    experts = [spec.name for spec in block_linears(model) if spec.routed_share is not None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        factorize_modules(model, dict.fromkeys(experts, 16))
        model.requires_grad_(False)
        config = adapter_config(target_modules=experts, r=8, lora_alpha=16, init_lora_weights=False)
        return attach_adapter(model, config).eval()


def apart(model: Any) -> Any:
    one_by_one = copy.deepcopy(model)
    for experts in experts_of(one_by_one).values():
        experts.together = False
    return one_by_one


def on(kind: str, model: Any) -> Any:
    return model if kind == "cpu" else moved(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_is_scored_as_with_experts_one_by_one(family: str, kind: str, meter: Meter) -> None:
    model = original(family)
    options: dict[str, Any] = {"batch_size": 3, "loss_on": "all", "pad_token_id": PAD, "name": "x"}
    expected = score_rows(apart(model), ROWS, **options)
    there = on(kind, model)
    score_rows(there, ROWS, **options)
    meter.restart()
    found = score_rows(there, ROWS, **options)
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert found.num_correct == expected.num_correct
    assert meter.waits.total() <= 2, meter.waits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emulator_s_step(family: str, kind: str, meter: Meter) -> None:
    model = emulator(family)
    alone = apart(model)
    there = on(kind, model)
    for _ in range(2):  # of which the first lays the factors side by side
        there.zero_grad()
        meter.restart()
        result = token_loss(there, BATCH, "all")
        result.loss_sum.backward()
    assert not meter.waits, meter.waits
    expected = token_loss(alone, BATCH, "all")
    expected.loss_sum.backward()
    torch.testing.assert_close(result.loss_sum.cpu(), expected.loss_sum, rtol=1e-4, atol=1e-4)
    for one, other in zip(there.parameters(), alone.parameters(), strict=True):
        if other.requires_grad:
            wanted = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(one.grad.cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_autocast_holds_for_grouped_products_too() -> None:
    model = emulator("Mixtral")
    losses = []
    for some in (model, apart(model)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(float(token_loss(some, BATCH, "all").loss_sum.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_experts_that_differ_or_are_watched_run_one_by_one(kind: str) -> None:
    model = emulator("Mixtral")
    [first, *_] = experts_of(model).values()
    hidden = on(kind, torch.nn.Linear(64, 3)).weight
    linears = [first.get_submodule(f"{index}.down") for index in range(4)]
    assert grouped_experts.grouped([linears], hidden)
    handle = linears[2].register_forward_hook(lambda *_: None)
    assert not grouped_experts.grouped([linears], hidden)
    handle.remove()
    linears[1].scaling["default"] *= 2
    assert not grouped_experts.grouped([linears], hidden)
    assert not grouped_experts.grouped([[torch.nn.Linear(64, 12)]], hidden)  # no multiple of 16 bytes


def test_all_experts_are_looked_at_without_a_call_of_getattr(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made at each layer of each pass, and those calls take a host longer than a GPU computes."""
    model = emulator("Mixtral")
    linears = [[e.get_submodule(f"{i}.down") for i in range(4)] for e in experts_of(model).values()]
    calls, getattr_of_module = [], torch.nn.Module.__getattr__

    def counted(module: torch.nn.Module, name: str) -> Any:
        calls.append(name)
        return getattr_of_module(module, name)

    monkeypatch.setattr(torch.nn.Module, "__getattr__", counted)
    assert grouped_experts.grouped(linears, torch.zeros(1))
    assert not calls


def test_adapters_that_are_off_or_two_are_seen() -> None:
    model = emulator("Mixtral")
    linears: list[Any] = [next(iter(experts_of(model).values())).get_submodule(f"{index}.down") for index in range(4)]
    x = torch.randn(8, linears[0].in_features, generator=GENERATOR)
    rows = grouped_experts.GroupedRows(torch.arange(8).reshape(8, 1) % 4, 4)

    def difference() -> float:
        products = grouped_experts.grouped([linears], x)
        assert products is not None
        wanted = torch.stack(
            [linears[expert](row) for expert, row in zip(rows.experts.tolist(), x[rows.tokens], strict=True)]
        )
        return float((products[0](x[rows.tokens], rows) - wanted).detach().abs().max())

    assert difference() < 1e-5
    with model.disable_adapter():
        assert difference() < 1e-5
    model.add_adapter("other", adapter_config(target_modules=["0.down"], r=8, init_lora_weights=False))
    model.set_adapter("other")
    assert grouped_experts.grouped([linears], x) is None  # one expert alone has it
    model.set_adapter("default")
    assert difference() < 1e-5


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "expected"),
    [
        ((9, 0), None, torch.bfloat16, True),
        ((10, 3), None, torch.bfloat16, True),
        ((8, 0), None, torch.bfloat16, False),
        ((8, 9), None, torch.bfloat16, False),
        ((12, 0), None, torch.bfloat16, False),
        ((9, 4), "6.4", torch.bfloat16, False),  # as an MI300 says
        ((9, 0), None, torch.float16, False),
    ],
)
def test_on_cuda_only_what_torch_has_a_kernel_for_is_grouped(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, dtype: torch.dtype, expected: bool
) -> None:
    """Of anything else torch asks the device for the ends once a product: more waits than one after another has."""
    monkeypatch.setattr(grouped_experts, "KERNELS_ON", {"cuda"})
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hidden: Any = SimpleNamespace(device=torch.device("cuda", 0))
    linears = [torch.nn.Linear(64, 64, dtype=dtype) for _ in range(2)]
    assert (grouped_experts.grouped([linears], hidden) is not None) == expected
