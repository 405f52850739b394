"""Every stage, each kind of fault, several moments: what was killed, whether the run survived it, what was done twice."""

from __future__ import annotations

import contextlib
import filecmp
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from emloc_ray.config.schema import RayConfig, RunConfig
from emloc_ray.io.runs.directory import CARD, RunDirectory
from emloc_ray.io.runs.fetch import fetch
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.order import STEPS
from faulting.driver import TASKS, Drive, Driver, drive, drive_batch
from faulting.nodes import Nodes, kill, pause
from faulting.s3 import faulty_store, s3_server, uri

_BY_FILE = ("data", "factorize", "merge")  # whose pieces of work are files; others tell how far they are
_RUN = "run"
_TRIES = 3  # of hitting a stage while it runs
_SECONDS = 240.0  # until a run that does not end counts as lost
_PAUSE_S = 12.0  # of a stopped process or node: Ray here counts a node as dead after 3 s
_IN_CHAOS = ("worker", "actor", "node", "driver", "pause-worker")
_OF_NODES = ("node", "pause-node", "partition")
_TOO_LATE = "the first driver was over before the second one had begun"
_DISK_BYTES = 192 * 2**20  # of the file system that is filled


@dataclass(frozen=True)
class Cell:
    """One fault and what came of it.

    ``outcome`` is ``survived`` where the run ended with the files of the undisturbed one, ``changed`` where it ended with
    others, ``lost`` where it did not end, ``none`` where the stage had no such process while it ran. Of ``pieces`` of
    work, ``redone`` were finished before the kill and done again after it.
    """

    stage: str
    kind: str
    moment: float
    outcome: str = "none"
    victim: str = ""
    redone: int = 0
    pieces: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    detail: str = ""


