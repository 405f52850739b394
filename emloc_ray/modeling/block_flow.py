"""Which block of a model runs after which, and reads what which gave: followed through one pass on the meta device."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from emloc_ray.modeling.architecture import block_names, empty_model, outside_linears, traced_inputs
from emloc_ray.modeling.meta_pass import UNTRACEABLE, MetaPass


@dataclass(frozen=True)
class BlockFlow:
    """The order in which blocks run, and the earlier blocks that each one's inputs come from: ``needs[k]`` are positions.

    ``between`` are the linears outside all blocks that carry what a block gives to another, with the block that runs
    next: in its pass they read what they read in the whole model. ``optional`` are the positions that run for images alone.
    ``shares``: blocks read what is inside others, not their outputs alone (keys and values of Gemma 3n and Gemma 4), or run
    more than once in a pass, or give what cannot be written down.
    """

    order: tuple[str, ...]
    needs: tuple[frozenset[int], ...]
    between: dict[str, str] = field(default_factory=dict)
    optional: frozenset[int] = frozenset()
    shares: bool = False

    def last_use(self, position: int) -> int:
        """The last block that reads what this one gave; its own position where none does."""
        return max([position, *(k for k, needed in enumerate(self.needs) if position in needed)])


def tensors_of(output: Any) -> tuple[Tensor | None, ...] | None:
    """What a block gives, as a tuple of tensors and ``None``; None where it is anything else, and cannot be kept on disk."""
    parts = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    return parts if all(part is None or isinstance(part, Tensor) for part in parts) else None


class Lineage(MetaPass):
    """Follows through every operation which blocks' outputs a tensor was made from.

    ``order`` are the blocks that have begun, ``needs`` what their inputs were made from. A linear outside the blocks has a
    negative mark for a source; ``begun`` says how many blocks had begun when it read what a block gave. ``shares`` says
    whether any operation read what another block had made for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()
        self.order: list[str] = []
        self.needs: list[frozenset[int]] = []
        self.begun: dict[int, int] = {}
        self.shares = False
        self._running: int | None = None
        self._makers: Any = WeakTensorKeyDictionary()

    def begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A block begins."""
        self.needs.append(self.of((args, kwargs)))
        self._running = len(self.order)
        self.order.append(name)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The block that began last ends."""
        self.mark(output, frozenset({len(self.order) - 1}))
        self._running = None
        self.shares = self.shares or tensors_of(output) is None
        for leaf in tree_leaves(output):  # what it gave is for all to read
            if isinstance(leaf, Tensor):
                self._makers.pop(leaf, None)

    def carry(self, mark: int, module: nn.Module, args: Any, output: Any) -> None:
        """A linear outside the blocks runs."""
        sources = self.of(args)
        if sources:
            self.begun[mark] = len(self.order)
            self.mark(output, sources | {mark})

    def of(self, values: Any) -> frozenset[int]:
        """The blocks whose outputs went into any tensor of a nested structure."""
        sources = [self.sources.get(leaf, frozenset()) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return frozenset().union(*sources)

    def mark(self, values: Any, sources: frozenset[int]) -> None:
        """Says that the tensors of a nested structure were made from the outputs of these blocks."""
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self.sources[leaf] = sources

    def _follow_makers(self, given: Any, made: Any) -> None:
        makers = {self._makers.get(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        self.shares = self.shares or bool(makers - {None, self._running})
        for leaf in tree_leaves(made) if self._running is not None else ():
            if isinstance(leaf, Tensor):
                self._makers[leaf] = self._running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = super().__torch_dispatch__(func, types, args, kwargs)
        self._follow_makers((args, kwargs), output)
        sources = self.of((args, kwargs))
        self.mark(output, sources)
        if sources and func._schema.is_mutable:
            self.mark(args, sources)
        return output


def block_flow(config: Any, trust_remote_code: bool = False, example: Mapping[str, Tensor] | None = None) -> BlockFlow:
    """The flow of a model of this config, from one forward pass on the meta device; where it cannot run there its blocks are
    taken to run in their order, each reading all before it. ``example`` is what a model that reads images is called with for
    one."""
    model = empty_model(config, trust_remote_code)
    names = block_names(model)
    text = _followed(model, names, traced_inputs(config))
    flow = _followed(model, names, example) if example else text
    if flow is None:
        flow = BlockFlow(tuple(names), tuple(frozenset(range(k)) for k in range(len(names))))
    if not example or text is None:
        return flow
    optional = frozenset(position for position, name in enumerate(flow.order) if name not in text.order)
    return replace(flow, optional=optional)


def _followed(model: Any, names: Sequence[str], inputs: Mapping[str, Tensor]) -> BlockFlow | None:
    """One pass on the meta device; None where the model cannot run there."""
    lineage, outside, handles = Lineage(), outside_linears(model), []
    for name in names:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(functools.partial(lineage.begin, name), with_kwargs=True))
        handles.append(block.register_forward_hook(lineage.end))
    for number, name in enumerate(outside):
        handles.append(model.get_submodule(name).register_forward_hook(functools.partial(lineage.carry, -1 - number)))
    try:
        with torch.no_grad(), lineage:
            model(**inputs, use_cache=False)
    except UNTRACEABLE:
        return None
    finally:
        for handle in handles:
            handle.remove()
    order = lineage.order
    if not order:
        return None
    if len(set(order)) != len(order):
        return BlockFlow(tuple(dict.fromkeys(order)), (), shares=True)
    read = frozenset().union(*lineage.needs)
    between = {outside[-1 - mark]: order[begun] for mark, begun in lineage.begun.items() if mark in read}
    needs = tuple(frozenset(k for k in need if k >= 0) for need in lineage.needs)
    return BlockFlow(tuple(order), needs, between, shares=lineage.shares)
