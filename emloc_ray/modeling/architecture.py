"""What a model is made of, known without its weights: blocks, linears, and which linears read the same tensor."""

import functools
import re
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.checkpoint_config import check_config
from emloc_ray.modeling.experts import UnfusedExperts, experts_of, owner_of, unfuse
from emloc_ray.modeling.inputs import Stream, has_encoder
from emloc_ray.modeling.integer_linear import FrozenLinear
from emloc_ray.modeling.meta_pass import UNTRACEABLE, MetaPass
from emloc_ray.modeling.weight_reads import children_read

_MAKING = threading.Lock()
# By the name of the linear itself, or of the module that holds it.
_ROUTER = re.compile(r"(.*\.)?(router|gate|router_gate|shared_expert_gate)(\..*)?")


TensorSlice = int | tuple[int, int] | None  # of a stored tensor: a slice's number, rows [first, end), or all of it


@dataclass(frozen=True)
class StoredRows:
    """A tensor of the checkpoint that holds a weight's stored rows from ``begin`` on; with a ``part`` that does: slice number
    ``part``, or the rows ``[first, end)`` of a tensor that several weights share."""

    name: str
    begin: int = 0
    part: TensorSlice = None

    def entry(self, checkpoint: Checkpoint) -> TensorEntry:
        """Where those rows are; raises ArtifactError where the checkpoint lacks the tensor."""
        return self.of(checkpoint.entry(self.name))

    def of(self, whole: TensorEntry) -> TensorEntry:
        """They, of that tensor."""
        if self.part is None:
            return whole
        return whole.slice(self.part) if isinstance(self.part, int) else whole.span(*self.part)


@dataclass(frozen=True)
class LinearSpec:
    """A linear inside one of the model's blocks: ``y = W x``, ``W (out, in)``; ``transposed`` where the checkpoint
    stores ``(in, out)`` (``Conv1D``).

    One ``between`` blocks, as in a projector from what an image's blocks give to what a text's read, has the ``block``
    that runs next. ``stored`` and ``stored_bias`` say what holds it in the checkpoint, where that is not under its own
    name; ``stream`` which tokens it reads. ``routed_share`` is the share of these that a router sends to an expert, of
    which this linear is one's, on average; None where all are read.
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool
    transposed: bool
    block: str
    stored: tuple[StoredRows, ...] = ()
    stored_bias: StoredRows | None = None
    stream: Stream = "row"
    between: bool = False
    routed_share: float | None = None

    @property
    def token_share(self) -> float:
        """The share of tokens that it reads, on average."""
        return 1.0 if self.routed_share is None else self.routed_share

    @property
    def weight_name(self) -> str:
        """The weight's name in the model."""
        return f"{self.name}.weight"

    @property
    def weight_rows(self) -> tuple[StoredRows, ...]:
        """The tensors of the checkpoint that hold the weight, in the order of their rows."""
        return self.stored or (StoredRows(self.weight_name),)

    @property
    def bias_rows(self) -> StoredRows:
        """What holds the bias, where there is one."""
        return self.stored_bias or StoredRows(f"{self.name}.bias")

    def read_weight(self, checkpoint: Checkpoint) -> torch.Tensor:
        """``W (out, in)`` in its stored dtype; raises ArtifactError where the checkpoint lacks it."""
        parts = [rows.entry(checkpoint).read_rows() for rows in self.weight_rows]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.T if self.transposed else joined

    @property
    def num_parameters(self) -> int:
        """Parameters of the weight."""
        return self.out_features * self.in_features


def auto_class(config: Any) -> Any:
    """The transformers Auto class that opens models of this config: the one whose class the config's ``architectures`` name,
    as a type may be a decoder alone in one and a whole model in another, else the most specific, of an encoder-decoder one
    of the whole."""
    opened = {}
    decoder, *whole = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM")
    for name in (*whole, decoder) if has_encoder(config) else (decoder, *whole):
        auto = getattr(transformers, name)
        remote = (getattr(config, "auto_map", None) or {}).get(name)
        if remote or type(config) in auto._model_mapping:
            opened[auto] = remote.rpartition(".")[2] if remote else _mapped(auto, config)
    if not opened:
        raise ConfigError(
            f"Models of type {config.model_type} have no language-model head in transformers: choose another."
        )
    named = getattr(config, "architectures", None) or ()
    return next((auto for auto, model in opened.items() if model in named), next(iter(opened)))


def _mapped(auto: Any, config: Any) -> str:
    """The name of the class that an Auto class opens models of this config with."""
    model = auto._model_mapping[type(config)]
    return str((model[0] if isinstance(model, tuple) else model).__name__)


