"""A run on an object store brought to a local directory, under the names that every tool knows."""

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.digests import digest
from emloc_ray.io.store.object_store import MANIFEST, ObjectStore
from emloc_ray.io.store.objects import Stored
from emloc_ray.io.store.places import below
from emloc_ray.io.store.replacing import replacing
from emloc_ray.text import counted, listed

WEIGHT_NAMES = re.compile(
    r"(pytorch_model|model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
"""Names of weights that loaders may take before those of a merged model."""
_CONNECTIONS = 8


def fetch(
    run: RunDirectory,
    directory: Path,
    parts: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    folder: Callable[[RunDirectory, str], str] = lambda run, part: part,
    tell: Callable[[str], None] = lambda sentence: None,
    leave_out: Callable[[str], bool] = lambda name: False,
) -> list[Path]:
    """Writes the run's files (those of ``parts`` such as ``adapter`` or ``merged``, else all) to ``directory``, but for those to
    ``leave_out``, by ``PART/NAME``; of a batch,
    those of all its tasks, without its cache. Returns the files written; what is there with the same content is left as it is,
    so that a broken fetch resumes. Weights that an earlier fetch left and the run no longer holds are removed, and ``tell`` is
    called with a sentence that names them. ``progress`` counts bytes. ``folder`` names a run's folder of a part; a task for
    which it raises ConfigError is left out, and told.

    Raises ConfigError where the run is in a file system or has no such part, or ``directory`` holds another run; ArtifactError
    where a file cannot be read, is not what its key names, or its name leads out of ``directory``.
    """
    store = run.store
    if store is None:
        raise ConfigError(f"{run.place} is in a file system already: copy it from there.")
    if (directory / MANIFEST).is_file() and _name_of(directory) != run.name:
        raise ConfigError(f"{directory} holds another run: name a new directory.")
    if run.manifest().get("kind") == "batch":
        return _fetch_tasks(run, store, directory, parts, progress, folder, tell)
    parts = [folder(run, part) for part in parts]
    names = [name for name in store.names() if not name.startswith("lock")]
    missing = sorted(set(parts) - set(names))
    if missing:
        raise ConfigError(f"{run.place} holds no {missing[0]} (it has {', '.join(sorted(names))}).")
    wanted = [name for name in names if not parts or name in parts]
    infos = {f"{top}/{name}": info for top in wanted for name, info in store.versions(top).items()}
    plain = [name for name in wanted if not any(key.startswith(f"{name}/") for key in infos)]
    files = {_inside(directory, name): info for name, info in infos.items() if not leave_out(name)}
    left = {
        file: info
        for file, info in files.items()
        if not (file.is_file() and file.stat().st_size == info.size and digest(file) == info.sha256)
    }
    total, done = sum(info.size for info in left.values()), 0
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        # Where the loop is left, pool.map takes back what has not begun.
        for size in pool.map(functools.partial(_copy, store), left.values(), left):
            done += size
            progress(done, total)
    _remove_old_weights(directory, files, tell)
    return [*left, *_fetch_plain(store, plain, directory)]


def _fetch_tasks(
    batch: RunDirectory,
    store: ObjectStore,
    directory: Path,
    parts: Sequence[str],
    progress: Callable[[int, int], None],
    folder: Callable[[RunDirectory, str], str],
    tell: Callable[[str], None],
) -> list[Path]:
    tasks = [
        RunDirectory(below(batch.place, "tasks", name)) for name in RunDirectory(below(batch.place, "tasks")).names()
    ]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        names_of = dict(zip(tasks, pool.map(RunDirectory.names, tasks), strict=True))
        folders = pool.map(lambda task: _held(task, names_of[task], parts, folder), tasks)
        held = dict(zip(tasks, folders, strict=True))
    for part in parts:
        lacking = [task.name for task in tasks if part not in held[task]]
        if len(lacking) == len(tasks):
            raise ConfigError(f"No task of {batch.place} holds {part} yet.")
        if lacking:
            tell(f"Left out {counted(len(lacking), 'task')} without an up-to-date {part}: {listed(lacking)}.")
    names = [name for name in store.names() if name not in ("tasks", "cache") and not name.startswith("lock")]
    files = _fetch_plain(store, names, directory)
    for task, wanted in held.items():
        if MANIFEST in names_of[task] and (wanted or not parts):
            home = _inside(directory / "tasks", task.name)
            files += fetch(task, home, list(wanted.values()), progress, tell=tell)
    return files


def _held(
    task: RunDirectory, names: Sequence[str], parts: Sequence[str], folder: Callable[[RunDirectory, str], str]
) -> dict[str, str]:
    """The folder of each part that a task holds."""
    folders = {}
    for part in parts:
        with contextlib.suppress(ConfigError):
            folders[part] = folder(task, part)
    return {part: name for part, name in folders.items() if name in names}


def _fetch_plain(store: ObjectStore, names: Sequence[str], directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    read = {_inside(directory, name): store.read(name) for name in names}
    contents = {file: content for file, content in read.items() if content is not None}
    for file, content in contents.items():
        with replacing(file) as temporary:
            temporary.write_bytes(content)
    return [*contents]


def _name_of(directory: Path) -> str:
    """The name of the run that a directory holds; raises ConfigError where its manifest cannot be read."""
    try:
        name: str = RunDirectory(directory).manifest()["name"]
    except ArtifactError as error:
        raise ConfigError(
            f"{directory / MANIFEST} cannot be read: remove it alone, where a fetch of this run was broken off, or name a new"
            " directory."
        ) from error
    return name


def _remove_old_weights(directory: Path, files: Collection[Path], tell: Callable[[str], None]) -> None:
    """Removes weights that lie in a folder of these ``files`` and are none of them: loaders may take them first."""
    folders = {file.parent for file in files} - {directory}
    old = [
        file
        for folder in folders
        for file in folder.iterdir()
        if WEIGHT_NAMES.fullmatch(file.name) and file not in files
    ]
    for file in old:
        file.unlink()
    if old:
        names = sorted(file.relative_to(directory).as_posix() for file in old)
        tell(f"Removed from {directory} what the run no longer holds: {listed(names)}.")


def _inside(directory: Path, name: str) -> Path:
    """The file that a stored name becomes; raises ArtifactError where it would lie outside ``directory``."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ArtifactError(
            f"The stored name {name} leads out of {directory}: remove it from the store, then fetch again."
        )
    return directory / name


def _copy(store: ObjectStore, info: Stored, file: Path) -> int:
    with replacing(file) as temporary:
        store.download(info, temporary)
    return info.size
