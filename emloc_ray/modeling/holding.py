"""How a model is held for a pass, with the same numbers whichever way.

- ``resident``: all of its weights on the device.
- ``offloaded``: a block's weights come to the device when its forward pass begins and go when it ends, and once more where
  a backward pass runs the block again, but for the block at which it turns. They wait in the mapped file, or for a GPU in
  pinned memory of the host; the next block's copy runs while a block computes. One pass costs one transfer of the weights.
- ``all_offloaded``: the same of the embedding and the head, where these do not fit.
- ``block_by_block``: one block at a time over all rows (:mod:`emloc_ray.modeling.replay`), which is Grams' own.

Kin: axolotl's ``layer_offloading``; MegaTrain (https://arxiv.org/abs/2604.05091).
"""

import copy
import functools
import gc
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emloc_ray.modeling.block_weights import BlockWeights
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.pinned import Pinned, may_stay_pinned, pinned_bytes, release_unused

Result = TypeVar("Result")


def open_model(directory: Path, hold: str = "resident", **options: Any) -> Any:
    """The model of a directory, held ``resident``, ``offloaded`` or ``all_offloaded``; ``options`` as
    :func:`emloc_ray.modeling.loading.load_model` has them. Raises ArtifactError where the checkpoint lacks a weight, StageError
    where it cannot be read a part at a time."""
    if hold == "resident":
        gc.collect()  # as below
        return load_model(directory, **options)
    return Offloaded(directory, ends_offloaded=hold == "all_offloaded", **options).model


@dataclass(frozen=True)
class _OffloadedParameter:
    """One parameter of an offloaded block.

    ``owners``: the module that has it, one of each model; ``attribute``: its name there; ``names``: its names in the checkpoint;
    ``absent``: the placeholder while its weight is away.
    """

    owners: Sequence[nn.Module]
    attribute: str
    names: Sequence[str]
    absent: nn.Parameter


@dataclass
class _OffloadedPart:
    """What comes and goes together: a block, or the embedding or the head."""

    position: int
    parameters: list[_OffloadedParameter]
    is_head: bool
    pinned: Pinned | None = None  # its weights, where they wait in pinned memory


