"""A model that is made without weights, and its checkpoint's weights, read for it a part at a time."""

import copy
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from emloc_ray.errors import StageError
from emloc_ray.io.formats.checkpoint import Checkpoint, TensorEntry
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.architecture import auto_class, block_names, load_config
from emloc_ray.modeling.emulator import factorize_modules
from emloc_ray.modeling.experts import experts_of, unfuse
from emloc_ray.modeling.integer_linear import IntegerLinear
from emloc_ray.modeling.loading import dtype_on, own_device
from emloc_ray.modeling.stored_names import StoredParameter, may_be_missing, require, stored_parameters


class BlockWeights:
    """An original or an emulator whose parameters are on the meta device until they are asked for.

    A file of weights is mapped, not read: a tensor in the dtype that it is stored in takes no memory of its own on a CPU.
    ``model`` is in evaluation mode, frozen, its experts unfused, its buffers on ``device``; ``blocks`` are the names of its
    blocks.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        integers: bool = True,
    ) -> None:
        """Without ``integers`` those inside the blocks are on the meta device too, until :meth:`load_integers`. Raises StageError
        where the weights are in 4 bits, which are not read a part at a time."""
        from accelerate import init_empty_weights

        ensure(Path(directory))
        self.device = torch.device(device or own_device())
        self.checkpoint = Checkpoint(directory)
        config = load_config(directory, trust_remote_code=trust_remote_code)
        self.config = config.original() if hasattr(config, "original") else config
        if getattr(config, "quantization_config", None) or getattr(self.config, "quantization_config", None):
            raise StageError(f"{directory} is in 4 bits, which a worker has to hold whole: set model.hold to resident.")
        self.dtype = _dtype(dtype_on(self.device, dtype, self.config), self.config, self.checkpoint)
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with init_empty_weights(include_buffers=False):
            model = auto_class(self.config).from_config(
                self.config, dtype=self.dtype, trust_remote_code=trust_remote_code, **options
            )
            self.model: Any = unfuse(model)
            if self.config is not config:
                with torch.device("meta"):  # integers are buffers: made empty, they would be held from here on
                    factorize_modules(self.model, config.ranks, config.storage, config.forms())
        for experts in experts_of(self.model).values():
            experts.together = False  # their weights come and go, each by itself
        self.model.tie_weights()  # again: what is made empty is made anew, and tied to nothing
        self.model.eval().requires_grad_(False)
        self.blocks = block_names(self.model)
        shapes = {entry.name: entry.shape for entry in self.checkpoint}
        # An emulator is stored under the names that it has in memory.
        own = {name: StoredParameter(((name,),)) for name in shapes}
        self._stored = stored_parameters(self.model, shapes) if self.config is config else own
        self._files: dict[Path, Tensor] = {}
        self._untie()
        self._place_buffers(() if integers else {name for block in self.blocks for name in self._integers(block)})
        self.model.name_or_path = str(directory)
        if (Path(directory) / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(directory)

    def _untie(self) -> None:
        """As ``from_pretrained``: parameters that the config ties stay apart where the checkpoint has both, and they differ."""
        for name, source in self.model.get_expanded_tied_weights_keys(all_submodels=True).items():
            if {name, source} <= self._stored.keys() and not torch.equal(self.read([name]), self.read([source])):
                self.place(name, nn.Parameter(torch.empty_like(self.model.get_parameter(name)), False))

    def _place_buffers(self, away: Collection[str]) -> None:
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            if name not in away:
                stored = self._stored.get(name)
                self._place_buffer(name, (buffer if stored is None else stored.read(self.checkpoint)).to(self.device))

    def _place_buffer(self, name: str, buffer: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        self.model.get_submodule(owner)._buffers[attribute] = buffer

    def _integers(self, module: str) -> list[str]:
        """The integers of the linears in a module, with their scales, by the names of their buffers."""
        inside = self.model.get_submodule(module).named_modules(prefix=module)
        linears = [(name, linear) for name, linear in inside if isinstance(linear, IntegerLinear)]
        return [f"{name}.{key}" for name, linear in linears for key, _ in linear.named_buffers()]

    def load_integers(self, module: str) -> None:
        """Puts the integers of a module's linears on the device."""
        for name in self._integers(module):
            self._place_buffer(name, self._stored[name].read(self.checkpoint).to(self.device))

    def drop_integers(self, module: str) -> None:
        """Drops the integers of a module's linears."""
        for name in self._integers(module):
            self._place_buffer(name, self.model.get_buffer(name).to("meta"))

    def outside(self) -> list[list[str]]:
        """The parameters outside all blocks, each by all the names that it has."""
        inside = tuple(f"{name}." for name in self.blocks)
        aliases: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(inside):
                aliases.setdefault(id(parameter), []).append(name)
        return list(aliases.values())

    def read(self, names: Sequence[str]) -> Tensor:
        """A parameter, known by any of ``names`` in the checkpoint, in the dtype that the model has it in, on the CPU. Raises
        ArtifactError where the checkpoint lacks it."""
        weight = self.stored(next((name for name in names if name in self._stored), names[0]))
        return weight.to(self._dtype_of(names)) if weight.is_floating_point() else weight

    def stored(self, name: str) -> Tensor:
        """A parameter in the dtype that it has in the checkpoint, on the CPU: mapped, where it is one tensor there; computed,
        where a checkpoint need not hold it."""
        if name not in self._stored and may_be_missing(self.model, name):
            return self._computed(name)
        return require(self._stored, name, self.checkpoint).read(self.checkpoint, self._mapped)

    def _computed(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        module = copy.deepcopy(self.model.get_submodule(owner)).to_empty(device="cpu")
        self.model._init_weights(module)  # noqa: SLF001  as in emulator.py
        return module.get_parameter(attribute).detach()

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that a parameter has in the checkpoint."""
        [first, *_] = require(self._stored, name, self.checkpoint).parts[0]
        return self.checkpoint.entry(first).dtype

    def load(self, names: Sequence[str]) -> None:
        """Puts a parameter on the device, under all of ``names``."""
        parameter = nn.Parameter(self.read(names).to(self.device), False)
        for name in names:
            self.place(name, parameter)

    def place(self, name: str, parameter: nn.Parameter) -> None:
        """Makes ``parameter`` the model's of that name."""
        owner, _, attribute = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[attribute] = parameter

    def parameters_of(self, module: str) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters of a module with their names in the model."""
        return list(self.model.get_submodule(module).named_parameters(prefix=module))

    def _mapped(self, entry: TensorEntry) -> Tensor:
        """The tensor's place in its file's mapping; a copy where the file has it at an odd place."""
        if entry.start == entry.stop or entry.start % entry.dtype.itemsize:
            return entry.read_rows()
        if entry.file not in self._files:
            with warnings.catch_warnings():  # that the memory must not be written to: nothing trains frozen weights
                warnings.simplefilter("ignore", UserWarning)
                self._files[entry.file] = torch.from_numpy(np.memmap(entry.file, np.uint8, "r"))
        return self._files[entry.file][entry.start : entry.stop].view(entry.dtype).reshape(entry.shape)

    def _dtype_of(self, names: Sequence[str]) -> torch.dtype:
        """The model's, but for what transformers keeps in float32 where that is narrower (``_keep_in_fp32_modules``)."""
        kept = self.model._get_dtype_plan(self.dtype)
        parts = {part for name in names for part in name.split(".")}
        return torch.float32 if any({*module.split(".")} <= parts for module in kept) else self.dtype


def _dtype(wanted: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """What ``from_pretrained`` takes: as asked, else the config's, else the checkpoint's first floating dtype."""
    if wanted != "auto":
        return getattr(torch, wanted)
    stored = (entry.dtype for entry in checkpoint if entry.dtype.is_floating_point)
    return getattr(config, "dtype", None) or next(stored, torch.float32)
