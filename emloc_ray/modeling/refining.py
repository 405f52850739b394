"""Fits the factors of one block to what is wanted of it, in float32 whatever the model is in."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emloc_ray.core.refinement import balanced, step_size
from emloc_ray.data.ahead import made_ahead
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.emulator import FactorizedLinear

Batch = TypeVar("Batch")

_BETAS = (0.9, 0.95)  # so few steps that a longer memory of the gradients' size would be of the first ones


class Fit(NamedTuple):
    """The held-out error of a block before and after its fit."""

    before: float
    after: float

    @property
    def is_better(self) -> bool:
        """Whether the fit is to be kept."""
        return self.after < self.before


class _Master(nn.Module):
    """A linear whose weight is trained in float32, while it computes in the dtype of what it reads."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().float().clone()), bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def factorized_in(block: nn.Module) -> dict[str, FactorizedLinear]:
    """The linears of a block whose factors are floats, by their names inside it."""
    factorized = {name: module for name, module in block.named_modules() if isinstance(module, FactorizedLinear)}
    return {name: module for name, module in factorized.items() if isinstance(module.down, nn.Linear)}


@contextlib.contextmanager
def trained_factors(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The factors of a block, balanced where they are a product, as parameters to train; it has them when it ends."""
    held: dict[Any, tuple[Any, Any]] = {}
    for module in factorized_in(block).values():
        up, down = module.up.weight, module.down.weight
        if module.in_sequence:
            up, down = (weight.to(up.device) for weight in balanced(up, down))
        held[module] = module.up, module.down
        trained = _Master(up, module.up.bias), _Master(down, None)
        module.up, module.down = trained  # type: ignore[assignment]
    try:
        yield [master.weight for module in held for master in (module.up, module.down)]
    finally:
        for module, linears in held.items():
            for linear, master in zip(linears, (module.up, module.down), strict=True):
                linear.weight = nn.Parameter(master.weight.detach().to(linear.weight.dtype), False)
            module.up, module.down = linears


def fit_block(
    block: nn.Module,
    read: Callable[[int], Batch],
    error: Callable[[Batch], tuple[Tensor, int]],
    fitted: Sequence[Sequence[int]],
    held_out: Sequence[int],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    name: str = "the block",
) -> Fit:
    """Lowers ``Σ error / Σ tokens`` by ``steps`` of Adam, each over the batches of one entry of ``fitted``, in an order drawn
    anew each time all were read; the factors are as before where that of the ``held_out`` batches is not lower then.

    ``read(number)`` gives a batch, in a thread of its own while the one before is computed; ``error(batch)`` its sum of errors,
    with gradients, and its number of tokens. A step is at most about ``learning_rate`` times the root mean square of what it
    changes, falling to 0 along a cosine. Raises NumericsError where an error is NaN or Inf, naming the block.
    """
    before = _mean_error(read, error, held_out)
    if before == 0 or not factorized_in(block):
        return Fit(before, before)
    original = [parameter.detach() for parameter in _factors(block)]
    with trained_factors(block) as parameters:
        groups = [{"params": [p], "lr": learning_rate * float(p.detach().square().mean().sqrt())} for p in parameters]
        optimizer = torch.optim.Adam(groups, betas=_BETAS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step_size(step, steps))
        entries = [fitted[number] for number in _drawn(len(fitted), steps, seed)]
        with contextlib.closing(made_ahead(itertools.chain.from_iterable(entries), read, most=1)) as batches:
            for entry in entries:
                optimizer.zero_grad()
                _accumulate(itertools.islice(batches, len(entry)), error, before, parameters)
                optimizer.step()
                scheduler.step()
    after = _mean_error(read, error, held_out)
    if not before < float("inf") or not after < float("inf"):
        raise NumericsError(f"{name} gives NaN or Inf while it is refined: lower emulator.refinement.learning_rate.")
    fit = Fit(before, after)
    if not fit.is_better:
        for parameter, weight in zip(_factors(block), original, strict=True):
            parameter.data = weight
    return fit


def _accumulate(
    batches: Iterator[Batch],
    error: Callable[[Batch], tuple[Tensor, int]],
    scale: float,
    parameters: Sequence[nn.Parameter],
) -> None:
    """Leaves the gradient of a step in ``parameters``: the mean over the tokens of its batches, divided by ``scale``."""
    num_tokens = 0
    for batch in batches:
        with torch.enable_grad():
            total, tokens = error(batch)
        (total / scale).backward()
        num_tokens += tokens
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(num_tokens, 1))


def _drawn(count: int, steps: int, seed: int) -> list[int]:
    """The entry of each step: all of them in an order drawn anew each time."""
    draws, numbers = torch.Generator().manual_seed(seed), list[int]()
    while len(numbers) < steps:
        numbers += reversed(torch.randperm(count, generator=draws).tolist())
    return numbers[:steps]


def _factors(block: nn.Module) -> list[Tensor]:
    return [linear.weight for module in factorized_in(block).values() for linear in (module.up, module.down)]


@torch.no_grad()
def _mean_error(
    read: Callable[[int], Batch], error: Callable[[Batch], tuple[Tensor, int]], numbers: Sequence[int]
) -> float:
    sums = [error(batch) for batch in made_ahead(numbers, read, most=1)]
    return sum(float(total) for total, _ in sums) / max(1, sum(tokens for _, tokens in sums))
