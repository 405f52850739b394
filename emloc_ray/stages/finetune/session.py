"""Where a training runs: as a rank of a Ray Train group, or alone in a Ray task whose process serves one after another.

A group's processes are made for it and end with it, which takes many times as long as a short training of one worker.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import ray.train

from emloc_ray.io.store.atomic import atomic_directory, read_json, write_json
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import discard, ensure, is_stored, sizes
from emloc_ray.stages.ray.departures import Departures

_NEWEST = "newest.json"


class GroupSession:
    """A rank of the Ray Train group that this process belongs to, which keeps its checkpoints in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[str | None]:
        """The folder of the newest checkpoint, which Ray Train keeps, while the block lasts; None where there is none."""
        kept = ray.train.get_checkpoint()
        if kept is None:
            yield None
            return
        with kept.as_directory() as folder:
            yield folder

    def is_leaving(self) -> bool:
        """Whether a node of this training is about to leave, as Ray Train says from 2.56 on. All ranks ask it together."""
        ask = getattr(ray.train, "get_preemption_info", None)
        return ask is not None and ask() is not None

    def save(self, folder: Path | None, step: int) -> None:
        """Keeps what this rank wrote for a step (``folder``, where it did), in place of earlier steps'; all ranks call it. Ray
        Train puts the files of all ranks together in one directory. Raises TakenOver where another process holds the run by
        now: its training would go on from what this one hands in."""
        check_lock(self.directory)
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder is not None else None
        ray.train.report({"step": step}, checkpoint=checkpoint)


class LoneSession:
    """The only worker of a training; its checkpoints are folders of ``directory``, the newest named by a file."""

    rank, world_size = 0, 1

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._departures = Departures()

    def is_leaving(self) -> bool:
        """Whether this process's node is about to leave, as Ray says."""
        return self._departures.here()

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[str | None]:
        """The folder of the newest checkpoint that is whole, while the block lasts; None where there is none."""
        newest = read_json(self.directory / _NEWEST)
        if newest is None:
            yield None
            return
        folder = self.directory / newest["folder"]
        ensure(folder)
        yield str(folder) if folder.is_dir() else None

    def save(self, folder: Path | None, step: int) -> None:
        """Keeps what was written for a step: the new folder whole, then its name in the file, then no others."""
        if folder is None:
            return
        target = self.directory / f"checkpoint-{step}"
        with atomic_directory(target) as place:
            shutil.copytree(folder, place, dirs_exist_ok=True)
        write_json(self.directory / _NEWEST, {"folder": target.name})
        for name in {file.relative_to(self.directory).parts[0] for file in sizes(self.directory)}:
            if name not in (target.name, _NEWEST):
                discard(self.directory / name)


TrainingSession = GroupSession | LoneSession  # one rank of a training: which it is, and where its checkpoints are


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
