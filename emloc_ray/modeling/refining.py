"""Fits the factors and integers of one block to what is wanted of it, in float32 whatever the model is in."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emloc_ray.core.integers import integer_weight
from emloc_ray.core.products import is_finite
from emloc_ray.core.refinement import balanced, step_size
from emloc_ray.core.trained_integers import Unrounded, rounded, rounded_weight, unrounded
from emloc_ray.data.ahead import made_ahead
from emloc_ray.errors import NumericsError
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.integer_linear import IntegerLinear

Batch = TypeVar("Batch")

_BETAS = (0.9, 0.95)  # so few steps that a longer memory of the gradients' size would be of the first ones
# Adam's eps, times how many numbers are trained: a gradient is smaller the more there are. In the blocks that were measured, of
# 3.5 million numbers, it is Adam's own 1e-8. With that, the codes of a block of hundreds of millions would hardly move.
_EPS = 0.035
# Steps are a share of what they change, and of codes at least of so many: in 2 and 3 bits a code is one or two in size, and
# would be on its way to the next for longer than the fit lasts.
_LEAST_CODES = 4.0


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

    def __init__(self, weight: Tensor, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().float().clone()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def sizes(self) -> list[tuple[nn.Parameter, float]]:
        """What is trained, each with the size that a step is a share of."""
        return [(self.weight, _root_mean_square(self.weight))]

    def tensors(self) -> dict[str, Tensor]:
        """What the linear is to store."""
        return {"weight": self.weight.detach()}


class _IntegerMaster(nn.Module):
    """A linear of integers, each with a float in its place that is trained (:mod:`emloc_ray.core.trained_integers`)."""

    def __init__(self, linear: IntegerLinear) -> None:
        super().__init__()
        stored = integer_weight(dict(linear.named_buffers()), linear.in_features)
        self.grid, self.bias = stored.with_codes(stored.codes.to("meta")), linear.bias
        self.floats = nn.ParameterList(nn.Parameter(part) for part in unrounded(stored))
        self.compute_dtype, self.weight = linear.compute_dtype, linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rounded_weight(Unrounded(*self.floats), self.grid, x.dtype), self.bias)

    def sizes(self) -> list[tuple[nn.Parameter, float]]:
        """As above; of a scale the logarithm is trained, whose steps are shares already."""
        codes, log_scales, zeros = self.floats
        size = max(_LEAST_CODES, _root_mean_square(codes - 2 ** (self.grid.bits - 1)))
        return [(codes, size), (log_scales, 1.0), (zeros, size)]

    def tensors(self) -> dict[str, Tensor]:
        """As above."""
        trained = rounded(Unrounded(*(part.detach() for part in self.floats)), self.grid)
        return trained.tensors(self.compute_dtype)


def _root_mean_square(weight: Tensor) -> float:
    return float(weight.detach().square().mean().sqrt())


def refined_in(block: nn.Module) -> dict[str, nn.Linear | IntegerLinear]:
    """The linears of a block that are fitted, by their names inside it: factors in floats, and all that is in integers."""
    linears: dict[str, nn.Linear | IntegerLinear] = {}
    for name, module in block.named_modules():
        if isinstance(module, FactorizedLinear) and isinstance(module.down, nn.Linear):
            linears |= {f"{name}.{part}": getattr(module, part) for part in ("up", "down")}
        elif isinstance(module, IntegerLinear):
            linears[name] = module
    return linears


def stored_in(linear: nn.Linear | IntegerLinear) -> dict[str, Tensor]:
    """The tensors of a linear that fitting changes."""
    return dict(linear.named_buffers()) if isinstance(linear, IntegerLinear) else {"weight": linear.weight.detach()}


def store(linear: nn.Linear | IntegerLinear, tensors: Mapping[str, Tensor]) -> None:
    """Puts :func:`stored_in`'s tensors into a linear, in the dtypes and on the device that it has them in."""
    for key, tensor in tensors.items():
        if isinstance(linear, IntegerLinear):
            linear.register_buffer(key, tensor.to(linear.get_buffer(key)))
        else:
            linear.weight = nn.Parameter(tensor.to(linear.weight), False)


