"""The emulator as a transformers model: the original's own class with some linears replaced by two factors.

On disk an emulator is a checkpoint of ``model_type: emloc_emulator`` that carries the original's config inside. After
``import emloc_ray`` the original's Auto class opens it; without that import transformers does not know the type and
raises, instead of loading random weights into dense layers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emloc_ray.core.integer_forms import IntegerForms, factor_bits
from emloc_ray.core.ranks import Storage
from emloc_ray.modeling.emulator_type import EmulatorModelConfig
from emloc_ray.modeling.experts import unfuse
from emloc_ray.modeling.integer_linear import IntegerLinear


class FactorizedLinear(nn.Module):
    """``y = up (down x) + bias``: a linear whose weight is ``up (out, r) @ down (r, in)``.

    Not a subclass of ``nn.Linear``, and its ``weight`` has no elements, so that nothing can mistake it for a dense layer and
    merge into it; the bias belongs to ``up``. ``in_sequence`` are the linears that it is, one after another; none where it is
    more.
    """

    in_sequence: tuple[str, ...] = ("down", "up")

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.down: nn.Linear | IntegerLinear = nn.Linear(in_features, rank, bias=False)
        self.up: nn.Linear | IntegerLinear = nn.Linear(rank, out_features, bias=bias)
        self.rank = rank

    def store_in(self, bits: int, group_size: int) -> None:
        """Makes both factors untrained integers."""
        bias = self.up.bias is not None
        self.down = IntegerLinear(self.in_features, self.rank, bits, group_size)
        self.up = IntegerLinear(self.rank, self.out_features, bits, group_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return self.up(self.down(x))

    @property
    def weight(self) -> Tensor:
        """An empty tensor, of the dtype and device that the layer computes in: models ask their linears for these (T5)."""
        stored = self.up.weight
        return torch.empty(0, dtype=getattr(self.up, "compute_dtype", None) or stored.dtype, device=stored.device)


class PivotedLinear(FactorizedLinear):
    """``y = [z; up z][order] + bias`` with ``z = down x``: a linear whose weight is stored as ``PivotedFactors`` are.
    ``up (out − r, r)``, ``down (r, in)``, ``order (out,)``; the bias is its own."""

    in_sequence = ()

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, rank)
        self.up = nn.Linear(rank, out_features - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        z = self.down(x)
        y: Tensor = _Reordered.apply(torch.cat([z, self.up(z)], dim=-1), self.order)
        return y if self.bias is None else y + self.bias


class ResidualLinear(FactorizedLinear):
    """``y = Q x + up (down x) + bias``: a linear whose weight is integers and factors of what these leave, in integers too."""

    in_sequence = ()

    def __init__(
        self, in_features: int, out_features: int, rank: int, bits: int, group_size: int, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, rank)
        self.store_in(factor_bits(bits), group_size)
        self.base = IntegerLinear(in_features, out_features, bits, group_size)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y if self.bias is None else y + self.bias


class _Reordered(torch.autograd.Function):
    """``y[..., order]`` of a permutation, whose gradient is reordered the other way. By ``gather``, which took a fifth of
    ``index_select``'s time on a CPU; its own backward pass would scatter and add."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return y.gather(-1, order.long().expand_as(y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.gather(-1, ctx.order.argsort().expand_as(grad)), None


def factorize_modules(
    model: nn.Module, ranks: dict[str, int], storage: Storage = "factors", integers: IntegerForms | None = None
) -> None:
    """Replaces each named linear by an untrained one as it is stored, in place: factors, integers or both."""
    forms = integers or IntegerForms()
    for name in {**ranks, **forms.bits}:
        parent_name, _, child = name.rpartition(".")
        layer = _compressed(model.get_submodule(name), name, ranks.get(name), storage, forms)
        setattr(model.get_submodule(parent_name), child, layer)


def _compressed(dense: Any, name: str, rank: int | None, storage: Storage, forms: IntegerForms) -> nn.Module:
    out_features, in_features = _shape(dense)
    bias, bits, size = getattr(dense, "bias", None) is not None, forms.bits.get(name), forms.group_size
    if rank is not None:
        kind = PivotedLinear if storage == "pivoted" and bits is None else FactorizedLinear
        factored = kind(in_features, out_features, rank, bias)
        if bits is not None:
            factored.store_in(bits, size)
        return factored
    assert bits is not None
    if name in forms.residual_ranks:
        return ResidualLinear(in_features, out_features, forms.residual_ranks[name], bits, size, bias)
    return IntegerLinear(in_features, out_features, bits, size, bias)


def _shape(linear: Any) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    return linear.nf, linear.nx  # Conv1D; not its weight's shape, which ZeRO-3 empties


def emulator_class(base: type[PreTrainedModel], config: EmulatorModelConfig) -> type[PreTrainedModel]:
    """The original's model class, its experts unfused, with factors or integers in place of the linears that ``config`` names.
    Being that class, it loads by its own ``from_pretrained``: dtype, device map and 4-bit options all apply."""

    class Emulator(base):  # type: ignore[valid-type, misc]
        def __init__(self, base_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(base_config, *args, **kwargs)
            factorize_modules(unfuse(self), config.ranks, config.storage, config.forms())

        @torch.no_grad()
        def initialize_weights(self) -> None:
            """Also lets each inner model set buffers of its blocks that no file holds, such as Falcon-H1's multipliers:
            transformers skips one without tensors of its own where the outer class is not defined in transformers."""
            super().initialize_weights()
            for module in self.modules():
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                if isinstance(module, PreTrainedModel) and module is not self and not own:
                    module._init_weights(module)  # noqa: SLF001  the method that transformers means models to override

        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            """Saves as an emulator: under the original's type it would load as dense layers with random weights."""
            # Under the names in memory: those on disk may have no place for factors, or for experts apart.
            super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
            write_emulator_config(Path(save_directory), self.config, config.ranks, None, config.storage, config.forms())

        def __reduce__(self) -> tuple[Any, ...]:
            return _without_state, (base, config), self.__dict__

    Emulator.__name__ = Emulator.__qualname__ = base.__name__
    return Emulator


def _without_state(base: type[PreTrainedModel], config: EmulatorModelConfig) -> PreTrainedModel:
    """What a pickled or copied emulator is put back into: pickle finds no class that is made in a function."""
    emulator = emulator_class(base, config)
    return emulator.__new__(emulator)


def write_emulator_config(
    directory: Path,
    base_config: Any,
    ranks: dict[str, int],
    quantization_config: dict[str, Any] | None = None,
    storage: Storage = "factors",
    integers: IntegerForms | None = None,
) -> None:
    """Writes ``config.json`` of an emulator of the model that ``base_config`` (a transformers config) describes.
    ``quantization_config`` says what of it is stored in NF4, as transformers reads it, ``integers`` what in integers."""
    from emloc_ray.io.store.atomic import write_json

    base = base_config.to_dict()
    base.pop("_name_or_path", None)
    base["architectures"] = base_config.architectures
    if quantization_config is not None:
        base["quantization_config"] = quantization_config
    forms = None if integers is None or not integers.bits else dataclasses.asdict(integers)
    config = EmulatorModelConfig(base, ranks, storage, forms, architectures=base_config.architectures)
    config.dtype = base_config.dtype
    # to_diff_dict would drop what equals a default of the nested config's class; the whole dict is kept.
    values = {
        **json.loads(config.to_json_string(use_diff=True)),
        "base_config": json.loads(json.dumps(base, default=str)),
    }
    write_json(directory / "config.json", values)
