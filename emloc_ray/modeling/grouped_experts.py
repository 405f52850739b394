"""A layer's experts by grouped products: one kernel a linear for all of them, and a host that need not know how many tokens
each was sent.

For a GPU that torch has this kernel for (:func:`has_kernel`), whose host waits for that number, and starts a kernel for each
expert, where experts run one after another. Taken where the experts of a layer are alike: dense, in factors of one rank, either
with a LoRA, and read by no hook. As ``transformers.integrations.moe`` does it for experts that are dense and nothing else.

Where they are not alike the host waits once a layer, as the router chooses from what the layer before gave, and shapes follow
from it; it then starts kernels for each expert, which takes it longer than the wait. What would not wait, and why it is not here:

- Grams and sums of gradients by a grouped product over each expert's rows: torch 2.13 gives the dtype of the rows alone
  (``out_dtype=torch.float32`` is refused), and these sums are in float32 or wider. Rows padded to blocks of one expert, a product
  a block, would do; the counts and places that hooks take from the CPU would have to be on the device too.
- Factors of unlike ranks: no product of torch's has groups of rows and of ranks both. Zeros up to the highest rank take
  memory that the emulator is there to save; a grouped product a rank takes a copy of all rows each, kept for the backward pass.
- Adapters on some experts, or of unlike ranks: zeros would do, as adapters are small. The same ranks for all are what is trained.
- Weights in few bits: a grouped product reads dense ones. Those of all experts at once take the memory that few bits save.
- Weights that come and go: the next block's are fetched by the host.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS_ON = {"cuda"}  # kinds of devices
KERNEL_MAJORS = {9, 10}  # of NVIDIA's compute capabilities: those that torch's CUDA kernel is for, in bfloat16
_ALIGNED = 8  # features: rows of 16 bytes, which the kernels ask for


class GroupedRows:
    """Which rows go to which expert: those of ``chosen (N, k)``, ``N·k`` rows sorted by expert.

    Attributes:
        tokens: the token that each sorted row is of ``(N·k,)``.
        experts: its expert, ascending ``(N·k,)``.
        ends: where each expert's rows end ``(num_experts,)``, int32.
    """

    def __init__(self, chosen: Tensor, num_experts: int) -> None:
        self.k = chosen.shape[-1]
        self.experts, self._order = torch.sort(chosen.reshape(-1), stable=True)
        self.tokens = self._order // self.k
        numbers = torch.arange(num_experts, device=chosen.device, dtype=self.experts.dtype)
        self.ends = torch.searchsorted(self.experts, numbers, right=True).int()

    def sum_by_token(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``Σ w · row`` over each token's k rows ``(N, H)``; ``weights (N, k)``."""
        weighed = rows * weights.reshape(-1)[self._order].unsqueeze(1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(back), device=back.device)
        return weighed[back].unflatten(0, (-1, self.k)).sum(dim=1)


def has_kernel(device: torch.device) -> bool:
    """Whether a grouped product of bfloat16 is one kernel on a CUDA device: elsewhere torch waits for the ends, once a product,
    and takes a product an expert."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in KERNEL_MAJORS


class Product(Protocol):
    """The same linear of all experts, of sorted rows: ``(N·k, in)`` to ``(N·k, out)``, each by its expert's."""

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What it multiplies in."""

    def __call__(self, x: Tensor, rows: GroupedRows) -> Tensor:
        """All experts' outputs."""


def grouped(parts: Sequence[Sequence[nn.Module]], hidden: Tensor) -> list[Product] | None:
    """Each of ``parts``, the same linear of all experts, as one product, by one kernel, on the device of ``hidden``; None where
    one of them cannot be: on CUDA only where it :func:`has_kernel`, and all that is multiplied is bfloat16.

    Looked at again at each pass, for hooks and adapters come and go. A model of 48 layers of 128 experts has so many modules
    that a GPU would wait for the look: it takes an attribute of all experts at a time, past ``nn.Module.__getattr__``.
    """
    kind = hidden.device.type
    if kind not in KERNELS_ON or (kind == "cuda" and not has_kernel(hidden.device)):
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    products: list[Product] = []
    for modules in parts:
        product = _alike(modules, dtype)
        if product is None or (kind == "cuda" and product.dtypes != {torch.bfloat16}):
            return None
        products.append(product)
    return products


@dataclass(frozen=True)
class _Dense:
    linears: Sequence[nn.Linear]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor] | None
    dtype: torch.dtype

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {self.dtype}

    def __call__(self, x: Tensor, rows: GroupedRows) -> Tensor:
        y = _product(x, _side_by_side(self.linears, self.weights), rows)
        return y if self.biases is None else y + torch.stack([*self.biases])[rows.experts].to(y.dtype)