@contextlib.contextmanager
def trained_parts(block: nn.Module) -> Iterator[list[tuple[nn.Parameter, float]]]:
    """What is trained of a block, factors balanced where they are a product, each with the size that a step is a share of; the
    block has it when it ends."""
    linears = refined_in(block)
    floats = {name: linear.weight.detach() for name, linear in linears.items() if isinstance(linear, nn.Linear)}
    for name, module in block.named_modules():
        if f"{name}.up" in floats and module.in_sequence:
            up, down = floats[f"{name}.up"], floats[f"{name}.down"]
            floats |= zip(
                (f"{name}.up", f"{name}.down"), (part.to(up.device) for part in balanced(up, down)), strict=True
            )
    masters = {
        name: _IntegerMaster(linear) if isinstance(linear, IntegerLinear) else _Master(floats[name], linear)
        for name, linear in linears.items()
    }
    floats.clear()  # what the masters have copies of
    for name, master in masters.items():
        _replace(block, name, master)
    try:
        yield [size for master in masters.values() for size in master.sizes()]
    finally:
        for name, master in masters.items():
            store(linears[name], master.tensors())
            _replace(block, name, linears[name])


def _replace(block: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(block.get_submodule(owner), attribute, module)


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
    anew each time all were read; the block is as before where that of the ``held_out`` batches is not lower then.

    ``read(number)`` gives a batch, in a thread of its own while the one before is computed; ``error(batch)`` its sum of errors,
    with gradients, and its number of tokens. A step is at most about ``learning_rate`` times the size of what it changes, falling
    to 0 along a cosine: the root mean square of a factor; of codes and zero points theirs, or 4 where that is more; a scale
    itself. Raises NumericsError where an error is NaN or Inf, naming the block.
    """
    before = _mean_error(read, error, held_out)
    if not math.isfinite(before):
        raise NumericsError(
            f"{name} gives NaN or Inf before it is refined: set model.dtype to float32, or remove emulator.refinement."
        )
    linears = refined_in(block)
    if before == 0 or not linears:
        return Fit(before, before)
    original = {name: stored_in(linear) for name, linear in linears.items()}
    with trained_parts(block) as sizes:
        parameters = [parameter for parameter, _ in sizes]
        optimizer = adam(sizes, learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step_size(step, steps))
        entries = [fitted[number] for number in _drawn(len(fitted), steps, seed)]
        with contextlib.closing(made_ahead(itertools.chain.from_iterable(entries), read, most=1)) as batches:
            for entry in entries:
                optimizer.zero_grad()
                _accumulate(itertools.islice(batches, len(entry)), error, before, parameters)
                optimizer.step()
                scheduler.step()
        trained = all(map(is_finite, parameters))  # of which integers would hide what is not
    after = _mean_error(read, error, held_out)
    if not (trained and math.isfinite(after)):
        raise NumericsError(f"{name} gives NaN or Inf while it is refined: lower emulator.refinement.learning_rate.")
    fit = Fit(before, after)
    if not fit.is_better:
        for part, tensors in original.items():
            store(linears[part], tensors)
    return fit


def adam(sizes: Sequence[tuple[nn.Parameter, float]], learning_rate: float) -> torch.optim.Adam:
    """Adam of parameters, each with the size that a step is a share of."""
    groups = [{"params": [parameter], "lr": learning_rate * size} for parameter, size in sizes]
    return torch.optim.Adam(groups, betas=_BETAS, eps=_EPS / sum(parameter.numel() for parameter, _ in sizes))


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


@torch.no_grad()
def _mean_error(
    read: Callable[[int], Batch], error: Callable[[Batch], tuple[Tensor, int]], numbers: Sequence[int]
) -> float:
    sums = [error(batch) for batch in made_ahead(numbers, read, most=1)]
    return sum(float(total) for total, _ in sums) / max(1, sum(tokens for _, tokens in sums))
