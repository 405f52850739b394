"""Smaller models by leaving parts out, the baselines that an emulator is compared with, and their adapters made whole.

``layers`` drops whole blocks evenly, as Offsite-Tuning does (arXiv 2302.04870); ``random`` and ``structured`` drop
attention groups and MLP channels of every block, as LoRAM does (arXiv 2502.13533). What is kept is a plain transformers
checkpoint; the adapter trained on it is scattered to the original's shapes by :func:`recover_adapter`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ablations.config import Kind
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.io.store.atomic import atomic_directory, write_json
from emloc_ray.modeling.adapter_files import Adapter, LoraModule, lora_config, write_adapter
from emloc_ray.modeling.architecture import load_config
from emloc_ray.modeling.loading import copy_tokenizer, load_model

FAMILIES = ("llama", "qwen2", "mistral")
KEPT_NAME = "kept.json"
_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")


@dataclass(frozen=True)
class Shape:
    """The blocks of a Llama-style model; a ``group`` is a key-value head with the query heads that read it."""

    num_layers: int
    hidden_size: int
    head_dim: int
    num_heads: int
    num_groups: int
    num_channels: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a transformers config."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = config.num_key_value_heads or heads
        return cls(config.num_hidden_layers, config.hidden_size, head_dim, heads, groups, config.intermediate_size)

    @property
    def heads_per_group(self) -> int:
        """Query heads that read one key-value head."""
        return self.num_heads // self.num_groups

    @property
    def group_parameters(self) -> int:
        """Weights of one group: its rows of q, k and v, its columns of o."""
        return self.hidden_size * self.head_dim * (2 * self.heads_per_group + 2)

    @property
    def channel_parameters(self) -> int:
        """Weights of one MLP channel: a row of gate, one of up, a column of down."""
        return 3 * self.hidden_size

    @property
    def block_parameters(self) -> int:
        """Weights of one block's linears."""
        return self.num_groups * self.group_parameters + self.num_channels * self.channel_parameters


@dataclass(frozen=True)
class KeptLayer:
    """The kept parts of one of the original's layers, in ascending lists."""

    layer: int
    groups: list[int]
    heads: list[int]
    channels: list[int]

    @classmethod
    def of(cls, shape: Shape, layer: int, groups: Sequence[int], channels: Sequence[int]) -> KeptLayer:
        """With the query heads of its groups."""
        heads = _spread(groups, shape.heads_per_group)
        return cls(layer, list(groups), heads, list(channels))

    def indices(self, head_dim: int, linear: str) -> tuple[list[int] | None, list[int] | None]:
        """Which outputs and which inputs of a linear are kept; None: all."""
        outputs = {
            "q_proj": (self.heads, head_dim),
            "k_proj": (self.groups, head_dim),
            "v_proj": (self.groups, head_dim),
        }
        outputs |= dict.fromkeys(("gate_proj", "up_proj"), (self.channels, 1))
        inputs = {"o_proj": (self.heads, head_dim), "down_proj": (self.channels, 1)}
        rows, columns = (_spread(*kept[linear]) if linear in kept else None for kept in (outputs, inputs))
        return rows, columns