class Offloaded:
    """A model whose blocks' weights are on the device only while they compute.

    A weight that is away is one NaN expanded to ``(out, in)``: right in device, dtype and shape, and without memory. With
    gradients, the backward pass runs each block again. Adapters may be attached to ``model``, and stay on the device. ``models``
    are it and copies that share its weights: each may have an adapter of its own.
    """

    def __init__(self, directory: Path, *, ends_offloaded: bool = False, num_models: int = 1, **options: Any) -> None:
        """As :func:`open_model`; ``ends_offloaded``: the embedding and the head come and go as well."""
        # An earlier task's models are cycles, as modules call what holds them: they go before more is held.
        gc.collect()
        release_unused()
        self.weights = BlockWeights(directory, **options)
        self.model, self.device = self.weights.model, self.weights.device
        # By which weights come to a GPU ahead of their use.
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # The part that is on its way to a GPU, its weights, and when they will be there.
        self._ahead: tuple[int, list[Tensor], Any] | None = None
        self._round_robin: _RoundRobin | None = None
        self._present: _OffloadedPart | None = None
        # The part that ran last, with its direction; and which part ran after it the last time.
        self._ran = (-1, 1)
        self._successors: dict[tuple[int, int], int] = {}
        outside = self.weights.outside()
        aliases = {name: names for names in outside for name in names}
        ends = self._ends(outside) if ends_offloaded else []
        for names in outside:
            if not {name.rpartition(".")[0] for name in names}.intersection(ends):
                self.weights.load(names)
        self.models = [self.model, *(_with_the_same_weights(self.model) for _ in range(num_models - 1))]
        names = [*self.weights.blocks, *ends]
        self._parts = [self._part(name, position, aliases) for position, name in enumerate(names)]

    def _ends(self, outside: Sequence[Sequence[str]]) -> list[str]:
        """The embedding and the head, and whatever modules have their weights too."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        own = {name for name, module in self.model.named_modules() if any(module is end for end in ends)}
        owners = [[name.rpartition(".")[0] for name in names] for names in outside]
        return list(dict.fromkeys(name for names in owners if own.intersection(names) for name in names))

    def _part(self, name: str, position: int, aliases: Mapping[str, Sequence[str]]) -> _OffloadedPart:
        modules, parameters = [model.get_submodule(name) for model in self.models], []
        for own, parameter in list(modules[0].named_parameters(prefix=name, remove_duplicate=False)):
            owner, _, attribute = own.rpartition(".")
            nan = torch.full((), float("nan"), dtype=parameter.dtype, device=self.device)
            absent = nn.Parameter(nan.expand(parameter.shape), False)
            owners = [model.get_submodule(owner) for model in self.models]
            parameters.append(_OffloadedParameter(owners, attribute, aliases.get(own, [own]), absent))
        part = _OffloadedPart(position, parameters, modules[0] is self.model.get_output_embeddings())
        self._leave(part)
        for module in modules:
            module.forward = functools.partial(self._forward, part, module, module.forward)
        return part

    def _forward(
        self, part: _OffloadedPart, module: nn.Module, compute: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        run = functools.partial(self._run, part, compute)
        if torch.is_grad_enabled() and part.position < len(self.weights.blocks):
            directions = iter((1, -1))  # up, and down where it is run again

            def checkpointed(*args: Any, **kwargs: Any) -> Any:
                return run(next(directions, -1), *args, **kwargs)

            draws = module.training  # dropout: the same again
            return checkpoint(checkpointed, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)
        return run(1, *args, **kwargs)

    def _run(self, part: _OffloadedPart, compute: Callable[..., Any], direction: int, *args: Any, **kwargs: Any) -> Any:
        """Runs a part with its weights. ``direction``: 1 upwards, where the block after it comes next; -1 downwards.

        torch ends a run by an exception where the backward pass has all that it needs of the block.
        """
        if self._present is not part:
            self._successors[self._ran] = part.position
            self._drop()
            self._enter(part)
        self._ran = part.position, direction
        if self._round_robin is None:
            try:
                return compute(*args, **kwargs)
            finally:
                if not self._stays_loaded(part):
                    self._drop()
        result = compute(*args, **kwargs)
        self._round_robin.pass_on()
        return result

    def _stays_loaded(self, part: _OffloadedPart) -> bool:
        """Whether the next part to run is this one again.

        It is for the head, which runs once a chunk of labels. With gradients it is for the last block, where the pass turns
        back, and for the first, where the next batch begins; but not where head and embedding, offloaded too, come between.
        """
        if part.is_head:
            return True
        _, direction = self._ran
        turn = len(self.weights.blocks) - 1 if direction > 0 else 0
        only_blocks = len(self._parts) == len(self.weights.blocks)
        return torch.is_grad_enabled() and only_blocks and part.position == turn

    def _enter(self, part: _OffloadedPart) -> None:
        begun = torch.cuda.current_stream(self.device).record_event() if self.copies is not None else None
        for place, weight in zip(part.parameters, self._arrived(part), strict=True):
            _put(place, nn.Parameter(weight, False))
        self._present, self._begun = part, begun

    def _drop(self) -> None:
        """Lets the weights go that are there; a GPU's next ones may come once what came before these has ended."""
        part, self._present = self._present, None
        if part is None:
            return
        self._leave(part)
        if self._begun is not None:
            self._begun.synchronize()  # the host may be many blocks ahead, each of whose weights would be held
            self._send_ahead()

    def _leave(self, part: _OffloadedPart) -> None:
        for place in part.parameters:
            _put(place, place.absent)

    def _arrived(self, part: _OffloadedPart) -> list[Tensor]:
        """The part's weights on the device: those that were sent ahead, or a copy made now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != part.position:
            return self.sent(part)
        _, weights, copied = ahead
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for weight in weights:
            weight.record_stream(stream)
        return weights

    def sent(self, part: _OffloadedPart) -> list[Tensor]:
        """The part's weights on the device, copied by the current stream of a GPU."""
        if part.pinned is not None:
            return part.pinned.on(self.device)
        weights = [self.weights.read(place.names) for place in part.parameters]
        if self.copies is None:
            return [weight.to(self.device) for weight in weights]
        stays = may_stay_pinned(pinned_bytes(weights))
        pinned = Pinned.of(weights)
        part.pinned = pinned if stays else None
        return pinned.on(self.device)

    def _send_ahead(self) -> None:
        """Begins the copy of the block that comes next, while this part computes: the one that came last time, else the block
        above or below as the pass goes."""
        after = self._successors.get(self._ran, sum(self._ran))
        if self.copies is None or not 0 <= after < len(self.weights.blocks):
            return
        with torch.cuda.stream(self.copies):
            self._ahead = after, self.sent(self._parts[after]), self.copies.record_event()

    def in_step(self, passes: Sequence[Callable[[], Result]]) -> list[Result]:
        """What passes without gradients give that each run another one of the :attr:`models`, and go through their blocks
        together: weights come once for all. Raises what a pass raised, which ends the others."""
        self._round_robin = _RoundRobin(len(passes))
        try:
            return self._round_robin.run(passes)
        finally:
            self._round_robin = None
            self._drop()


def _with_the_same_weights(model: Any) -> Any:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _put(place: _OffloadedParameter, parameter: nn.Parameter) -> None:
    for owner in place.owners:
        owner._parameters[place.attribute] = parameter


class _RoundRobin:
    """Threads that run one at a time and take turns: the next one whenever a block is passed."""

    def __init__(self, number: int) -> None:
        self._gates = [threading.Semaphore(0) for _ in range(number)]
        self._going = list(range(number))
        self._current = 0
        self._error: BaseException | None = None

    def pass_on(self) -> None:
        """Lets the next one run, and waits for the turn to come back."""
        own = self._current
        self._next(own)
        self._gates[own].acquire()
        self._current = own
        if self._error is not None:
            raise self._error

    def _next(self, own: int) -> None:
        after = [number for number in self._going if number > own]
        if self._going:
            self._gates[(after or self._going)[0]].release()

    def run(self, passes: Sequence[Callable[[], Result]]) -> list[Result]:
        """What all give, in order."""
        num_threads = torch.get_num_threads()

        def go(number: int) -> Result:
            self._gates[number].acquire()
            self._current = number
            torch.set_num_threads(num_threads)  # which a thread begins without
            try:
                return passes[number]()
            except BaseException as error:
                self._error = error
                raise
            finally:
                self._going.remove(number)
                self._next(number)

        with ThreadPoolExecutor(len(passes)) as threads:
            futures = [threads.submit(go, number) for number in range(len(passes))]
            self._gates[0].release()
        return [future.result() for future in futures]
