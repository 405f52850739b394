"""A run's directory: its artifacts' places, its manifest, its lock.

The manifest is written last and atomically after each stage, so that whatever it names is whole: a run that is killed
anywhere goes on from it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.atomic import atomic_file, write_json

CONFIG = "config.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.json"
_LOCK = ".lock"
_FORMAT = 1


class RunDirectory:
    """The places of a run's artifacts under one root, and the manifest that says which are whole."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.expanduser(str(root).removeprefix("file://"))).absolute()
        self._lock_descriptor: int | None = None

    @property
    def name(self) -> str:
        """The run's name: the directory's."""
        return self.root.name

    def path(self, *parts: str) -> Path:
        """A place inside the run."""
        return self.root.joinpath(*parts)

    def check(self) -> None:
        """Raises ConfigError where it cannot be written, or holds files without our manifest, or another run's name."""
        self._check_place()
        if not self.root.is_dir():
            return
        if not self.path(MANIFEST).is_file():
            # A run killed while it wrote its first manifest left no more than these.
            own = (_LOCK, f".{MANIFEST}.")
            others = [entry.name for entry in self.root.iterdir() if not entry.name.startswith(own)]
            if others:
                raise ConfigError(
                    f"run_dir {self.root} holds files of something else ({', '.join(sorted(others)[:3])}) and no"
                    f" {MANIFEST}: name a new or empty directory."
                )
            return
        try:
            name = self.manifest()["name"]
        except ArtifactError as error:  # --fresh must never remove what may be somebody else's
            raise ConfigError(f"run_dir: {error}") from error
        if name != self.name:
            raise ConfigError(
                f"run_dir {self.root} holds the run {name!r}: name a new directory, or rename this one to {name}."
            )

    def _check_place(self) -> None:
        existing = self.root
        try:
            while not existing.exists():
                existing = existing.parent
        except (OSError, ValueError) as error:
            raise ConfigError(f"run_dir {self.root} is no usable path ({error}): name another.") from error
        if not existing.is_dir():
            raise ConfigError(f"run_dir {self.root}: {existing} is a file, not a directory: name another place.")
        try:  # asked of the file system itself: access rights alone do not tell
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ConfigError(
                f"run_dir {self.root} cannot be written ({error.strerror}): name another place."
            ) from error

    def existing(self) -> RunDirectory:
        """Itself; raises ConfigError where this is no run."""
        try:
            self.manifest()
        except ArtifactError as error:
            raise ConfigError(str(error)) from error
        return self

    def create(self, config: dict[str, Any], *, fresh: bool = False) -> None:
        """Makes the directory with its manifest and config; ``fresh`` removes what an earlier run of this name left."""
        self.check()
        if fresh and self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        manifest: dict[str, Any] = self.manifest() if self.path(MANIFEST).is_file() else {"stages": {}}
        manifest.update({"format": _FORMAT, "name": self.name, "config": config})
        write_json(self.path(MANIFEST), manifest)
        with atomic_file(self.path(CONFIG)) as file:
            file.write(yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())

    def manifest(self) -> dict[str, Any]:
        """The manifest; raises ArtifactError where there is none or it is unreadable."""
        path = self.path(MANIFEST)
        if not path.is_file():
            raise ArtifactError(f"{self.root} holds no {MANIFEST}: it is no run directory.")
        try:
            manifest: Any = json.loads(path.read_text())
        except ValueError as error:
            raise ArtifactError(f"{path} is not JSON: restore it, or remove {self.root}.") from error
        if (
            not isinstance(manifest, dict)
            or manifest.get("format") != _FORMAT
            or not isinstance(manifest.get("stages"), dict)
        ):
            raise ArtifactError(f"{path} is no manifest of a run of this version: name a new or empty directory.")
        return manifest

    def stage(self, name: str) -> dict[str, Any] | None:
        """What the manifest says of a finished stage, or None."""
        found: dict[str, Any] | None = self.manifest()["stages"].get(name)
        return found

    def is_done(self, name: str, inputs: str) -> bool:
        """Whether the stage was finished with inputs of this fingerprint and its files are all there, whole by size."""
        entry = self.stage(name)
        if entry is None or entry["inputs"] != inputs:
            return False
        return all(_size(self.path(path)) == size for path, size in entry["outputs"].items())

    def commit(self, name: str, inputs: str, outputs: Iterable[Path], result: dict[str, Any]) -> None:
        """Records a finished stage, with the sizes of its files, after they are on disk."""
        manifest = self.manifest()
        files = {str(path.relative_to(self.root)): path.stat().st_size for path in _files(outputs)}
        manifest["stages"][name] = {
            "inputs": inputs,
            "finished_at": time.time(),
            "outputs": files,
            "result": result,
        }
        write_json(self.path(MANIFEST), manifest)

    def forget(self, name: str) -> None:
        """Takes a stage out of the manifest, before its files are written again."""
        manifest = self.manifest()
        if manifest["stages"].pop(name, None) is not None:
            write_json(self.path(MANIFEST), manifest)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes ``metrics.json``, whole: what it held of stages that are to be redone does not stay."""
        write_json(self.path(METRICS), metrics)

    def metrics(self) -> dict[str, Any]:
        """``metrics.json``, empty where there is none yet."""
        path = self.path(METRICS)
        metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return metrics

    def lock(self) -> None:
        """Takes the run for this process; the operating system gives it back when the process ends, however it ends.

        Raises:
            ConfigError: where another process holds it; says which.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path(_LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(f"run_dir {self.root} is in use by {holder}: wait for it, or name another.") from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._lock_descriptor = descriptor

    def holder(self) -> str | None:
        """The process that holds the run now, or None."""
        if not self.path(_LOCK).is_file():
            return None
        with self.path(_LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
        return None

    def unlock(self) -> None:
        """Gives the run back."""
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        else:
            yield path


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
