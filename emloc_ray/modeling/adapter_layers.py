"""PEFT's adapters on factorized layers, all methods in one way.

PEFT takes a module of the model's own for an adapter's base only where it is an ``nn.Linear``. So while PEFT builds (or loads)
its layers, a linear of the same shape, whose weight takes no memory, stands in for each factorized layer, and for those in 4
bits where LoHa, LoKr and LoRA's orthogonal beginning go by the weight; afterwards that is put back as the base of its adapter
layer. Adapter layers compute with ``base_layer(x)`` alone, but for what the classes below replace: where PEFT's formula reads
the base's dense weight, or makes another as large. Their class is changed on the spot, as torch's own ``parametrize`` and
``fully_shard`` do.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.loha.layer import make_weight
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from emloc_ray.core.precision import without_autocast
from emloc_ray.core.products import paired_columns, row_norms
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.integer_linear import IntegerLinear

_COLUMNS = 256  # of W_E, seen at a time
_COMPRESSED = (FactorizedLinear, IntegerLinear)


class _StandIn(nn.Linear):
    """The shape, device and dtype of a layer, and none of its weight: one zero, seen ``(out, in)`` times."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        zero = torch.zeros((), dtype=_dtype(layer), device=layer.weight.device)
        self.weight = nn.Parameter(zero.expand(layer.out_features, layer.in_features), requires_grad=False)
        self.__dict__["layer"] = layer  # not a submodule: PEFT must not find the factors


def _dtype(layer: Any) -> torch.dtype:
    return getattr(layer, "compute_dtype", None) or layer.weight.dtype


@contextlib.contextmanager
def attachable(model: nn.Module, config: PeftConfig) -> Iterator[None]:
    """While it lasts PEFT may attach that adapter to layers of the model that have no dense weight, or load it onto them. The
    layers that it makes take the classes below."""
    by_weight = getattr(config, "init_lora_weights", True) == "orthogonal"
    packed_too = by_weight or config.peft_type in (PeftType.LOHA, PeftType.LOKR)
    _replace(model, lambda layer: isinstance(layer, _COMPRESSED) or (packed_too and _in_4_bits(layer)), _StandIn)
    try:
        with warnings.catch_warnings():
            # A Conv1D's factors are a plain linear: PEFT sets the flag layer by layer, which is what is wanted.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            yield
    finally:
        _replace(model, lambda layer: isinstance(layer, _StandIn), lambda stand_in: stand_in.layer)


def _replace(model: nn.Module, which: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> None:
    for module in [module for module in model.modules() if not isinstance(module, _COMPRESSED)]:
        for name, child in list(module.named_children()):
            if which(child):
                module._modules[name] = make(child)
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module):
            continue
        module.__class__ = THIN.get(type(module), type(module))
        if isinstance(base, _COMPRESSED) or _in_4_bits(base):
            base.requires_grad_(False)
            module.__dict__["merge"] = _refuse_merge
            for layer in module.modules():
                if type(layer) is DoraLinearLayer:
                    layer.__class__ = FactorizedDora


