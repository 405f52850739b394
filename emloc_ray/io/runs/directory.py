"""A run's directory: its artifacts' places, its manifest, its lock; in a file system or on an object store.

The manifest is written last and atomically after each stage, so that whatever it names is whole: a run that is killed
anywhere resumes from it. On an object store ``root`` is this node's copy (:mod:`emloc_ray.io.store.node_cache`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from emloc_ray.errors import ArtifactError, ConfigError, TakenOver
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.manifest import FORMAT, after_all, ask_to_redo, confirm, end_tries, parse_manifest
from emloc_ray.io.runs.metrics import METRICS, read_metrics, write_metrics
from emloc_ray.io.runs.resume import INPUTS
from emloc_ray.io.runs.run_places import check_empty, check_folder, check_holds_no_run, check_store
from emloc_ray.io.runs.secret_values import without_secrets
from emloc_ray.io.store.atomic import json_bytes, write_json, write_text
from emloc_ray.io.store.lease import KEY as LEASE
from emloc_ray.io.store.lease import Holder, Lease, find_holder
from emloc_ray.io.store.lock_file import NAME as LOCK
from emloc_ray.io.store.lock_file import LockFile, check_lock
from emloc_ray.io.store.node_cache import discard, ensure, hashes, mirror, origin, sizes
from emloc_ray.io.store.node_copies import is_whole
from emloc_ray.io.store.object_store import MANIFEST, ObjectStore, named_files
from emloc_ray.io.store.objects import Version
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.io.store.threads import by_threads
from emloc_ray.io.store.turns import own_name

CONFIG = "config.yaml"
CARD = "README.md"  # in the folder of an adapter or a merged model: about it, no part of it
SPECTRA = "spectra.json"  # in an emulator's folder: a few of each layer's eigenvalues
_READERS = 4
# In the manifest of a run that is being taken over, or emptied.
_ADOPTING, _FRESH = "adopting", "fresh"
Kind = Literal["run", "batch"]


class RunDirectory:
    """The places of a run's artifacts under one root, and the manifest that says which are whole."""

    def __init__(self, root: str | Path) -> None:
        self.store: ObjectStore | None = None
        if is_store_uri(str(root)):
            self._open(str(root), None)
        else:
            self.root = Path(os.path.expanduser(str(root).removeprefix("file://"))).absolute()
            self.place = str(self.root)
        self._lock_file: LockFile | None = None
        self.lease: Lease | None = None  # by which this process holds it, where it is on an object store
        self._version: Version | None = None  # of the manifest on an object store, as it was read last

    def _open(self, uri: str, lease: int | None) -> None:
        """Sees the store as the holder of the lease of this number sees it."""
        self.root = mirror(uri, lease)
        here = origin(self.root)
        assert here is not None
        self.store, self.place = here.store, here.store.uri

    @property
    def name(self) -> str:
        """The run's name: the last part of its place."""
        return self.root.name if self.store is None else self.store.prefix.rpartition("/")[2] or self.store.bucket

    def path(self, *parts: str) -> Path:
        """A place inside the run."""
        return self.root.joinpath(*parts)

    def check(self, kind: Kind = "run") -> dict[str, Any]:
        """Returns the manifest, {} where there is none yet. Raises ConfigError where it cannot be written, or holds files
        without our manifest, or another run's name, or what is of another kind."""
        check_folder(self.root, "run_dir") if self.store is None else check_store(self.store)
        if self._manifest_content() is None:
            check_empty(self.place, self.names())
            return {}
        try:
            manifest = self.manifest()
        except ArtifactError as error:  # --fresh must never remove what may be somebody else's
            raise ConfigError(f"run_dir: {error}") from error
        name, own_kind = manifest["name"], manifest.get("kind", "run")
        if own_kind != kind:
            raise ConfigError(f"run_dir {self.place} holds a {own_kind}, no {kind}: name a new or empty directory.")
        if name != self.name:
            raise ConfigError(
                f"run_dir {self.place} holds the {kind} {name!r}: name a new directory, or rename this one to {name}."
            )
        return manifest

    def names(self) -> list[str]:
        """What lies directly in it."""
        if self.store is not None:
            return self.store.names()
        return [entry.name for entry in self.root.iterdir()] if self.root.is_dir() else []

    def existing(self) -> RunDirectory:
        """Itself; raises ConfigError where this is no run."""
        try:
            self.manifest()
        except ArtifactError as error:
            raise ConfigError(str(error)) from error
        return self

    def create(
        self,
        config: dict[str, Any],
        *,
        fresh: bool = False,
        kind: Kind = "run",
        steps: Sequence[str] = (),
        redo: Sequence[str] = (),
        outdated: str | None = None,
    ) -> None:
        """Makes the directory with its manifest and config, without its secrets, and the ``steps`` that it will take; ``fresh``
        removes what an earlier run of this name left, as does the next try where that is broken off. Notes the stages to
        ``redo``, each until it is committed again, and the first that is ``outdated`` under this config, until it is made anew
        or confirmed. Raises ConfigError where ``fresh`` would remove another run."""
        self.check(kind)
        config = without_secrets(config)
        self.root.mkdir(parents=True, exist_ok=True)
        for leftover in self.root.glob(".*.tmp"):
            discard(leftover)
        names = self.names()
        before: dict[str, Any] = self.manifest() if MANIFEST in names else {"stages": {}}
        fresh = fresh or before.get(_FRESH, False)
        if fresh:
            check_holds_no_run(self.place, self.root if self.store is None else self.store)
        manifest: dict[str, Any] = {"stages": {}, _FRESH: True} if fresh else dict(before)
        manifest.update({"format": FORMAT, "kind": kind, "name": self.name, "config": config, "steps": list(steps)})
        if redo:
            ask_to_redo(manifest, redo)
        manifest.pop("outdated", None)
        if outdated is not None:
            manifest["outdated"] = outdated
        if self.lease is not None and (before.get("lease") != self.lease.number or _ADOPTING in before):
            manifest = self._adopted(before, manifest, fresh)
        self._write_manifest(manifest)
        write_text(self.path(CONFIG), write_yaml(config))
        if fresh:  # last: whatever a kill leaves of these is a run's, with no stage done, and the next try removes it
            for name in set(names) - {MANIFEST, CONFIG, LOCK, LEASE}:
                discard(self.path(name))
            del manifest[_FRESH]
            self._write_manifest(manifest)

    def _adopted(self, before: dict[str, Any], manifest: dict[str, Any], fresh: bool) -> dict[str, Any]:
        """The manifest under this lease, which names what unfinished stages had written under the one before: from now on
        nobody else writes to this run, or what they write is not read. A try that is broken off here leaves the number of the
        lease before to the next one. Of a batch all lies under plain names, but for its tasks and its cache: none is listed."""
        assert self.lease is not None
        past = ObjectStore(self.place, lease=before.get(_ADOPTING, before.get("lease")))
        manifest.update({"lease": self.lease.number, _ADOPTING: past.lease})
        self._write_manifest(manifest)
        named, seen = named_files(before), {} if fresh or manifest["kind"] == "batch" else past.versions("", before)
        del manifest[_ADOPTING]
        return {**manifest, "adopted": {path: stored.sha256 for path, stored in seen.items() if path not in named}}

    def manifest(self) -> dict[str, Any]:
        """The manifest; raises ArtifactError where there is none or it is unreadable, TakenOver where another process that
        holds the run wrote it."""
        path = self.path(MANIFEST)
        content = self._manifest_content()
        if content is None:
            raise ArtifactError(
                f"{self.place} holds no {MANIFEST}, so it is no run directory: name the run_dir of a run."
            )
        manifest = parse_manifest(content, path)
        if self.lease is not None and manifest.get("lease", 0) > self.lease.number:
            raise self._taken_over()
        return manifest

    def _manifest_content(self) -> bytes | None:
        if self.store is None:
            path = self.path(MANIFEST)
            return path.read_bytes() if path.is_file() else None
        version = self.store.read_version(MANIFEST)
        self._version = None if version is None else version[0]
        return None if version is None else version[1]

    def _taken_over(self) -> TakenOver:
        return TakenOver(f"{self.place} was taken over by another process: leave it to that, or stop that first.")

    def stages(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of all finished stages; nothing where there is none yet."""
        stages: dict[str, dict[str, Any]] = self.manifest()["stages"] if MANIFEST in self.names() else {}
        return stages

    def stage(self, name: str) -> dict[str, Any] | None:
        """What the manifest says of a finished stage, or None."""
        entry: dict[str, Any] | None = self.manifest()["stages"].get(name)
        return entry

    def is_done(self, name: str, inputs: str) -> bool:
        """Whether the stage was finished with inputs of this fingerprint and none of its files is :meth:`altered`."""
        entry = self.stage(name)
        return entry is not None and entry["inputs"] == inputs and not self.altered(entry)

    def altered(self, entry: Mapping[str, Any]) -> list[Path]:
        """The files of a finished stage, by its entry in the manifest, that are missing or of another size, unless they were
        dropped since; on an object store, whose keys name contents, those that are not as they were written."""
        outputs: dict[str, dict[str, Any]] = {} if entry.get("dropped") else entry["outputs"]
        seen = self._content_of(outputs)
        return [self.path(path) for path in outputs if not seen.get(path, {"": 0}).items() <= outputs[path].items()]

    def _content_of(self, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Sizes of the files that exist; from a store their SHA-256 too, listed by the run's top folders."""
        if self.store is None:
            files = {path: self.path(path) for path in paths}
            return {path: {"size": file.stat().st_size} for path, file in files.items() if file.is_file()}
        tops = {path.partition("/")[0] for path in paths}
        return {
            f"{top}/{name}": {"size": info.size, "sha256": info.sha256}
            for top in tops
            for name, info in self.store.versions(top).items()
        }

    def damaged(self, name: str, stopped: Callable[[], bool] = lambda: False) -> list[Path]:
        """The files of a finished stage whose content is not what the manifest says; reads all that is on a disk, once a
        process what runs have linked. What comes from a store is checked when it is found done, and when it is fetched.
        Raises Stopped where ``stopped`` turns true."""
        entry = self.stage(name)
        if entry is None or entry.get("dropped") or self.store is not None:
            return []
        wanted = {self.path(path): content["sha256"] for path, content in entry["outputs"].items()}
        whole = by_threads(_READERS, lambda file: is_whole(file, wanted[file]), wanted, stopped)
        return [file for file, as_written in zip(wanted, whole, strict=True) if not as_written]

    def writer(self, path: str) -> str | None:
        """The finished stage that wrote a file, by its path from the run's directory on; None where none did."""
        return next((name for name, entry in self.manifest()["stages"].items() if path in entry["outputs"]), None)

    def begun(self) -> dict[str, Any]:
        """The ``versions`` with which each unfinished stage was begun."""
        begun: dict[str, Any] = self.manifest().get("begun", {}) if MANIFEST in self.names() else {}
        return begun

    def to_redo(self) -> list[str]:
        """The stages that an earlier try was asked to redo, and has not redone."""
        redo: list[str] = self.manifest().get("redo", []) if MANIFEST in self.names() else []
        return redo

    def spent(self, name: str, inputs: str) -> float:
        """The seconds that the tries of an unfinished stage have taken, from inputs of this fingerprint."""
        tried = self.manifest().get("tries", {}).get(name, {})
        return float(tried["seconds"]) if tried.get("inputs") == inputs else 0.0

    def begin(self, name: str, versions: Mapping[str, Any], inputs: str = "", spent: float = 0.0) -> None:
        """Records with what a stage is begun, before it writes files that a later try goes on from, and :meth:`spent`."""
        manifest = self.manifest()
        manifest.setdefault("begun", {})[name] = dict(versions)
        manifest.setdefault("tries", {})[name] = {"inputs": inputs, "seconds": spent}
        self._write_manifest(manifest)

    def commit(
        self,
        name: str,
        inputs: str,
        outputs: Iterable[Path],
        result: dict[str, Any],
        versions: Mapping[str, Any] | None = None,
        known: Mapping[Path, str] | None = None,
    ) -> None:
        """Records a finished stage, with size and SHA-256 of its files, after they are written, and the ``versions`` that it
        was made with; ``known`` has the SHA-256 of files that were checked. Raises StageError where the run was taken
        over by another process meanwhile, as in all methods that write."""
        manifest, files = self.manifest(), {}
        for output in outputs:
            named, size_of = hashes(output, known), sizes(output)
            if not named and not output.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(output))
            # What is linked from a cache file by file must not say what it was begun with; a card is its reader's to edit.
            for path, sha256 in ((path, sha256) for path, sha256 in named.items() if path.name not in (INPUTS, CARD)):
                files[path.relative_to(self.root).as_posix()] = {"size": size_of[path], "sha256": sha256}
        manifest["stages"][name] = {
            "inputs": inputs,
            "finished_at": after_all(manifest),
            "outputs": files,
            "result": result,
            **({} if versions is None else {"versions": dict(versions)}),
        }
        end_tries(manifest, name)
        adopted = manifest.get("adopted", {})
        for path in adopted.keys() & files.keys():
            del adopted[path]
        self._write_manifest(manifest)
        if self.store is not None:
            for top in {path.partition("/")[0] for path in files}:
                self.store.drop_others(top)

    def confirm(self, name: str, ahead: Collection[str]) -> None:
        """Records that a finished stage's inputs were seen to be what they were, though a stage ``ahead`` was done since."""
        manifest = self.manifest()
        if confirm(manifest, name, ahead):
            self._write_manifest(manifest)

    def accept(self, name: str, versions: Mapping[str, Any]) -> None:
        """Records that a finished stage, made with others, is taken as it is under these ``versions``."""
        manifest = self.manifest()
        manifest["stages"][name]["accepted"] = dict(versions)
        self._write_manifest(manifest)

    def drop(self, name: str) -> None:
        """Deletes the files of a finished stage, which stays done; the manifest says so first."""
        self.check_held()
        manifest = self.manifest()
        entry = manifest["stages"].get(name)
        if entry is None:
            return
        if not entry.get("dropped"):
            entry["dropped"] = True
            self._write_manifest(manifest)
        for top in {path.partition("/")[0] for path in entry["outputs"]}:
            discard(self.path(top))

    def is_dropped(self, name: str) -> bool:
        """Whether a finished stage's files were deleted, as nothing was to follow from them any more."""
        return bool((self.stage(name) or {}).get("dropped"))

    def forget(self, name: str) -> None:
        """Takes a stage out of the manifest, before its files are written again."""
        self.check_held()
        manifest = self.manifest()
        entry = manifest["stages"].pop(name, None)
        if entry is None:
            return
        if self.store is not None:  # whose holder sees what earlier ones wrote by the manifest alone
            manifest["adopted"] = {**manifest.get("adopted", {}), **named_files({"stages": {name: entry}})}
        self._write_manifest(manifest)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        """On an object store in the place of the one that was read."""
        self.check_held()
        if self.store is None:
            write_json(self.path(MANIFEST), manifest)
            return
        self._version = self.store.replace(MANIFEST, json_bytes(manifest), self._version)
        if self._version is None:
            raise self._taken_over()

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes ``metrics.json``, whole: what it held of stages that are to be redone does not stay."""
        self.check_held()
        write_metrics(self.path(METRICS), metrics)

    def metrics(self) -> dict[str, Any]:
        """``metrics.json``, empty where there is none yet. Raises ArtifactError, as :func:`read_metrics`."""
        path = self.path(METRICS)
        ensure(path)
        return read_metrics(path)

    def lock(self, tell: Callable[[str], None] = lambda text: None, under: RunDirectory | None = None) -> None:
        """Takes the run for this process, until it ends, however it ends: a lock of the operating system, on an object store a
        lease that goes stale a minute after its holder's death. There a holder that may be dead is watched until it is known;
        ``tell`` hears of that before. ``under``: the batch whose task this is, and whose lease holds it too. Raises ConfigError
        where another process holds it, and says which; where its file system gives no locks."""
        if self.store is not None:

            def watch(holder: Holder) -> None:
                tell(f"{holder.name} held this run until a moment ago: waiting up to 60 s to see whether it is alive.")

            batch = None if under is None else under.lease
            lease = Lease(self.store, own_name(), after=self.store.checked_manifest().get("lease", 0), under=batch)
            held = lease.take(watch)
            if held is not None:
                raise ConfigError(f"run_dir {self.place} is in use by {held.name}: wait for it, or name another.")
            self.lease = lease
            self._open(self.place, lease.number)
            return
        self._lock_file = LockFile(self.root)
        self._lock_file.take()

    def check_held(self) -> None:
        """Raises TakenOver where another process took the run over, since this one was cut off from where it is."""
        if self.lease is not None:
            self.lease.check()
        elif self._lock_file is not None:
            check_lock(self._lock_file.path)

    @property
    def lease_age_s(self) -> float | None:
        """Seconds since this process last renewed its lease of the run; None where it holds none."""
        return None if self.lease is None else self.lease.age_s

    def holder(self) -> str | None:
        """The process that holds the run now, or None."""
        return LockFile(self.root).holder() if self.store is None else find_holder(self.store)

    def unlock(self) -> None:
        """Gives the run back."""
        if self.lease is not None:
            self.lease.give_back()
            self.lease = None
            self._open(self.place, None)
        if self._lock_file is not None:
            self._lock_file.give_back()
            self._lock_file = None