@dataclass(frozen=True)
class Kept:
    """``kept.json``: what a pruned model has of its original ``model``, in the order of its own layers."""

    model: str
    shape: Shape
    layers: list[KeptLayer]

    @classmethod
    def read(cls, path: Path) -> Kept:
        """Raises ArtifactError where the file is missing or another."""
        try:
            record = json.loads(path.read_text())
            return cls(record["model"], Shape(**record["shape"]), [KeptLayer(**layer) for layer in record["layers"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is no {KEPT_NAME} of a pruned model: give the one beside its weights."
            ) from error

    @property
    def num_parameters(self) -> int:
        """Weights of the kept blocks' linears."""
        shape = self.shape
        return sum(
            len(layer.groups) * shape.group_parameters + len(layer.channels) * shape.channel_parameters
            for layer in self.layers
        )


def prune(model_dir: Path, out_dir: Path, kind: Kind, ratio: float, seed: int, grams_dir: Path | None) -> None:
    """Writes a smaller plain checkpoint with tokenizer and ``kept.json`` as ``out_dir``, atomically.

    Of the weights of the blocks' linears at most ``ratio`` is kept. ``layers`` keeps ``⌊ratio · layers⌋`` whole blocks, the
    first and the last among them and the others evenly between. ``random`` and ``structured`` keep as many attention groups
    and MLP channels in every block: the groups nearest to ``ratio`` of them (the more of two) of those numbers whose
    heads divide the hidden size, which Llama's config asks for, and of the MLP as many channels as are left; so less
    than a channel a block is missing from the budget. ``random`` draws them, ``structured`` keeps those whose outputs
    are largest on the calibration's inputs: of a channel ``Σ_out W_down[:, j]² G_jj``, of a group the sum over its
    heads of ``tr(W_o,h G_hh W_o,hᵀ)``, with the Grams of a run's ``calibration/``.

    Args:
        model_dir: a Llama, Qwen2 or Mistral as safetensors, with tokenizer.
        out_dir: is replaced.
        kind: ``layers``, ``random`` or ``structured``.
        ratio: within ``(0, 1]``.
        seed: of what ``random`` draws.
        grams_dir: for ``structured`` alone.

    Raises:
        ConfigError: for another family, a ratio too small for what must be kept, or no Grams.
    """
    shape, model = checked_shape(load_config(model_dir), kind, ratio), load_model(model_dir, device="cpu")
    if kind == "layers":
        layers = _even_layers(shape, ratio)
    elif kind == "random":
        layers = _random_parts(shape, ratio, seed)
    else:
        if grams_dir is None:
            raise ConfigError(
                "Structured pruning weighs by Grams: give the calibration directory of a run on this model."
            )
        layers = _largest_parts(shape, ratio, model, GramStore(grams_dir))
    kept = Kept(str(model_dir), shape, layers)
    _shrink(model, kept)
    total = shape.num_layers * shape.block_parameters
    facts = {"kind": kind, "ratio": ratio, "seed": seed, "parameters": total, "kept_parameters": kept.num_parameters}
    with atomic_directory(out_dir) as temporary:
        model.save_pretrained(temporary)
        copy_tokenizer(model_dir, temporary)
        write_json(temporary / KEPT_NAME, facts | asdict(kept))


def recover_adapter(adapter_dir: Path, kept_path: Path, out_dir: Path) -> None:
    """Writes the LoRA adapter trained on a pruned model as one of its original, which plain PEFT loads on that.

    ``A (r, in)`` has its columns at the kept inputs and ``B (out, r)`` its rows at the kept outputs, zeros elsewhere; layers
    have the original's numbers, and what was dropped has no adapter. The scale is part of ``B``.

    Raises:
        ConfigError: the adapter is none of LoRA or rsLoRA, or on other modules.
        ArtifactError: a file is missing, or the adapter is of another model.
    """
    kept, adapter = Kept.read(kept_path), Adapter(adapter_dir)
    if not adapter.is_lora or adapter.kind != "additive":
        raise ConfigError(
            f"{adapter_dir} is neither LoRA nor rsLoRA, which alone can be recovered: train one of those."
        )
    modules = [_recovered(adapter.module(name), kept, adapter_dir) for name in adapter.names]
    # Full names: a suffix would put untrained adapters on the layers that were dropped.
    own = {"base_model_name_or_path": kept.model, "target_modules": [m.name for m in modules], "exclude_modules": None}
    write_adapter(out_dir, lora_config(adapter.config, modules) | own, modules)


def checked_shape(config: Any, kind: Kind, ratio: float) -> Shape:
    """The shape of a model that can be pruned so.

    Raises:
        ConfigError: for another family, or a ratio too small for what must be kept.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"The model is a {config.model_type}, and what can be pruned is {', '.join(FAMILIES)}: give one of those."
        )
    if not 0 < ratio <= 1:
        raise ConfigError(f"The ratio to keep is {ratio}: give one above 0 and up to 1.")
    shape = Shape.of(config)
    if kind == "layers":
        _even_layers(shape, ratio)
    else:
        kept_counts(shape, ratio)
    return shape


def kept_counts(shape: Shape, ratio: float) -> tuple[int, int]:
    """Attention groups and MLP channels of each block that together are at most ``ratio`` of its weights.

    Raises:
        ConfigError: where one group and one channel are more than that.
    """
    share = _exact(ratio)
    budget = math.floor(share * shape.block_parameters)
    shapes = {
        groups: (budget - groups * shape.group_parameters) // shape.channel_parameters
        for groups in range(1, shape.num_groups + 1)
        if shape.hidden_size % (groups * shape.heads_per_group) == 0 or groups == shape.num_groups
    }
    shapes = {groups: channels for groups, channels in shapes.items() if 1 <= channels <= shape.num_channels}
    if not shapes:
        raise ConfigError(f"The ratio {ratio} leaves no block an attention group and an MLP channel: keep more.")
    return min(shapes.items(), key=lambda item: (abs(item[0] - share * shape.num_groups), -item[0]))


def _even_layers(shape: Shape, ratio: float) -> list[KeptLayer]:
    count = math.floor(_exact(ratio) * shape.num_layers)
    if count < 2:
        raise ConfigError(
            f"The ratio {ratio} leaves {count} of {shape.num_layers} layers, and the first and the last have to stay:"
            " keep more."
        )
    numbers = [round(Fraction(i * (shape.num_layers - 1), count - 1)) for i in range(count)]
    whole = range(shape.num_groups), range(shape.num_channels)
    return [KeptLayer.of(shape, number, *whole) for number in numbers]


def _random_parts(shape: Shape, ratio: float, seed: int) -> list[KeptLayer]:
    generator = torch.Generator().manual_seed(seed)
    groups, channels = kept_counts(shape, ratio)

    def draw(count: int, of: int) -> list[int]:
        return sorted(torch.randperm(of, generator=generator)[:count].tolist())

    return [
        KeptLayer.of(shape, layer, draw(groups, shape.num_groups), draw(channels, shape.num_channels))
        for layer in range(shape.num_layers)
    ]


def _largest_parts(shape: Shape, ratio: float, model: nn.Module, grams: GramStore) -> list[KeptLayer]:
    groups, channels = kept_counts(shape, ratio)
    layers = []
    for layer in range(shape.num_layers):
        names = [f"model.layers.{layer}.{name}" for name in ("self_attn.o_proj", "mlp.down_proj")]
        missing = next((name for name in names if name not in grams), None)
        if missing is not None:
            raise ConfigError(
                f"{grams.directory} holds no Gram of {missing}: calibrate a run that compresses all linears."
            )
        (out, out_gram), (down, down_gram) = ((model.get_parameter(f"{n}.weight"), grams.read(n)) for n in names)
        of_groups = group_energies(out, out_gram, shape.num_groups)
        of_channels = group_energies(down, down_gram, shape.num_channels)
        layers.append(KeptLayer.of(shape, layer, _largest(of_groups, groups), _largest(of_channels, channels)))
    return layers


def group_energies(weight: Tensor, gram: Tensor, num_groups: int) -> Tensor:
    """``tr(W_g G_gg W_gᵀ)`` of as many equal runs ``g`` of the inputs of ``weight (out, in)``: what each alone adds to the
    outputs' energy over the tokens of ``gram (in, in)``. Returns ``(num_groups,)`` in float64."""
    width = gram.shape[0] // num_groups
    columns = weight.detach().double().unflatten(1, (num_groups, width))  # (out, groups, width)
    # The diagonal blocks G_gg, (width, width, groups).
    blocks = gram.double().unflatten(0, (num_groups, width)).unflatten(2, (num_groups, width)).diagonal(dim1=0, dim2=2)
    return torch.einsum("ogi,ijg,ogj->g", columns, blocks, columns)


def _largest(values: Tensor, count: int) -> list[int]:
    return sorted(values.topk(count).indices.tolist())


def _shrink(model: Any, kept: Kept) -> None:
    """Cuts the model and its config in place to the kept parts."""
    config, shape, first = model.config, kept.shape, kept.layers[0]
    blocks = [model.model.layers[layer.layer] for layer in kept.layers]
    for block, layer in zip(blocks, kept.layers, strict=True):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                _cut(module, *layer.indices(shape.head_dim, name.rsplit(".", 1)[-1]))
    model.model.layers = nn.ModuleList(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer.layer] for layer in kept.layers]
    config.head_dim = shape.head_dim
    config.num_hidden_layers = len(kept.layers)
    config.num_attention_heads, config.num_key_value_heads = len(first.heads), len(first.groups)
    config.intermediate_size = len(first.channels)


def _cut(linear: nn.Linear, rows: list[int] | None, columns: list[int] | None) -> None:
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight[rows], requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows], requires_grad=False)
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight[:, columns].contiguous(), requires_grad=False)