class Matrix:
    """The undisturbed run, and runs of single stages that are each disturbed once."""

    def __init__(self, nodes: Nodes, config: RunConfig, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        self.config, prepared = config, prepare(config)
        self.outputs = {step.name: step.outputs for step in STEPS if step.wanted(prepared)}
        self.stages = tuple(self.outputs)
        self.calm = folder / "undisturbed" / _RUN
        self.seconds: dict[str, float] = {}
        self.pieces: dict[str, int] = {}

    def undisturbed(self, stages: Sequence[str]) -> None:
        """Runs everything once, up to the last of the stages, and keeps the run as it was after each."""
        last = max(map(self.stages.index, stages))
        self._measure(self._driver(self.calm, self.stages[last], self.folder / "snapshots"), self.stages[: last + 1])

    def _measure(self, driver: Driver, stages: Sequence[str]) -> None:
        if not driver.wait(len(self.stages) * _SECONDS):
            raise SystemExit(f"The undisturbed run failed: {driver.find('error')}")
        for stage in stages:
            finish = driver.find("finish", stage=stage)
            assert finish is not None
            self.seconds[stage] = finish["seconds"]
            self.pieces[stage] = max(driver.progress(stage), default=1)

    def _snapshot(self, stage: str) -> Path:
        return self.folder / "snapshots" / stage / _RUN

    def _copy(self, stage: str, name: str) -> Path:
        """A run as it was after a stage."""
        run = self.folder / name / _RUN
        shutil.rmtree(run.parent, ignore_errors=True)
        run.parent.mkdir(parents=True)
        if stage:
            shutil.copytree(self._snapshot(stage), run)
        return run

    def _driver(
        self, place: Path, until: str, snapshots: Path | None = None, run: Drive = drive, run_dir: str | None = None
    ) -> Driver:
        """A driver of the run at ``place``, or at ``run_dir`` where that is an object store."""
        place.parent.mkdir(parents=True, exist_ok=True)
        ray = RayConfig(address=self.nodes.cluster.address)
        config = self.config.model_copy(update={"run_dir": run_dir or str(place), "ray": ray})
        return Driver(config, until, place.parent / "events.jsonl", snapshots, run)

    def cell(self, stage: str, kind: str, moment: float, seed: int) -> Cell:
        """Kills one thing once the stage has run for a share of its undisturbed time; earlier where it was over by then."""
        cell = Cell(stage, kind, moment)
        for _ in range(_TRIES):
            cell = self._attempt(cell, random.Random(seed))
            if cell.outcome != "none":
                return cell
            cell = replace(cell, moment=cell.moment / 2)
        return replace(cell, moment=moment)

    def _attempt(self, cell: Cell, random_numbers: random.Random) -> Cell:
        position = self.stages.index(cell.stage)
        with self._place(f"{cell.stage}-{cell.kind}", full=cell.kind == "disk") as run:
            if position:
                shutil.copytree(self._snapshot(self.stages[position - 1]), run, dirs_exist_ok=True)
            driver, begin = self._driver(run, cell.stage), time.monotonic()
            cell = self._wait_and_disturb(cell, driver, run, random_numbers)
            if not cell.victim:
                if driver.wait(_SECONDS):
                    return cell
                return replace(cell, outcome="lost", detail=_error(driver))
            finished, reached, then = (
                self._files(run, cell.stage),
                max(driver.progress(cell.stage), default=0),
                time.time(),
            )
            driver, wrong = self._go_on(cell, driver, run)
            ended = driver.wait(_SECONDS)
            if wrong == _TOO_LATE:
                return replace(cell, victim="")
            if cell.kind in _OF_NODES:
                self.nodes.add()
            lowest = min(driver.progress(cell.stage, since=then), default=reached)
            detail = (wrong or self._difference(run, cell.stage)) if ended else _error(driver)
            return replace(
                cell,
                outcome="lost" if not ended else "changed" if detail else "survived",
                redone=_written_again(finished, run) if cell.stage in _BY_FILE else max(0, reached - lowest),
                pieces=len(finished) if cell.stage in _BY_FILE else self.pieces[cell.stage],
                seconds=round(time.monotonic() - begin, 1),
                notes=tuple(event["text"] for event in driver.events() if event["event"] == "note"),
                detail=detail,
            )

    @contextlib.contextmanager
    def _place(self, name: str, full: bool = False) -> Iterator[Path]:
        """An empty run directory; where it is to be ``full`` later, on a small file system of its own, which needs root."""
        run = self._copy("", name)
        if not full:
            yield run
            return
        run.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(run)], check=True)
        try:
            yield run
        finally:
            subprocess.run(["umount", "--lazy", str(run)], check=True)

    def _wait_and_disturb(self, cell: Cell, driver: Driver, run: Path, random_numbers: random.Random) -> Cell:
        """The cell with its victim, where the stage had one from the moment on."""
        for _ in driver.poll(_SECONDS):
            start, finish = driver.find("start", stage=cell.stage), driver.find("finish", stage=cell.stage)
            if finish is not None:
                break
            if start is None or time.time() < start["time"] + cell.moment * self.seconds[cell.stage]:
                continue
            victim = self._disturb(cell.kind, driver, run, random_numbers)
            if victim is not None:
                return replace(cell, victim=victim)
        return cell

    def _disturb(self, kind: str, driver: Driver, run: Path, random_numbers: random.Random) -> str | None:
        """Does what ``kind`` says; names what was hit, None where there is nothing to hit now."""
        if kind == "driver":
            driver.kill()
        elif kind == "pause-driver":
            pause([psutil.Process(driver.process.pid)], _PAUSE_S)
        elif kind == "head":
            return self.nodes.kill_head()
        elif kind == "disk":
            _fill(run)
        elif kind in _OF_NODES:
            node = self.nodes.pick_node(random_numbers)
            if kind == "node":
                return self.nodes.kill_node(node)
            return (self.nodes.cut_node if kind == "partition" else self.nodes.pause_node)(node, _PAUSE_S)
        elif kind != "two-drivers":
            found = self.nodes.pick_process(kind.removeprefix("pause-"), random_numbers)
            if found is None:
                return None
            if kind == "pause-worker":
                pause([found[0]], _PAUSE_S)
            else:
                kill([found[0]])
            return found[1]
        return kind

    def _go_on(self, cell: Cell, driver: Driver, run: Path) -> tuple[Driver, str]:
        """The driver that is to end the stage, and what was wrong until then."""
        if cell.kind == "two-drivers":
            second = Driver(driver.config, cell.stage, run.parent / "second.jsonl")
            for _ in second.poll(_SECONDS):
                if second.find("start"):
                    break
            let_in, over = second.find("start"), driver.find("finish", stage=cell.stage)
            second.kill()
            if let_in is not None:
                was_late = over is not None and over["time"] < let_in["time"]
                return driver, _TOO_LATE if was_late else "the second driver was let in"
            return driver, "" if "in use" in _error(second) else _error(second)
        if cell.kind == "disk":
            if driver.wait(_SECONDS):
                return driver, "it ended well on a full disk"
            wrong = _error(driver)
            _resize(run, _DISK_BYTES)
            return self._driver(run, cell.stage), "" if "disk is full" in wrong else wrong
        hung = ""
        if cell.kind == "head":
            driver.wait(_SECONDS)
            hung = "it waited for a cluster that was gone" if driver.process.exitcode == -signal.SIGKILL else ""
            self.nodes.restart()
        return (self._driver(run, cell.stage) if cell.kind in ("driver", "head") else driver), hung

    def batch(self, moment: float) -> Cell:
        """Two tasks of a batch, each the undisturbed run; its driver is killed after a share of that run's time, and started
        again."""
        last = self.stages[-1]
        begin, cell = time.monotonic(), Cell("all", "batch-driver", moment, victim="driver")
        with self._place("batch") as run:
            driver = self._driver(run, last, run=drive_batch)
            for _ in driver.poll(moment * sum(self.seconds.values())):
                pass
            if not driver.process.is_alive():
                return replace(cell, outcome="lost", detail=_error(driver))
            driver.kill()
            driver = self._driver(run, last, run=drive_batch)
            ended = driver.wait(2 * len(self.stages) * _SECONDS)
            wrong = [self._difference(run / "tasks" / task, last) for task in TASKS] if ended else [_error(driver)]
            detail = "; ".join(filter(None, wrong))
        outcome = "lost" if not ended else "changed" if detail else "survived"
        return replace(cell, outcome=outcome, seconds=round(time.monotonic() - begin, 1), detail=detail)

    def chaos(self, last: str, every_s: float, seed: int) -> Cell:
        """A run up to a stage while something random is killed or stopped every so many seconds; a driver that ended is started
        again."""
        random_numbers, begin = random.Random(seed), time.monotonic()
        hit: list[str] = []
        with self._place("chaos") as run:
            driver = self._driver(run, last)
            while time.monotonic() < begin + len(self.stages) * _SECONDS:
                for _ in driver.poll(every_s):
                    pass
                if not driver.process.is_alive() and driver.process.exitcode == 0:
                    break
                if driver.process.is_alive():
                    kind = random_numbers.choice(_IN_CHAOS)
                    hit.append(f"{kind} {self._disturb(kind, driver, run, random_numbers) or '(none there)'}")
                    if kind == "node":
                        self.nodes.add()
                if not driver.process.is_alive():
                    driver = self._driver(run, last)
            ended = driver.wait(0)
            detail = self._difference(run, last) if ended else _error(driver)
        outcome = "lost" if not ended else "changed" if detail else "survived"
        cell = Cell("all", "chaos", 0.0, outcome, f"{len(hit)} times", seconds=round(time.monotonic() - begin, 1))
        return replace(cell, notes=tuple(hit), detail=detail)

    def faulty_store(self, last: str, share: float, seed: int) -> Cell:
        """A run up to a stage on an S3 server that answers a ``share`` of its requests late, with 503, or cut off halfway; its
        files are fetched and compared."""
        begin = time.monotonic()
        with self._place("store") as run, s3_server() as port, faulty_store(port, share, seed=seed) as faulty:
            driver = self._driver(run, last, run_dir=uri(faulty.port, "faulty/run"))
            ended = driver.wait(2 * len(self.stages) * _SECONDS)
            if ended:
                fetch(RunDirectory(uri(port, "faulty/run")), run)
            detail = self._difference(run, last) if ended else _error(driver)
            faults = faulty.counts()
        outcome = "lost" if not ended else "changed" if detail else "survived"
        cell = Cell("all", "store", 0.0, outcome, f"{sum(faults.values())} requests")
        notes = tuple(f"{kind} {count} times" for kind, count in faults.items())
        return replace(cell, seconds=round(time.monotonic() - begin, 1), notes=notes, detail=detail)

    def _difference(self, run: Path, stage: str) -> str:
        """The first file, of this stage and those before it, that is not as in the undisturbed run; empty where all are."""
        for name in self.stages[: self.stages.index(stage) + 1]:
            if not self.outputs[name]:
                ours, theirs = (json.loads((r / "metrics.json").read_text())["evaluation"] for r in (run, self.calm))
                if ours != theirs:
                    return "metrics.json: evaluation"
            for output in self.outputs[name]:
                folders = [r / output for r in (run, self.calm)]
                ours, theirs = (
                    {str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} - {CARD} for f in folders
                )  # a card names its run
                if ours != theirs:
                    return f"{output}: {', '.join(sorted(ours ^ theirs)[:5])}"
                for file in sorted(ours):
                    if not _alike(folders[0] / file, folders[1] / file):
                        return f"{output}/{file}"
        return ""

    def _files(self, run: Path, stage: str) -> dict[Path, int]:
        """The pieces of work that a stage has finished, where they are files: each with its inode."""
        paths = [path for output in self.outputs[stage] for path in (run / output).rglob("*")]
        files = [path for path in paths if path.suffix in (".arrow", ".safetensors")]
        return {path.relative_to(run): path.stat().st_ino for path in files if not path.name.startswith(".")}


def _error(driver: Driver) -> str:
    """Why a driver did not end well."""
    return str((driver.find("error") or {}).get("text", f"exit code {driver.process.exitcode}"))


def _resize(place: Path, size: int) -> bool:
    """Gives a tmpfs another size; whether it holds no more than that."""
    return subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=False).returncode == 0


def _fill(place: Path) -> None:
    """Makes a tmpfs as large as what it holds, to which others are adding."""
    while not _resize(place, shutil.disk_usage(place).used):
        pass


def _alike(ours: Path, theirs: Path) -> bool:
    """Whether two files are the same, but for where an adapter says that its base model lies."""
    if ours.name != "adapter_config.json":
        return filecmp.cmp(ours, theirs, shallow=False)
    values = [json.loads(file.read_text()) for file in (ours, theirs)]
    return bool(values[0] == {**values[1], "base_model_name_or_path": values[0]["base_model_name_or_path"]})


def _written_again(before: dict[Path, int], run: Path) -> int:
    return sum(not (run / path).is_file() or (run / path).stat().st_ino != inode for path, inode in before.items())
