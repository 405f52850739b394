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
from collections.abc import Hashable, Sequence
from typing import Any

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


def groupable(parts: Sequence[Sequence[nn.Module]], hidden: Tensor) -> bool:
    """Whether each of ``parts``, the same linear of all experts, can be one product, by one kernel, on the device of
    ``hidden``: on CUDA where it :func:`has_kernel`, and all that is multiplied is bfloat16."""
    kind = hidden.device.type
    if kind not in KERNELS_ON or (kind == "cuda" and not has_kernel(hidden.device)):
        return False
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    for modules in parts:
        first = _kind(modules[0], dtype)
        if first is None or any(_kind(module, dtype) != first for module in modules[1:]):
            return False
        if kind == "cuda" and _dtypes(first) != {torch.bfloat16}:
            return False
    return True


def grouped_linear(modules: Sequence[Any], x: Tensor, rows: GroupedRows) -> Tensor:
    """``(N·k, in)`` to ``(N·k, out)``: each row by its expert's of the ``modules``, which are :func:`groupable`."""
    first = modules[0]
    if _is_lora(first):
        return _lora(modules, x, rows)
    if in_sequence := _in_sequence(first):
        for part in in_sequence:
            x = grouped_linear([m.get_submodule(part) for m in modules], x, rows)
        return x
    y = _product(x, _stack(modules), rows)
    return y if first.bias is None else y + torch.stack([m.bias for m in modules])[rows.experts].to(y.dtype)


def _is_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's, which takes seconds to import: what reads a model's shapes alone does without it."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and isinstance(module, layers.Linear)


def _lora(modules: Sequence[Any], x: Tensor, rows: GroupedRows) -> Tensor:
    """PEFT's own formula (``peft.tuners.lora.layer.Linear``)."""
    first = modules[0]
    result = grouped_linear([m.base_layer for m in modules], x, rows)
    if first.disable_adapters or first.merged:
        return result
    [name] = first.active_adapters
    a = torch.stack([m.lora_A[name].weight for m in modules])
    b = torch.stack([m.lora_B[name].weight for m in modules])
    read = first.lora_dropout[name](x.to(a.dtype))
    added = _product(_product(read, a, rows), b, rows) * first.scaling[name]
    return (result + added).to(result.dtype)


def _product(x: Tensor, weights: Tensor, rows: GroupedRows) -> Tensor:
    """``x Wᵀ`` by groups of rows, ``weights (E, out, in)``; autocast does not know the kernel."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights.dtype
    return F.grouped_mm(x.to(dtype), weights.to(dtype).transpose(-2, -1), offs=rows.ends)


def _stack(linears: Sequence[nn.Linear]) -> Tensor:
    """The weights ``(E, out, in)``: of frozen ones no copy, but for the first time, when they are laid side by side."""
    weights = [linear.weight for linear in linears]
    if any(weight.requires_grad for weight in weights):
        return torch.stack(weights)
    first, step = weights[0], weights[0].numel()
    places = [weight.storage_offset() - first.storage_offset() for weight in weights]
    together = len({weight.untyped_storage()._cdata for weight in weights}) == 1
    if together and places == [number * step for number in range(len(weights))]:
        return first.detach().as_strided((len(weights), *first.shape), (step, *first.stride()))
    stacked = torch.stack([weight.detach() for weight in weights])
    for linear, weight in zip(linears, stacked, strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return stacked


def _kind(module: Any, dtype: torch.dtype | None) -> Hashable:
    """What has to be equal of all experts' linears; None where there is no grouped product of such a one. ``dtype``: what
    autocast computes in, where it is on."""
    if vars(module)["_forward_hooks"] or vars(module)["_forward_pre_hooks"]:
        return None
    if type(module) is nn.Linear:
        fits = module.in_features % _ALIGNED == 0 == module.out_features % _ALIGNED
        shape = module.in_features, module.out_features
        trained = module.weight.requires_grad
        return ("dense", shape, dtype or module.weight.dtype, module.bias is None, trained) if fits else None
    if _is_lora(module):
        return _lora_kind(module, dtype)
    parts = tuple(module.get_submodule(part) for part in _in_sequence(module))
    return _of_parts("sequence", parts, dtype) if parts else None


def _in_sequence(module: nn.Module) -> tuple[str, ...]:
    """The linears that a compressed one is, one after another."""
    return getattr(module, "in_sequence", ())


def _lora_kind(module: Any, dtype: torch.dtype | None) -> Hashable:
    names = module.active_adapters
    if module.disable_adapters or module.merged:
        return _of_parts("bare", (module.base_layer,), dtype)
    if len(names) != 1 or names[0] not in module.lora_A or names[0] in module.lora_variant:
        return None
    [name] = names
    settings = name, module.scaling[name], str(module.lora_dropout[name])
    return _of_parts(settings, (module.base_layer, module.lora_A[name], module.lora_B[name]), dtype)


def _of_parts(what: Hashable, parts: Sequence[nn.Module], dtype: torch.dtype | None) -> Hashable:
    kinds = tuple(_kind(part, dtype) for part in parts)
    return None if None in kinds else (what, kinds)


def _dtypes(kind: Any) -> set[torch.dtype]:
    """The dtypes that a kind's products are in."""
    if isinstance(kind, torch.dtype):
        return {kind}
    return {dtype for part in kind for dtype in _dtypes(part)} if isinstance(kind, tuple) else set()