def _recovered(module: LoraModule, kept: Kept, adapter_dir: Path) -> LoraModule:
    """Under the original's name and in its shape, of scale 1."""
    match = _LINEAR.fullmatch(module.name)
    if match is None:
        raise ConfigError(f"{adapter_dir} adapts {module.name}, which is no linear of a block: adapt those alone.")
    number, linear = int(match[1]), match[2]
    if number >= len(kept.layers):
        raise ArtifactError(
            f"{adapter_dir} adapts {module.name}, but {len(kept.layers)} layers are kept: they do not fit."
        )
    layer, shape = kept.layers[number], kept.shape
    rows, columns = layer.indices(shape.head_dim, linear)
    widths = {
        "q_proj": shape.num_heads,
        "o_proj": shape.num_heads,
        "k_proj": shape.num_groups,
        "v_proj": shape.num_groups,
    }
    full = widths[linear] * shape.head_dim if linear in widths else shape.num_channels
    lora_a = _scattered(module.lora_a, 1, columns, full, module.name)
    lora_b = _scattered(module.lora_b * module.scale, 0, rows, full, module.name)
    return LoraModule(module.name.replace(f"layers.{number}.", f"layers.{layer.layer}.", 1), lora_a, lora_b, 1.0)


def _scattered(tensor: Tensor, dim: int, kept: list[int] | None, full: int, name: str) -> Tensor:
    """The same entries at the indices ``kept`` of ``full`` along ``dim``, zeros elsewhere; as it is where all are kept."""
    if kept is None:
        return tensor
    if tensor.shape[dim] != len(kept):
        raise ArtifactError(f"The adapter of {name} has {tensor.shape[dim]} features, but {len(kept)} are kept.")
    sizes = list(tensor.shape)
    sizes[dim] = full
    return tensor.new_zeros(sizes).index_copy_(dim, torch.tensor(kept), tensor)


def _spread(numbers: Sequence[int], width: int) -> list[int]:
    """The members of runs of ``width``, of which these are the numbers."""
    return [number * width + offset for number in numbers for offset in range(width)]


def _exact(ratio: float) -> Fraction:
    """The ratio as it was written: 0.3 of ten layers is three."""
    return Fraction(str(ratio))