@dataclass(frozen=True)
class _Sequence:
    parts: Sequence[Product]

    @property
    def dtypes(self) -> set[torch.dtype]:
        return set().union(*(part.dtypes for part in self.parts))

    def __call__(self, x: Tensor, rows: GroupedRows) -> Tensor:
        for part in self.parts:
            x = part(x, rows)
        return x


@dataclass(frozen=True)
class _Lora:
    """PEFT's own formula (``peft.tuners.lora.layer.Linear``)."""

    base: Product
    a: _Dense
    b: _Dense
    dropout: nn.Module
    scaling: float

    @property
    def dtypes(self) -> set[torch.dtype]:
        return self.base.dtypes | self.a.dtypes | self.b.dtypes

    def __call__(self, x: Tensor, rows: GroupedRows) -> Tensor:
        result = self.base(x, rows)
        read = self.dropout(x.to(self.a.weights[0].dtype))
        added = self.b(self.a(read, rows), rows) * self.scaling
        return (result + added).to(result.dtype)


def _alike(modules: Sequence[Any], dtype: torch.dtype | None) -> Product | None:
    """All experts' linear as one; None where they differ, are hooked, or have no grouped product. ``dtype``: what autocast
    computes in, where it is on."""
    own = [module.__dict__ for module in modules]
    kinds = {*map(type, modules)}
    if len(kinds) != 1 or any(of["_forward_hooks"] or of["_forward_pre_hooks"] for of in own):
        return None
    [kind] = kinds
    if kind is nn.Linear:
        return _dense(modules, own, dtype)
    if _is_lora(kind):
        return _lora(modules, dtype)
    parts = [_alike(_children(modules, name), dtype) for name in getattr(kind, "in_sequence", ())]
    known = [part for part in parts if part is not None]
    return _Sequence(known) if known and len(known) == len(parts) else None


def _children(modules: Sequence[nn.Module], *names: str) -> list[Any]:
    """The submodule of each that these names lead to."""
    for name in names:
        modules = [module.__dict__["_modules"][name] for module in modules]
    return [*modules]


def _dense(linears: Sequence[nn.Linear], own: Sequence[dict[str, Any]], dtype: torch.dtype | None) -> _Dense | None:
    weights = [of["_parameters"]["weight"] for of in own]
    biases = [of["_parameters"]["bias"] for of in own]
    kinds = {
        (of["in_features"], of["out_features"], dtype or weight.dtype, weight.requires_grad, bias is None)
        for of, weight, bias in zip(own, weights, biases, strict=True)
    }
    if len(kinds) != 1:
        return None
    [(in_features, out_features, computed_in, _, has_none)] = kinds
    if in_features % _ALIGNED or out_features % _ALIGNED:
        return None
    return _Dense(linears, weights, None if has_none else biases, computed_in)


def _is_lora(kind: type) -> bool:
    """Whether it is PEFT's, which takes seconds to import: what reads a model's shapes alone does without it."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and issubclass(kind, layers.Linear)


def _lora(modules: Sequence[Any], dtype: torch.dtype | None) -> Product | None:
    states = {(m.disable_adapters or m.merged, *m.active_adapters) for m in modules}
    base = _alike(_children(modules, "base_layer"), dtype)
    if len(states) != 1 or base is None:
        return None
    [(is_bare, *names)] = states
    if is_bare:
        return base
    name = str(names[0]) if len(names) == 1 else ""
    if any(name not in m.scaling or name in m.lora_variant for m in modules):
        return None
    dropouts = _children(modules, "lora_dropout", name)
    if len({(m.scaling[name], type(d), d.__dict__.get("p")) for m, d in zip(modules, dropouts, strict=True)}) != 1:
        return None
    a, b = (_alike(_children(modules, part, name), dtype) for part in ("lora_A", "lora_B"))
    if not isinstance(a, _Dense) or not isinstance(b, _Dense):
        return None
    return _Lora(base, a, b, dropouts[0], modules[0].scaling[name])


def _product(x: Tensor, weights: Tensor, rows: GroupedRows) -> Tensor:
    """``x Wᵀ`` by groups of rows, ``weights (E, out, in)``; autocast does not know the kernel."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights.dtype
    return F.grouped_mm(x.to(dtype), weights.to(dtype).transpose(-2, -1), offs=rows.ends)


def _side_by_side(linears: Sequence[nn.Linear], weights: Sequence[Tensor]) -> Tensor:
    """The weights ``(E, out, in)``: of frozen ones no copy, but for the first time, when they are laid side by side."""
    if weights[0].requires_grad:
        return torch.stack([*weights])
    first, step = weights[0], weights[0].numel()
    places = [weight.storage_offset() - first.storage_offset() for weight in weights]
    together = len({weight.untyped_storage()._cdata for weight in weights}) == 1
    if together and places == [number * step for number in range(len(weights))]:
        return first.detach().as_strided((len(weights), *first.shape), (step, *first.stride()))
    stacked = torch.stack([weight.detach() for weight in weights])
    for linear, weight in zip(linears, stacked, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return stacked
