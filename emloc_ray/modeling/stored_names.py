"""The names under which a checkpoint holds a model's parameters.

What transformers keeps in memory may be named otherwise on disk, or be put together from several tensors (experts). Its
own conversion mapping says how (https://huggingface.co/docs/transformers/main/en/weightconverter); read here, not applied:
no stage holds more of a parameter than it works on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry
from emloc_ray.modeling.architecture import LinearSpec, StoredRows, TensorSlice
from emloc_ray.modeling.experts import unfused_views


@dataclass(frozen=True)
class StoredParameter:
    """The stored tensors that make up a parameter: those of a part are joined along their first dimension, and where it
    ``is_stack`` the parts are stacked along a new one. ``parts`` is empty where the conversion is of another kind.

    With ``part`` it is that slice, or those rows, of the one tensor; ``is_transposed`` where what is stored is ``Wᵀ``.
    """

    parts: tuple[tuple[str, ...], ...]
    is_stack: bool = False
    part: TensorSlice = None
    is_transposed: bool = False

    @property
    def own_name(self) -> str | None:
        """The one tensor that equals the parameter; None where it is made of several or changed."""
        whole = not self.is_stack and self.part is None and [len(part) for part in self.parts] == [1]
        return self.parts[0][0] if whole and not self.is_transposed else None

    def slice(self, index: int, is_transposed: bool) -> StoredParameter:
        """What holds slice ``index`` along the parameter's first dimension, or the transpose of that slice."""
        if self.is_stack:
            return StoredParameter((self.parts[index],), is_transposed=is_transposed)
        return dataclasses.replace(self, part=index, is_transposed=is_transposed != self.is_transposed)

    def rows(self, checkpoint: Checkpoint) -> tuple[StoredRows, ...]:
        """The tensors, or the slice, that make it up, in the order of their rows; of a scalar the one tensor."""
        [part] = self.parts
        sizes = [StoredRows(name, 0, self.part).entry(checkpoint).shape[0] for name in part[:-1]]
        return tuple(StoredRows(name, sum(sizes[:k]), self.part) for k, name in enumerate(part))

    def read(self, checkpoint: Checkpoint, read: Callable[[TensorEntry], Tensor] = TensorEntry.read_rows) -> Tensor:
        """The whole parameter in its stored dtype, its tensors read by ``read``; raises ArtifactError where one is missing."""
        if self.is_stack:
            return torch.stack([_join([read(checkpoint.entry(name)) for name in part]) for part in self.parts])
        joined = _join([read(rows.entry(checkpoint)) for rows in self.rows(checkpoint)])
        return joined.T if self.is_transposed else joined


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass
class _Collected:
    """What was found of one parameter, by the pattern of its conversion that each stored name matched; ``rows``: those of a
    tensor that is split."""

    converter: Any = None
    names: dict[str | None, list[str]] = field(default_factory=dict)
    rows: tuple[int, int] = (0, 0)


def stored_parameters(model: Any, names: Iterable[str] | Mapping[str, Sequence[int]]) -> dict[str, StoredParameter]:
    """Maps the name of each of the model's parameters and buffers to what holds it, of the tensors named.

    Those that no tensor makes up are left out; ``model`` may be on the meta device. The tensors' shapes, where they
    are given, say whether one that may be stored transposed is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    views, own = unfused_views(model), model.state_dict()
    # The shape of a slice of each fused parameter, as it is in memory.
    sliced = {v.parameter: tuple(own[n].shape[::-1] if v.is_transposed else own[n].shape) for n, v in views.items()}
    state = {name: tensor for name, tensor in own.items() if name not in views} | dict.fromkeys(sliced, 0)
    named = sorted(names, key=dot_natural_key)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    collected: dict[str, _Collected] = {}
    for name in named:
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # as transformers does: a name that should not have been changed
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        converter = by_pattern[pattern] if pattern else None
        first, *others = getattr(converter, "target_patterns", None) or [""]
        begin = 0
        for part in (first, *others):  # several where one tensor is split
            made = target.replace(first, part)
            end = begin + next(iter(getattr(state.get(made), "shape", ())), 0)
            parts = collected.setdefault(made, _Collected(converter, rows=(begin, end)))
            parts.names.setdefault(pattern, []).append(name)
            begin = end
    shapes = names if isinstance(names, Mapping) else {}
    stored = {target: _stored(parts, sliced.get(target), shapes) for target, parts in collected.items()}
    whole = {name: parts for name, parts in stored.items() if name not in sliced}
    apart = {
        name: stored[view.parameter].slice(view.index, view.is_transposed)
        for name, view in views.items()
        if view.parameter in stored
    }
    return whole | apart


def unused_tensors(stored: Mapping[str, StoredParameter], names: Iterable[str]) -> frozenset[str]:
    """The stored tensors that no parameter and no buffer is made of, such as masks that earlier versions saved. None where
    transformers makes a parameter in a way not known here."""
    if not all(parameter.parts for parameter in stored.values()):
        return frozenset()
    return frozenset(names) - {name for parameter in stored.values() for part in parameter.parts for name in part}


def tied_tensors(model: Any, stored: Mapping[str, StoredParameter]) -> dict[str, str]:
    """The stored tensors of parameters that the model ties to others, and the tensors of these."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    pairs = [
        (stored[name].own_name, stored[other].own_name) for name, other in tied.items() if {name, other} <= {*stored}
    ]
    return {one: other for one, other in pairs if one is not None and other is not None and one != other}