def _in_4_bits(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state")


def _refuse_merge(safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """An adapter trained on an emulator is merged into the original (``emloc-ray merge``)."""
    raise TypeError("An emulator's layer cannot take a merge: merge the corrected adapter into the original model.")


class ThinLoHaLinear(LoHaLinear):
    """LoHa around any linear; where r² is small by its thin form, so that no dense ``ΔW`` is made. PEFT's own makes one for
    every layer and keeps it for the backward pass: as much as the weights, in float32. So does this where r² is large."""

    def _get_delta_activations(  # type: ignore[override]  # PEFT's own names the input in two ways
        self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        w1_a, w1_b = self.hada_w1_a[adapter_name], self.hada_w1_b[adapter_name]
        w2_a, w2_b = self.hada_w2_a[adapter_name], self.hada_w2_b[adapter_name]
        x = self._cast_input_dtype(x, w1_a.dtype)
        (out_features, r), in_features = w1_a.shape, w1_b.shape[1]
        if r * r * (in_features + out_features) < in_features * out_features:
            y = F.linear(F.linear(x, paired_columns(w1_b.T, w2_b.T).T), paired_columns(w1_a, w2_a))
        else:
            y = F.linear(x, make_weight(w1_a, w1_b, w2_a, w2_b, torch.ones((), device=x.device)))
        return _dropped_rows(self, adapter_name, y * self.scaling[adapter_name], rescaled=True)


class ThinLoKrLinear(LoKrLinear):
    """LoKr around any linear: ``(W1 ⊗ W2) x`` is ``W1 X W2ᵀ`` with x as a matrix, so no ``ΔW`` is made."""

    def _get_delta_activations(  # type: ignore[override]  # PEFT's own names the input in two ways
        self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        w1, w2 = self._factor("lokr_w1", adapter_name), self._factor("lokr_w2", adapter_name)
        x = self._cast_input_dtype(x, w1.dtype)
        y = w1 @ (x.unflatten(-1, (w1.shape[1], w2.shape[1])) @ w2.T)
        scaled = y.flatten(-2) * self.scaling[adapter_name]
        return _dropped_rows(self, adapter_name, scaled, rescaled=self.rank_dropout_scale[adapter_name])

    def _factor(self, name: str, adapter_name: str) -> Tensor:
        whole: Any = getattr(self, name)
        if adapter_name in whole:
            return whole[adapter_name]
        return getattr(self, f"{name}_a")[adapter_name] @ getattr(self, f"{name}_b")[adapter_name]


def _dropped_rows(layer: Any, adapter_name: str, y: Tensor, *, rescaled: bool) -> Tensor:
    """PEFT's rank dropout, which leaves out rows of ``ΔW``: the same outputs."""
    share = layer.rank_dropout[adapter_name]
    if not layer.training or not share:
        return y
    drop = (torch.rand(y.shape[-1], device=y.device) > share).to(y)
    return y * (drop / drop.mean() if rescaled else drop)


class FactorizedDora(DoraLinearLayer):
    """DoRA's magnitude over factors: ``m / ‖W_E + s B A‖`` by rows, the norms from thin products alone. As in PEFT the norms
    take no gradient (DoRA, https://arxiv.org/abs/2402.09353, section 4.3)."""

    def forward(  # type: ignore[no-untyped-def]
        self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"
    ) -> Tensor:
        """What is added to the base's output: ``(g − 1) (W_E x) + g s B A x`` with ``g = m / ‖W_E + s B A‖``."""
        gain = self.gain(base_layer, lora_A.weight, lora_B.weight, scaling)
        bias = _bias_holder(base_layer).bias
        if base_result is None:  # dropout: of what the adapter reads
            plain = _without_bias(base_layer, x)
        else:
            plain = base_result if bias is None else base_result - bias
        return (gain - 1) * plain + gain * scaling * lora_B(lora_A(x))

    def gain(self, base_layer: Any, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """``g (out,)``."""
        norms = self.norms(base_layer, lora_a, lora_b, scaling)
        return self.weight / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    @torch.no_grad()
    def norms(self, base_layer: Any, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """``‖W_E + s B A‖`` of every row ``(out,)`` in float32, by what the base gives alone, however its factors are stored:
        ``W_E Aᵀ`` at every step, and once, as they are frozen, ``W_E`` a few columns at a time."""
        a, b = lora_a.float(), lora_b.float()
        with without_autocast(a.device):
            squares = self.__dict__.get("_squares")
            if squares is None or squares.device != a.device:
                squares = self.__dict__["_squares"] = _squared_rows(base_layer, a.device)
            return row_norms(squares, _without_bias(base_layer, a).float().T, a, b, scaling)


class GainedDora(FactorizedDora):
    """DoRA whose weight is the gain itself, however long the base's rows are."""

    def gain(self, base_layer: Any, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        """``g (out,)``."""
        return self.weight


def _squared_rows(base_layer: Any, device: torch.device) -> Tensor:
    total = torch.zeros(base_layer.out_features, device=device)
    for begin in range(0, base_layer.in_features, _COLUMNS):
        at = torch.arange(begin, min(begin + _COLUMNS, base_layer.in_features), device=device)
        columns = torch.zeros(len(at), base_layer.in_features, device=device)
        columns[at - begin, at] = 1
        total += _without_bias(base_layer, columns).float().square().sum(dim=0)
    return total


def _without_bias(base_layer: Any, x: Tensor) -> Tensor:
    """``W_E x`` of a layer that never sees its bias: taken off again, a large one leaves nothing of it in 16 bits."""
    holder = _bias_holder(base_layer)
    bias, holder.bias = holder.bias, None
    try:
        y: Tensor = base_layer(x.to(_dtype(base_layer)))
    finally:
        holder.bias = bias
    return y


def _bias_holder(base_layer: Any) -> Any:
    return base_layer if hasattr(base_layer, "bias") else base_layer.up


THIN: dict[type, type] = {LoHaLinear: ThinLoHaLinear, LoKrLinear: ThinLoKrLinear}


def start_magnitudes(model: nn.Module) -> None:
    """Sets the magnitudes of fresh DoRA layers to the norms that they begin with, where PEFT saw no dense weight."""
    for _, dora, layer, parts in _factorized_doras(model):
        dora.weight.data.copy_(dora.norms(layer, *parts))


@torch.no_grad()
def keep_gains(model: nn.Module, trained: nn.Module) -> None:
    """Gives DoRA's rows on the original the gains that ``trained`` has on its emulator, as the correction does: its magnitudes
    alone would give them the lengths of the emulator's rows."""
    for name, dora, layer, parts in _factorized_doras(trained):
        other: Any = model.get_submodule(name)
        other.__class__ = GainedDora
        other.weight.copy_(dora.gain(layer, *parts))


def _factorized_doras(model: nn.Module) -> Iterator[tuple[str, FactorizedDora, Any, tuple[Tensor, Tensor, float]]]:
    """Each such layer of DoRA by its name, with its base and the A, B and scale of its update."""
    for name, layer in model.named_modules():
        for adapter, dora in layer.lora_magnitude_vector.items() if isinstance(layer, LoraLayer) else ():
            if isinstance(dora, FactorizedDora):
                parts = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
                yield f"{name}.lora_magnitude_vector.{adapter}", dora, layer.get_base_layer(), parts
