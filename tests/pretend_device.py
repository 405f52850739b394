"""A GPU that is none: the device ``pretend``, whose tensors lie in the CPU's memory.

An operation of tensors of both devices raises, as on CUDA. ``METER`` counts how often the host waits for a value and how
many bytes are held. Autograd sees a device of its own; attention takes its plain path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
_aten = torch.ops.aten

# What makes the host wait on CUDA: a value is read, or decides a shape.
_WAITS = {
    _aten._local_scalar_dense,
    _aten._linalg_check_errors,
    _aten._linalg_eigh,
    _aten._linalg_svd,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten.bincount,
    _aten.histc,
}
_COPIES = {_aten.copy_, _aten._to_copy}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_NO_FACTORIES = ("sparse", "quantized", "nested", "cudnn", "mkldnn", "from_file", "_make_dep_token")


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of the CPU and of the pretend device."""


@dataclass
class Meter:
    """What the device has been asked since :meth:`restart`; ``waits`` by operation, bytes of all that is held."""

    waits: Counter[str] = field(default_factory=Counter)
    current: int = 0
    peak: int = 0
    largest: int = 0  # of one tensor's memory
    held: Counter[int] = field(default_factory=Counter)  # tensors by the address of their memory

    def restart(self) -> None:
        """Forgets waits and sizes, and takes what is held now for the peak."""
        self.waits.clear()
        self.peak, self.largest = self.current, 0

    def hold(self, address: int, size: int) -> None:
        """A tensor of that memory is made."""
        self.held[address] += 1
        if self.held[address] == 1:
            self.current += size
            self.peak, self.largest = max(self.peak, self.current), max(self.largest, size)

    def release(self, address: int, size: int) -> None:
        """One of them is gone."""
        self.held[address] -= 1
        if self.held[address] == 0:
            del self.held[address]
            self.current -= size


METER = Meter()


class _Hold:
    """Counts a tensor's memory for as long as it lives, once for all its views."""

    def __init__(self, inner: Tensor) -> None:
        self.storage = (
            inner.untyped_storage()
        )  # held, so that no other one is given its address before it is counted out
        self.address, self.size = self.storage.data_ptr(), self.storage.nbytes()
        self.meter = METER  # a name of the module's is gone when the interpreter ends
        METER.hold(self.address, self.size)

    def __del__(self) -> None:
        self.meter.release(self.address, self.size)


class PretendTensor(Tensor):
    """A tensor of the device; ``inner`` is what it holds, on the CPU."""

    inner: Tensor  # type: ignore[assignment]  # torch has a method of that name
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner, made._hold = inner, _Hold(inner)  # type: ignore[attr-defined]
        return made

    def tolist(self) -> Any:
        """torch refuses it of subclasses."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretend({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what its tensors hold; what comes out is on the device that CUDA's would be on."""
    packet, kwargs = func.overloadpacket, dict(kwargs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = kwargs.get("device")
    on_cpu = target is not None and torch.device(target).type != NAME
    if packet in _COPIES:
        on_cpu = on_cpu or (packet is _aten.copy_ and not isinstance(args[0], PretendTensor))
    else:
        _refuse_mixed(func, packet, args, given)
    to_meta = target is not None and torch.device(target).type == "meta"
    copies = packet in _COPIES and ((on_cpu and not to_meta) or _waiting_copy(packet, args, kwargs))
    if packet in _WAITS or _waiting_index(packet, args) or copies:
        METER.waits[packet.__name__] += 1
    if target is not None and not on_cpu:
        kwargs["device"] = "cpu"
    wrappers = {id(leaf.inner): leaf for leaf in given if isinstance(leaf, PretendTensor)}
    args, kwargs = tree_map_only(PretendTensor, lambda wrapper: wrapper.inner, (args, kwargs))
    made = func(*args, **kwargs)
    if on_cpu:
        return made
    return tree_map_only(
        Tensor, lambda inner: wrappers[id(inner)] if id(inner) in wrappers else PretendTensor(inner), made
    )


def _waiting_copy(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether it takes a CPU's memory to the device and the host waits until that is done, as with factories from lists."""
    source, place = (args[1], 2) if packet is _aten.copy_ else (args[0], len(args))
    non_blocking = kwargs.get("non_blocking", args[place] if len(args) > place else False)
    return source.numel() > 0 and not isinstance(source, PretendTensor) and not non_blocking


def _waiting_index(packet: Any, args: Any) -> bool:
    """Whether the shape depends on a mask, or the indices come from the CPU first."""
    return packet in _INDEXED and any(
        index is not None and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, PretendTensor))
        for index in args[1]
    )


def _refuse_mixed(func: Any, packet: Any, args: Any, given: list[Tensor]) -> None:
    """Numbers may lie on the CPU, and indices, as CUDA has it."""
    allowed = {id(index) for index in args[1]} if packet in _INDEXED else set()
    others = [leaf for leaf in given if not isinstance(leaf, PretendTensor) and leaf.ndim and id(leaf) not in allowed]
    if others and len(others) < len(given):
        shapes = ", ".join(f"{tuple(leaf.shape)} on {leaf.device}" for leaf in given)
        raise MixedDevicesError(f"{func} was given tensors of two devices: {shapes}.")


class _Module(_DummyBackendModule):
    """``torch.pretend``: what checkpointing and seeding ask a device for."""

    def is_available(self) -> bool:
        """As :class:`_Hook` has it: accelerate 1.16 empties the cache of the device that torch names."""
        return False

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        METER.waits["synchronize"] += 1


class _Hook(_DummyPrivateUse1Hook):
    """Tests that come after in this process must not take it for the machine's accelerator."""

    def is_available(self) -> bool:
        return False


_registered: list[torch.library.Library] = []  # kernels live as long as their library


def pretend_device() -> torch.device:
    """The device, registered at the first call."""
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
        library = torch.library.Library("aten", "IMPL")
        for name in torch._C._dispatch_get_all_op_names():
            kind, _, overload = name.removeprefix("aten::").partition(".")
            if name.startswith("aten::") and not any(part in kind for part in _NO_FACTORIES):
                operation = getattr(getattr(_aten, kind, None), overload or "default", None)
                if operation is not None and _is_factory(operation._schema):
                    library.impl(name, _made_by(operation), "PrivateUse1")
        library.impl(
            "_copy_from",
            lambda source, into, *rest: _run(_aten.copy_.default, (into, source, *rest), {}),
            "PrivateUse1",
        )
        # In one step, as CUDA has it: without a kernel of the device's torch makes it of six.
        library.impl("silu_backward", _made_by(_aten.silu_backward.default), "PrivateUse1")
        _registered.append(library)
    return torch.device(NAME, 0)


def _is_factory(schema: Any) -> bool:
    names = {argument.name for argument in schema.arguments}
    takes = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return "device" in names and not takes and [str(made.type) for made in schema.returns] == ["Tensor"]


def _made_by(operation: Any) -> Any:
    return lambda *args, **kwargs: _run(operation, args, {k: v for k, v in kwargs.items() if k != "pin_memory"})


def moved(module: Any) -> Any:
    """The module with its weights and buffers on the device, those that are shared still shared."""
    device, done = pretend_device(), {}
    for owner in module.modules():
        for kind in (owner._parameters, owner._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    new = tensor.detach().to(device)
                    is_weight = isinstance(tensor, nn.Parameter)
                    done[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new, tensor
                kind[name] = done[id(tensor)][0]
    return module