def empty_model(config: Any, trust_remote_code: bool = False, attn_implementation: str | None = None) -> Any:
    """The model on the meta device, its experts unfused: names and shapes, no weights."""
    from accelerate import init_empty_weights

    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    # It replaces torch's own functions: of two threads at it, as tasks of a batch, the later would put back the other's.
    with _MAKING, init_empty_weights(include_buffers=True):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **options).eval()
        return unfuse(model)


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model with an embedding for each has; None where positions are computed (rotary)."""
    others = tuple(f"{name}." for name in towers(model))
    tokens = model.get_input_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    beside = next((name.rpartition(".")[0] for name, module in model.named_modules() if module is tokens), "")
    for name, module in model.named_modules():
        if not name.startswith(beside):  # an image's patches have positions of their own
            continue
        if isinstance(module, nn.Embedding) and re.search(r"(wpe|position\w*)$", name) and not name.startswith(others):
            return int(getattr(getattr(model, "config", None), "max_position_embeddings", module.num_embeddings))
    return None


def towers(model: nn.Module) -> list[str]:
    """The parts of a model that are models of their own and read no text, as a vision tower is."""
    return [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, transformers.PreTrainedModel) and "text" not in module.input_modalities
    ]


def block_names(model: nn.Module) -> list[str]:
    """The blocks of a model or an emulator: the members of its outermost ``ModuleList``s that are alike and hold linears, and
    are none."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if inside or not isinstance(module, nn.ModuleList) or not _are_alike(module):
            continue
        inner = (child for member in module for child in list(member.modules())[1:])
        if any(_is_linear(child) or isinstance(child, FrozenLinear) for child in inner):
            blocks += [f"{name}.{index}" for index in range(len(module))]
    return blocks


def _are_alike(members: nn.ModuleList) -> bool:
    """Whether members are of one class, or all layers in transformers' sense, as those of hybrids are of several classes."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # seconds, where a model is there already

    kinds = {type(member) for member in members}
    return (len(kinds) == 1 and nn.ModuleList not in kinds) or all(
        issubclass(k, GradientCheckpointingLayer) for k in kinds
    )


def block_linears(model: nn.Module) -> list[LinearSpec]:
    """Every linear inside the model's blocks, in the model's order; without routers, and those whose weights are read."""
    specs = []
    experts = experts_of(model)
    for block in block_names(model):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if _is_linear(module) and not _ROUTER.fullmatch(name) and not _is_read(model, name):
                owner = owner_of(name)
                specs.append(_spec(name, module, block, experts.get(owner[0]) if owner else None))
    if not specs:
        raise ConfigError(f"{type(model).__name__} has no linears inside repeated blocks: nothing to compress there.")
    return specs


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the code of a linear's owner takes its weight for a computation of its own."""
    owner, _, child = name.rpartition(".")
    kind: Any = type(model.get_submodule(owner))
    return child in children_read(kind)


def linears_between(model: nn.Module, next_blocks: Mapping[str, str]) -> list[LinearSpec]:
    """The linears outside all blocks that carry what one block gives to another; ``next_blocks``: which runs next."""
    return [
        replace(_spec(name, model.get_submodule(name), block, None), between=True)
        for name, block in next_blocks.items()
    ]


def outside_linears(model: nn.Module) -> list[str]:
    """The names of the linears outside all blocks, routers left out."""
    inside = tuple(f"{block}." for block in block_names(model))
    named = model.named_modules()
    return [n for n, module in named if _is_linear(module) and not n.startswith(inside) and not _ROUTER.fullmatch(n)]


def unfactorable(model: nn.Module) -> dict[str, str]:
    """The modules that have weights of their own but are no linears, with their kinds: convolutions, embeddings, …"""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if not _is_linear(module) and any(weight.dim() > 1 for weight in module.parameters(recurse=False))
    }


