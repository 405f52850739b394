"""A model without its weights: its linears, which of them read the same tensor, and its sizes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from emloc_ray.modeling.architecture import (
    ImageShape,
    LinearSpec,
    block_linears,
    block_names,
    learned_positions,
    linears_between,
    other_linears,
    trace_inputs,
    unfactorable,
)
from emloc_ray.modeling.block_activations import BlockActivations, watched_blocks
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.modeling.expert_adapters import renamed_by_peft
from emloc_ray.modeling.nf4 import replaceable_linears


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights: its linears, grouped by the tensor that they read, and its sizes."""

    config: Any
    specs: tuple[LinearSpec, ...]
    groups: tuple[tuple[LinearSpec, ...], ...]
    positions: int | None
    num_parameters: int
    head_parameters: int
    hidden_size: int
    replaceable: tuple[str, ...] = ()  # linears anywhere that transformers can replace by 4-bit ones
    modules: tuple[str, ...] = ()
    left_as_is: dict[str, str] = field(default_factory=dict)  # other modules with weights, and their kinds
    left_in_blocks: dict[str, int] = field(default_factory=dict)  # parameters in blocks of what is no linear, by kinds
    left_by_block: dict[str, int] = field(default_factory=dict)  # the same, by blocks
    image: ImageShape = field(default_factory=ImageShape)
    whole_logits: bool = False  # see Trace
    renamed: tuple[str, ...] = ()  # linears outside experts whose adapters PEFT does not load under their own names
    eager: bool = False  # whether attention makes its scores whole, by no kernel
    activations: dict[str, BlockActivations] = field(default_factory=dict)  # by blocks


def skeleton_of(
    model_config: Any, model: Any, example: Mapping[str, Tensor] | None = None, trust_remote_code: bool = False
) -> Skeleton:
    """Of a model on any device, meta included; ``example``: the model's inputs for an image, where it reads images."""
    linears = block_linears(model)
    if example:
        next_blocks = block_flow(model_config, trust_remote_code, example).between
        by_name = {spec.name: spec for spec in (*linears, *linears_between(model, next_blocks))}
        linears = [by_name[name] for name, _ in model.named_modules() if name in by_name]  # in the model's order
    with watched_blocks(model, block_names(model)) as activations:
        trace = trace_inputs(model, linears, example)
    # A linear that is never called, in a block that ran, has its weight read by its owner: it stays as it is.
    if not example:
        ran = {spec.block for spec in linears if spec.name in trace.streams and spec.routed_share is None}
        linears = [s for s in linears if s.name in trace.streams or s.block not in ran or s.routed_share is not None]
    specs = [replace(spec, stream=trace.streams.get(spec.name, spec.stream)) for spec in linears]
    by_name = {spec.name: spec for spec in specs}
    groups = tuple(tuple(by_name[name] for name in group) for group in trace.groups if group[0] in by_name)
    image = ImageShape()
    if example:
        inside = [spec for spec in specs if spec.name in trace.image_tokens and not spec.between]
        image = ImageShape(example["input_ids"].shape[1], {s.block: trace.image_tokens[s.name] for s in inside})
    head = model.get_output_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    no_linears = unfactorable(model)
    return Skeleton(
        model_config,
        tuple(specs),
        groups,
        learned_positions(model),
        parameters,
        head.weight.numel(),
        head.weight.shape[-1],
        replaceable_linears(model),
        tuple(name for name, _ in model.named_modules() if name),
        no_linears | other_linears(model, by_name),
        *_in_blocks(model, no_linears),
        image,
        trace.whole_logits,
        tuple(renamed_by_peft(model, [spec.name for spec in specs if spec.routed_share is None])),
        model.config.get_text_config()._attn_implementation == "eager",
        activations,
    )


def _in_blocks(model: Any, others: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """The parameters of the modules named, those inside blocks: by their kinds, and by blocks."""
    by_kind, by_block = Counter[str](), Counter[str]()
    for block in block_names(model):
        for name in (name for name in others if name.startswith(f"{block}.")):
            count = sum(parameter.numel() for parameter in model.get_submodule(name).parameters(recurse=False))
            by_kind[others[name]] += count
            by_block[block] += count
    return dict(+by_kind), dict(+by_block)
