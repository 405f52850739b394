"""What a block's norms, functions and experts take of a token, measured on the meta device: each family has its own."""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import activations

from emloc_ray.modeling.experts import UnfusedExperts
from emloc_ray.modeling.grouped_experts import GroupedRows

_TOKENS = 512  # so many that what does not grow with them tells nothing


@dataclass(frozen=True)
class PassNumbers:
    """Numbers of the model's dtype for a token: of a layer's experts, all together, their own weights frozen; of functions beyond
    those of one that a kernel computes.

    Attributes:
        forward: at once where nothing is kept for a backward pass.
        kept: for a backward pass.
        backward: at once beside what is kept, until the backward pass ends.
    """

    forward: float
    kept: float
    backward: float


@dataclass(frozen=True)
class BlockActivations:
    """What a block's norms, activation functions and experts take of a token.

    Attributes:
        normed: numbers that its norms read, those of queries and keys too.
        experts: what its experts take, where it has any.
        functions: what functions outside these take that are computed step by step, such as GPT-2's GELU: ``kept`` of all,
            the others of that which takes most.
    """

    normed: float
    experts: PassNumbers | None = None
    functions: PassNumbers = PassNumbers(0.0, 0.0, 0.0)


@contextlib.contextmanager
def watched_blocks(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, BlockActivations]]:
    """Watches a model that runs inside this context. Fills the dict at its end, by the blocks' names. Experts are measured on the
    meta device alone."""
    by_block: dict[str, BlockActivations] = {}
    normed: dict[str, dict[nn.Module, Tensor]] = {block: {} for block in blocks}
    experts: dict[str, PassNumbers] = {}
    functions: dict[str, dict[nn.Module, Tensor]] = {block: {} for block in blocks}
    known: dict[Any, PassNumbers] = {}

    def before_norm(block: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        normed[block][norm] = args[0]  # of the last pass, where there are several

    def before_function(block: str, function: nn.Module, args: tuple[Tensor, ...]) -> None:
        functions[block][function] = args[0]

    def before_experts(block: str, module: Any, args: tuple[Tensor, ...]) -> None:
        if all(tensor.is_meta for tensor in args):
            kind = (*_sizes(module), *((tensor.shape[-1], tensor.dtype) for tensor in args))
            if kind not in known:
                known[kind] = _measured(module, *args)
            experts[block] = known[kind]

    handles = []
    for block in blocks:
        modules = [*model.get_submodule(block).modules()]
        of_experts = {inner for module in modules if isinstance(module, UnfusedExperts) for inner in module.modules()}
        for module in modules:
            watch: Any = None
            if type(module).__name__.endswith("Norm"):
                watch = before_norm
            elif isinstance(module, UnfusedExperts):
                watch = before_experts
            elif type(module).__module__ == activations.__name__ and module not in of_experts:
                watch = before_function
            if watch is not None:
                handles.append(module.register_forward_pre_hook(functools.partial(watch, block)))
    try:
        yield by_block
    finally:
        for handle in handles:
            handle.remove()
    for block, inputs in normed.items():
        if inputs:
            # A norm of each head reads as many times more rows as there are heads.
            tokens = min(tensor.shape[:-1].numel() for tensor in inputs.values())
            numbers = sum(tensor.numel() for tensor in inputs.values()) / tokens
            made = [_of_function(function, x, known) for function, x in functions[block].items() if x.is_meta]
            by_block[block] = BlockActivations(numbers, experts.get(block), _together(made))


def _together(made: Sequence[PassNumbers]) -> PassNumbers:
    most = functools.partial(max, default=0.0)
    return PassNumbers(most(m.forward for m in made), sum(m.kept for m in made), most(m.backward for m in made))


def _of_function(function: nn.Module, x: Tensor, known: dict[Any, PassNumbers]) -> PassNumbers:
    """Beyond what SiLU takes, which a kernel computes; without its parameters, where it has some."""
    kind = type(function), x.shape[-1], x.dtype
    if kind not in known:
        inputs, own = (x.new_empty(_TOKENS, x.shape[-1]),), [*function.parameters(), *function.buffers()]
        of_function, of_silu = (_numbers(made, inputs, (0,), own) for made in (function, nn.functional.silu))
        pairs = zip(dataclasses.astuple(of_function), dataclasses.astuple(of_silu), strict=True)
        known[kind] = PassNumbers(*(max(0.0, number - least) for number, least in pairs))
    return known[kind]


def _sizes(experts: UnfusedExperts) -> tuple[int, ...]:
    linears: list[Any] = [experts.get_submodule(f"0.{part}") for part in experts.parts]
    return tuple(size for linear in linears for size in (linear.in_features, linear.out_features))


def _measured(experts: UnfusedExperts, *given: Tensor) -> PassNumbers:
    """Of inputs of these widths and dtypes, on frozen weights."""
    inputs = [tensor.new_empty(_TOKENS, tensor.shape[-1]) for tensor in given]
    parts = [_stand_in(experts, part, inputs[0]) for part in experts.parts]
    before = [*inputs, *(tensor for _, tensors in parts for tensor in tensors)]

    def run(*read: Tensor) -> Tensor:
        return experts.run_together([part for part, _ in parts], *read)

    return _numbers(run, inputs, (0, 2), before)


def _numbers(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], learned: Sequence[int], before: Sequence[Tensor]
) -> PassNumbers:
    """Of a pass over ``inputs`` of :data:`_TOKENS` tokens, the ``learned`` ones of which have gradients, beside what was there
    ``before``."""
    with torch.no_grad(), LiveBytes(before) as forward:
        run(*inputs)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), LiveBytes(before) as trained:
        read = [x.detach().requires_grad_() if place in learned else x for place, x in enumerate(inputs)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            given_back = run(*read)
        of_tokens = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in trained.before)
        kept.clear()
        torch.autograd.grad(given_back, [read[place] for place in learned], torch.empty_like(given_back))
    size = _TOKENS * inputs[0].itemsize
    return PassNumbers(forward.most / size, of_tokens / size, (trained.most - of_tokens) / size)


def _stand_in(experts: UnfusedExperts, part: str, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """All experts' linear as one product of the same shapes, and its weights."""
    linear: Any = experts.get_submodule(f"0.{part}")
    weight, biases = (
        x.new_empty(linear.in_features, linear.out_features),
        x.new_empty(experts.num_experts, linear.out_features),
    )

    def run(x: Tensor, rows: GroupedRows) -> Tensor:
        return x @ weight + biases[rows.experts] if experts.has_bias else x @ weight

    return run, [weight, biases]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on: ``most`` is the most of them at once."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        """``before``: tensors that are not counted."""
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.most = self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at in self.before or at in self._alive or size == 0:
            return
        self._alive.add(at)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, at, size)

    def _free(self, at: int, size: int) -> None:
        self._alive.discard(at)
        self._now -= size
