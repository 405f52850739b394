"""Where a training runs: as a rank of a Ray Train group, or alone in a Ray task whose process serves one after another.

A group's processes are made for it and end with it, which takes many times as long as a short training of one worker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from emloc_ray.errors import ArtifactError, StageError
from emloc_ray.io.store.atomic import COPY_BYTES, atomic_file, read_json, write_json
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import discard, ensure, is_stored, sizes
from emloc_ray.stages.ray.departures import Departures

NEWEST = "newest.json"  # beside the checkpoints: which is the newest that is whole


class TrainingSession(ABC):
    """One rank of a training: which it is, and its checkpoints, which are folders of ``directory``."""

    def __init__(self, directory: Path, rank: int, world_size: int) -> None:
        self.directory, self.rank, self.world_size = directory, rank, world_size

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[str | None]:
        """The folder of the newest checkpoint that is whole, the same on all ranks, while the block lasts; None where there is
        none. The first rank removes what a save that was broken off left. Raises ArtifactError where a rank does not see it."""
        name = self.agreed(self._newest() if self.rank == 0 else None)
        folder = None if name is None else self.directory / name
        if folder is not None:
            ensure(folder)
            if not folder.is_dir():
                raise ArtifactError(
                    f"{self.directory / NEWEST} names {name}, which is not there: remove the file to begin anew."
                )
        if self.rank == 0:
            self._remove(lambda step: f"checkpoint-{step}" != name)
        yield None if folder is None else str(folder)

    def save(self, folder: Path | None, step: int) -> None:
        """Keeps what this rank wrote for a step (``folder``, where it did), in place of earlier steps': the files of all ranks
        in one folder, then its name, then no earlier ones. All ranks call it. Raises TakenOver where another process holds the
        run by now, StageError where another group has come further: this one stood still, and was replaced."""
        check_lock(self.directory)
        target = self.directory / f"checkpoint-{step}"
        if folder is not None:
            for file in sizes(folder):
                with file.open("rb") as source, atomic_file(target / file.relative_to(folder)) as kept:
                    shutil.copyfileobj(source, kept, COPY_BYTES)
        self.meet()
        if self.rank == 0 and folder is not None:
            newest = self._newest()
            if newest is not None and step_of(newest) > step:
                raise StageError(
                    f"Step {step} was saved too late: the training has gone on to {newest} without this worker."
                )
            write_json(self.directory / NEWEST, {"folder": target.name})
            self._remove(lambda other: other < step)

    def _newest(self) -> str | None:
        newest = read_json(self.directory / NEWEST)
        return None if newest is None else str(newest["folder"])

    def _remove(self, goes: Callable[[int], bool]) -> None:
        for name in {file.relative_to(self.directory).parts[0] for file in sizes(self.directory)}:
            if name != NEWEST and goes(step_of(name)):
                discard(self.directory / name)

    @abstractmethod
    def agreed(self, name: str | None) -> str | None:
        """What the first rank gives, on all ranks."""

    @abstractmethod
    def meet(self) -> None:
        """Waits for all ranks; raises where one was lost."""

    @abstractmethod
    def is_leaving(self) -> bool:
        """Whether a node of this training is about to leave. All ranks ask it together."""


class GroupSession(TrainingSession):
    """A rank of the Ray Train group that this process belongs to."""

    def __init__(self, directory: Path) -> None:
        context = ray.train.get_context()
        super().__init__(directory, context.get_world_rank(), context.get_world_size())

    def agreed(self, name: str | None) -> str | None:
        """By Ray Train: on a GPU torch has no device of this rank's yet."""
        return broadcast_from_rank_zero(name)

    def meet(self) -> None:
        """By torch, which raises where a rank was lost; Ray Train's own report returns then."""
        torch.distributed.barrier()

    def is_leaving(self) -> bool:
        """As Ray Train says from 2.56 on."""
        ask = getattr(ray.train, "get_preemption_info", None)
        return ask is not None and ask() is not None


class LoneSession(TrainingSession):
    """The only worker of a training."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, 0, 1)
        self._departures = Departures()

    def agreed(self, name: str | None) -> str | None:
        """Its own."""
        return name

    def meet(self) -> None:
        """There is nobody to wait for."""

    def is_leaving(self) -> bool:
        """Whether this process's node is about to leave, as Ray says."""
        return self._departures.here()


def step_of(name: str) -> int:
    """The step of a checkpoint's folder; -1 of what is none, as an earlier version's."""
    step = name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def claim_try_folder(storage_dir: Path) -> str:
    """Renames the last try's folder in ``storage_dir`` to the next number, and returns it: a new try thereby has what was trained
    so far. A late write of the last try makes its folder anew, where nobody reads. Raises TakenOver where another process holds
    the run. Returns "" on an object store, whose keys name the lease."""
    while not is_stored(storage_dir):
        check_lock(storage_dir)
        last = max((int(entry.name) for entry in storage_dir.iterdir() if entry.name.isdigit()), default=0)
        own = storage_dir / str(last + 1)
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # another process was faster, and holds the run
            if last:
                (storage_dir / str(last)).rename(own)
            else:
                own.mkdir()
            return own.name
    return ""


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """Restores the environment after a training, for the next one in the same process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