def other_linears(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """The linears that are not among ``names``, with their kinds: heads, routers, …"""
    named = model.named_modules()
    return {name: type(module).__name__ for name, module in named if _is_linear(module) and name not in names}


def _is_linear(module: nn.Module) -> bool:
    kind: Any = type(module)
    return _computes_linear(kind)


@functools.cache
def _computes_linear(kind: type[Any]) -> bool:
    """Whether modules of a class compute ``W x + b``. A subclass of ``nn.Linear`` may compute something else: it is tried.
    Torch's own are taken for another: their owners read their weights, as in ``MultiheadAttention``."""
    if kind in (nn.Linear, Conv1D):
        return True
    if not issubclass(kind, nn.Linear) or kind.__module__.partition(".")[0] == "torch":
        return False
    weight, bias, x = (torch.arange(1.0, size + 1, device="cpu") / size for size in (6, 2, 12))
    module: Any = nn.Linear(3, 2, device="meta")
    module.weight, module.bias = nn.Parameter(weight.reshape(2, 3)), nn.Parameter(bias)
    module.__class__ = kind
    try:
        given = [module.train(training)(x.reshape(1, 4, 3)) for training in (True, False)]
        return all(torch.allclose(output, x.reshape(1, 4, 3) @ module.weight.T + bias) for output in given)
    except Exception:  # noqa: BLE001  it needs more than a linear has, or gives no tensor of that shape
        return False


def _spec(name: str, module: Any, block: str, experts: UnfusedExperts | None) -> LinearSpec:
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return LinearSpec(name, out_features, in_features, True, True, block)
    spec = LinearSpec(name, module.out_features, module.in_features, module.bias is not None, False, block)
    if experts is None:
        return spec
    return replace(spec, transposed=experts.is_transposed, routed_share=experts.routed_share)


# Tokens of each stream in a trace: their number tells which stream a linear reads.
_TRACED: dict[Stream, int] = {"row": 8, "decoder": 5}


def traced_inputs(config: Any) -> dict[str, torch.Tensor]:
    """What a model is called with on the meta device: one row, and tokens for a decoder beside an encoder."""
    inputs = {"input_ids": torch.zeros(1, _TRACED["row"], dtype=torch.long, device="meta")}
    if has_encoder(config):
        inputs["decoder_input_ids"] = torch.zeros(1, _TRACED["decoder"], dtype=torch.long, device="meta")
    return inputs


@dataclass(frozen=True)
class Trace:
    """``groups``: the names of linears that read the same tensor; ``streams``: which tokens each of them reads;
    ``image_tokens``: how many those read that an image brings to run, for one image; ``whole_logits``: whether the model
    does something to what its head gives (a cap, a scale, a mask), so that they have to be made all at once."""

    groups: list[list[str]]
    streams: dict[str, Stream]
    image_tokens: dict[str, int] = field(default_factory=dict)
    whole_logits: bool = False


@dataclass(frozen=True)
class ImageShape:
    """The tokens of an image of 448 × 448 pixels: in the row, and in each block that only images reach. Zero and none where the
    model reads no images."""

    row_tokens: int = 0
    block_tokens: dict[str, int] = field(default_factory=dict)


def trace_inputs(model: Any, specs: Sequence[LinearSpec], example: Mapping[str, torch.Tensor] | None = None) -> Trace:
    """What the model's linears read, found by tracing one forward pass on the meta device, and another with an image.

    ``example`` is what a model that reads images is called with for one (:func:`emloc_ray.data.processors.example`): linears
    that only it brings to run read other tokens than the row's. Two inputs are the same where storage, offset, shape, strides
    and version agree. Where a model cannot run on the meta device, each linear is a group of its own: right, only slower.
    """
    text = _traced(model, specs, traced_inputs(getattr(model, "config", None)))
    if text is None:
        return Trace([[spec.name] for spec in specs], {})
    shown = _traced(model, specs, example) if example else None
    others = {spec.name for spec in specs if example and spec.name not in text.streams}
    with_image = shown.groups if shown is not None else [[name] for name in others]
    order = {spec.name: position for position, spec in enumerate(specs)}
    groups = [group for names in text.groups if (group := [name for name in names if name not in others])]
    groups += [group for names in with_image if (group := [name for name in names if name in others])]
    return Trace(
        sorted(groups, key=lambda names: order[names[0]]),
        {**text.streams, **dict.fromkeys(others, "other")},
        {name: tokens for name, tokens in shown.image_tokens.items() if name in others} if shown is not None else {},
        text.whole_logits,
    )


class _Reads:
    """What the linears of one pass read: ``seen`` has the names by tensor, ``streams`` and ``counts`` the tokens by name."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, ...], list[str]] = {}
        self.streams: dict[str, Stream] = {}
        self.counts: dict[str, int] = {}
        self._alive: list[torch.Tensor] = []  # a freed storage's address could be given to another tensor

    def note(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """The linear reads ``args[0]``."""
        tensor = args[0]
        self._alive.append(tensor)
        storage = tensor.untyped_storage()._cdata
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        self.seen.setdefault(key, []).append(name)
        length = tensor.shape[1] if tensor.dim() == 3 else -1
        self.streams[name] = next((stream for stream, tokens in _TRACED.items() if tokens == length), "row")
        self.counts[name] = tensor.shape[:-1].numel()


def _traced(model: Any, specs: Sequence[LinearSpec], inputs: Mapping[str, torch.Tensor]) -> Trace | None:
    """One pass on the meta device; None where the model cannot run there."""
    reads, given = _Reads(), []
    handles = [
        model.get_submodule(s.name).register_forward_pre_hook(functools.partial(reads.note, s.name)) for s in specs
    ]
    if (head := getattr(model, "get_output_embeddings", lambda: None)()) is not None:
        handles.append(head.register_forward_hook(lambda module, args, output: given.append((output, output._version))))
    try:
        with torch.no_grad(), MetaPass():
            result = model(**inputs, use_cache=False)
    except UNTRACEABLE:
        return None
    finally:
        for handle in handles:
            handle.remove()
    whole_logits = any(result.logits is not output or output._version != version for output, version in given)
    return Trace(_grouped(reads.seen, specs), reads.streams, reads.counts, whole_logits)


def _grouped(seen: dict[tuple[Any, ...], list[str]], specs: Sequence[LinearSpec]) -> list[list[str]]:
    """Linears that read one tensor once, together; each of the others alone."""
    order = {spec.name: position for position, spec in enumerate(specs)}
    times = Counter(name for names in seen.values() for name in names)
    groups = [once for names in seen.values() if (once := [name for name in names if times[name] == 1])]
    groups += [[spec.name] for spec in specs if times[spec.name] != 1]
    return [sorted(names, key=order.__getitem__) for names in groups]


def load_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model directory. Raises ConfigError as :func:`check_config` does."""
    ensure(directory, weights=False)
    check_config(directory, trust_remote_code)
    return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