def missing_parameters(model: Any, stored: Mapping[str, StoredParameter]) -> list[str]:
    """The model's parameters that nothing stored makes up, nor one that they are tied to, and that :func:`may_be_missing` does
    not excuse."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)  # the name of another parameter, by name
    present = {tied.get(name, name) for name in stored}
    missing = [name for name, _ in model.named_parameters() if tied.get(name, name) not in present]
    return [name for name in missing if not may_be_missing(model, name)]


def may_be_missing(model: Any, name: str) -> bool:
    """Whether transformers says that checkpoints need not hold a parameter, as a table of positions, which it computes."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _stored(
    collected: _Collected, slice_shape: tuple[int, ...] | None, shapes: Mapping[str, Sequence[int]]
) -> StoredParameter:
    if collected.converter is None:
        return StoredParameter(((collected.names[None][0],),))
    operations = [type(operation).__name__ for operation in collected.converter.operations]
    dims = [operation.dim for operation in collected.converter.operations if hasattr(operation, "dim")]
    columns = [collected.names.get(pattern, []) for pattern in collected.converter.source_patterns]
    if operations == ["MergeModulelist"] and dims == [0] and len(columns) == 1:
        return StoredParameter(tuple((name,) for name in columns[0]), True)
    if operations == ["MergeModulelist", "Concatenate"] and dims == [0, 1] and len({len(c) for c in columns}) == 1:
        return StoredParameter(tuple(zip(*columns, strict=True)), True)
    if operations == ["Concatenate"] and dims == [0]:
        return StoredParameter((tuple(name for column in columns for name in column),))
    [first, *_], operation = columns[0] or [""], collected.converter.operations[0]
    if operations in (["Chunk"], ["Split"]) and dims == [0] and len(collected.converter.target_patterns) > 1:
        return StoredParameter(((first,),), part=collected.rows)
    if operations == ["Transpose"] and slice_shape is not None and {operation.dim0, operation.dim1} == {1, 2}:
        fits = operation.check_dims and tuple(shapes.get(first, ())[1:]) == slice_shape
        return StoredParameter(((first,),), is_transposed=not fits)
    return StoredParameter(())


def stored_specs(
    specs: Sequence[LinearSpec], stored: Mapping[str, StoredParameter], checkpoint: Checkpoint
) -> tuple[LinearSpec, ...]:
    """The linears with where the checkpoint holds them; raises ArtifactError as :func:`require`, and where one shares a tensor
    with what is no linear of these."""
    made = tuple(_stored_spec(spec, stored, checkpoint) for spec in specs)
    shared: dict[str, int] = {}
    for rows in (rows for spec in made for rows in spec.stored if isinstance(rows.part, tuple)):
        shared[rows.name] = shared.get(rows.name, 0) + rows.entry(checkpoint).shape[0]
    for name, count in shared.items():
        if count != checkpoint.entry(name).shape[0]:
            raise _unknown_form(checkpoint, name)
    return made


def _stored_spec(spec: LinearSpec, stored: Mapping[str, StoredParameter], checkpoint: Checkpoint) -> LinearSpec:
    weight = require(stored, spec.weight_name, checkpoint)
    if weight.own_name == spec.weight_name:
        return spec
    bias = stored.get(f"{spec.name}.bias") if spec.has_bias else None
    stored_bias = None if bias is None else bias.rows(checkpoint)[0]
    transposed = spec.transposed if spec.routed_share is None else weight.is_transposed
    return dataclasses.replace(spec, stored=weight.rows(checkpoint), stored_bias=stored_bias, transposed=transposed)


def renamed_tensors(stored: Mapping[str, StoredParameter]) -> dict[str, str]:
    """Maps each stored tensor that equals a parameter of another name to that name."""
    return {parameter.own_name: name for name, parameter in stored.items() if parameter.own_name not in (None, name)}


def require(stored: Mapping[str, StoredParameter], name: str, checkpoint: Checkpoint) -> StoredParameter:
    """What holds a parameter; raises ArtifactError where nothing does, or transformers makes it in a way not known here."""
    parameter = stored.get(name)
    if parameter is None:
        raise ArtifactError(f"{checkpoint.directory} holds no tensor {name}: the checkpoint does not fit its config.")
    if not parameter.parts:
        raise _unknown_form(checkpoint, name)
    return parameter


def _unknown_form(checkpoint: Checkpoint, name: str) -> ArtifactError:
    return ArtifactError(
        f"{checkpoint.directory} holds {name} in a form that only transformers can convert: load it with transformers,"
        " save it again with save_pretrained(save_original_format=False), and name that."
    )
