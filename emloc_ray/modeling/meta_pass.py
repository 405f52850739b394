"""A forward pass without weights: shapes and which tensor is read where, whatever control flow the inputs ask for."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_COUNTING = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
# What a pass without weights raises where a model's code asks for what only weights could tell.
UNTRACEABLE = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


class MetaPass(TorchDispatchMode):
    """Lets a model on the meta device be called with real inputs.

    What depends on no weight (masks, positions, the places of image tokens, the grid of an image's patches) keeps its
    value, so that the model's code goes the way that it would go; where such a tensor meets one without values, the
    result has none. A scalar that only weights could tell reads 0.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if func is _aten._to_copy.default:  # asked for beside another: each stays where it is
            return func(*args, **{**kwargs, "device": args[0].device})
        if func in _COUNTING:  # no weight is asked where a model counts its patches
            return func(*args, **{**kwargs, "device": "cpu"})
        places = [leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(places) and not all(places):
            if func in _INDEXING:
                args = (args[0], _as_positions(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, lambda leaf: leaf.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


def _as_positions(indices: Any) -> list[Any]:
    """Masks that have values as the positions where they are true: how many those are is asked for."""
    positions: list[Any] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8) and not index.is_meta
        positions += index.nonzero().unbind(1) if is_mask else [index]
    return positions
