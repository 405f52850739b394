"""Fused experts as linears, so that everything that works on linears works on experts.

transformers keeps a layer's experts in 3-D parameters, ``gate_up_proj (E, 2I, H)`` and ``down_proj (E, H, I)``, which no
hook, factor or adapter can tell apart. :func:`unfuse` puts a module of the same function in their place that holds two
linears an expert, views of those parameters: ``experts.3.gate_up`` and ``experts.3.down``. The names differ from those on
disk (``experts.3.down_proj``), which transformers would stack again.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emloc_ray.modeling.grouped_experts import GroupedRows, grouped

# A linear's name and its fused parameter's, in the order in which modules register them.
PARTS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}


class UnfusedExperts(nn.Module):
    """``Σ_e w_e · down_e(act(gate_up_e(x)))`` over the experts that the router chose for a token, as transformers' own
    experts compute it (``transformers.integrations.moe``); expert e's linears are ``e.gate_up`` (``e.up`` where there is
    no gate) and ``e.down``.

    On a GPU with a kernel for it experts that are alike run together (:mod:`emloc_ray.modeling.grouped_experts`), unless
    :attr:`together` is false or :attr:`reread` is not empty; elsewhere, and where a hook reads one, one after another.

    While an expert runs alone, :attr:`rows` says which tokens its linears read, on the CPU; None: all. The experts in
    :attr:`reread` also run on all tokens after that, :attr:`rereading` meanwhile, which leaves the output as it is.
    """

    def __init__(self, fused: Any, top_k: int | None = None) -> None:
        """Takes the parameters out of ``fused``, a module that :func:`is_fused`; ``top_k`` experts run on a token."""
        super().__init__()
        self.num_experts: int = fused.num_experts
        self.routed_share = (top_k or self.num_experts) / self.num_experts
        self.has_bias: bool = fused.has_bias
        self.is_transposed: bool = fused.is_transposed
        self.parts = tuple(part for part, name in PARTS.items() if name in fused._parameters)
        self.rows: Tensor | None = None
        self.reread: frozenset[int] = frozenset()
        self.rereading = False
        self.together = True
        self.act_fn: Any = getattr(fused, "act_fn", None)  # a gate may have its own
        self.post_expert_norm: Any = getattr(fused, "post_expert_norm", None)
        for index in range(self.num_experts):
            expert = nn.Module()
            for part in self.parts:
                expert.add_module(part, _linear(fused, PARTS[part], index))
            self.add_module(str(index), expert)
        for part in self.parts:
            for name in (PARTS[part], f"{PARTS[part]}_bias"):
                fused._parameters.pop(name, None)
        # Not a submodule: it has the gate's formula, and nothing else that is not here.
        object.__setattr__(self, "_fused", fused)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states (N, H)``; each token's experts and their weights, both ``(N, k)``."""
        linears = [[self._linear(index, part) for index in range(self.num_experts)] for part in self.parts]
        products = grouped(linears, hidden_states) if self.together and not self.reread else None
        if products is not None:
            return self.run_together(products, hidden_states, top_k_index, top_k_weights)
        output = torch.zeros_like(hidden_states)
        self.rereading = False  # a pass that ran out of memory left it true
        for index, tokens, places, here in self._chosen(top_k_index):
            self.rows = here
            weighed = self._run(index, hidden_states[tokens]) * top_k_weights[tokens, places, None]
            output = _AddRows.apply(output, tokens, weighed.to(output.dtype))
        self.rows, self.rereading = None, True
        for index in sorted(self.reread):
            self._run(index, hidden_states)
        self.rereading = False
        return output

    def run_together(
        self,
        parts: Sequence[Callable[..., Tensor]],
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """As :meth:`forward`, by ``parts``: each is the same linear of all experts, of sorted rows and :class:`GroupedRows`."""
        rows = GroupedRows(top_k_index, self.num_experts)
        first, last = (functools.partial(part, rows=rows) for part in parts)
        done = self._compute(first, last, hidden_states[rows.tokens])
        return rows.sum_by_token(done, top_k_weights).to(hidden_states.dtype)

    def _chosen(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each expert that is chosen, the tokens that chose it, at which of their k places, and the tokens on the CPU: a GPU is
        waited for once a layer.

        Where there are no values, every expert is chosen once by all. In training those that nobody chose run on no token:
        their adapters then have a gradient, zero, which processes that train together wait for.
        """
        num_tokens = len(top_k_index)
        if top_k_index.is_meta:
            tokens = torch.arange(num_tokens, device="meta")
            yield from ((index, tokens, torch.zeros_like(tokens), tokens) for index in range(self.num_experts))
            return
        choices, order = torch.sort(top_k_index.T.reshape(-1), stable=True)
        numbers = torch.arange(self.num_experts, device=choices.device, dtype=choices.dtype)
        here = torch.cat([order, torch.searchsorted(choices, numbers, right=True)]).cpu()
        for index, (start, end) in enumerate(itertools.pairwise([0, *here[len(order) :].tolist()])):
            if end > start or self.training:
                chosen = order[start:end]
                yield index, chosen % num_tokens, chosen // num_tokens, here[start:end] % num_tokens

    def _linear(self, index: int, part: str) -> Any:
        expert: Any = self._modules[str(index)]
        return expert._modules[part]

    def _run(self, index: int, x: Tensor) -> Tensor:
        first, last = (self._linear(index, part) for part in self.parts)
        return self._compute(first, last, x)

    def _compute(self, first: Callable[..., Tensor], last: Callable[..., Tensor], x: Tensor) -> Tensor:
        """What is between an expert's inputs and its outputs, by its two linears."""
        fused: Any = self._fused
        output = last(fused._apply_gate(first(x)) if fused.has_gate else self.act_fn(first(x)))
        return output if self.post_expert_norm is None else self.post_expert_norm(output)


class _AddRows(torch.autograd.Function):
    """``output.index_add_(0, places, rows)``, which itself would keep the rows for the backward pass: that needs their places
    alone."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(places)
        return output.index_add_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        [gradient], [places] = gradients, ctx.saved_tensors
        return gradient, None, gradient.index_select(0, places)


_TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts")


def is_fused(module: nn.Module) -> bool:
    """Whether transformers' own kernels could take the experts of a module for theirs: then its function is known here."""
    known = {"has_gate", "has_bias", "is_transposed", "num_experts"} <= vars(module).keys()
    held = [name for name in module._parameters if name in PARTS.values()]
    named = held == (["gate_up_proj", "down_proj"] if getattr(module, "has_gate", True) else ["up_proj", "down_proj"])
    return known and named and not getattr(module, "_is_expert_parallel", False)


def unfuse(model: Any) -> Any:
    """Puts linears in place of all fused experts of a model, in place; returns it."""
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, child = name.rpartition(".")
            unfused = UnfusedExperts(module, _top_k(model, name)).train(module.training)
            setattr(model.get_submodule(parent), child, unfused)
    return model


def experts_of(model: nn.Module) -> dict[str, UnfusedExperts]:
    """A model's unfused experts by their modules' names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnfusedExperts)}


def owner_of(name: str) -> tuple[str, int, str] | None:
    """The module, the number and the part that the name of an expert's linear is made of; None where it is no such name."""
    head, _, part = name.rpartition(".")
    module, _, index = head.rpartition(".")
    return (module, int(index), part) if module and index.isdecimal() and part in PARTS else None


@dataclass(frozen=True)
class View:
    """What a parameter of an unfused model is: slice ``index`` of a fused parameter, transposed or not."""

    parameter: str
    index: int
    is_transposed: bool


def unfused_views(model: nn.Module) -> dict[str, View]:
    """Maps each parameter of a model's unfused experts to the view of a fused parameter that it is, by name."""
    views = {}
    for module, experts in experts_of(model).items():
        for index in range(experts.num_experts):
            for part in experts.parts:
                name, parameter = f"{module}.{index}.{part}", f"{module}.{PARTS[part]}"
                views[f"{name}.weight"] = View(parameter, index, experts.is_transposed)
                if experts.has_bias:
                    views[f"{name}.bias"] = View(f"{parameter}_bias", index, False)
    return views


def _top_k(model: nn.Module, experts: str) -> int | None:
    """How many experts a token is sent to, as the router beside them says, or its config."""
    beside = model.get_submodule(experts.rpartition(".")[0])
    owners: list[Any] = [beside, *beside.children()]
    owners += [owner.config for owner in owners if hasattr(owner, "config")]
    candidates = (getattr(owner, key, None) for owner in owners for key in _TOP_K)
    return next((k for k in candidates if isinstance(k, int)), None)


def _linear(fused: Any, name: str, index: int) -> nn.Linear:
    """Expert ``index``'s slice as a linear. Where DeepSpeed has scattered the parameter it is made anew, to be loaded."""
    parameter, bias = fused._parameters[name], fused._parameters.get(f"{name}_bias")
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    in_features, out_features = shape[1:] if fused.is_transposed else shape[:0:-1]
    if hasattr(parameter, "ds_shape"):
        return nn.Linear(in_features, out_features, bias is not None, dtype=parameter.dtype)
    linear = nn.Linear(in_features, out_features, bias is not None, device="meta")
    weight = parameter.detach()[index]
    linear.weight = nn.Parameter(weight.T if fused.is_transposed else weight, parameter.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[index], bias.requires_grad)
    return linear
