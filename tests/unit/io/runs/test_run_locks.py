"""A run directory's lock, between processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

import emloc_ray
from emloc_ray.errors import ConfigError, TakenOver
from emloc_ray.io.formats.json_lines import append_object
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store import lock_file
from emloc_ray.io.store.atomic import write_json
from emloc_ray.io.store.digests import digest
from emloc_ray.io.store.node_cache import discard
from emloc_ray.io.store.transfer import transfer
from emloc_ray.stages.ray.session import connection

# The package's folders without their __init__, and no torch: importing those would cost seconds.
LOCK = """
import os, signal, sys, time, types
for name, path in (("emloc_ray", sys.argv[2]), ("emloc_ray.io", sys.argv[2] + "/io")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from emloc_ray.io.runs.directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.lock()
"""
HOLD = f"""
{LOCK}
print("locked", flush=True)
time.sleep(60)
"""
# A child that outlives the run, as a DataLoader's worker may; before it one that leaves the run as its parent does.
FORK = f"""
{LOCK}
if not (child := os.fork()):
    run.unlock()
    os._exit(0)
os.waitpid(child, 0)
held = run.holder() is not None
if not (child := os.fork()):
    time.sleep(60)
run.unlock()
print(held, run.holder(), flush=True)
os.kill(child, signal.SIGKILL)
"""


def test_one_process_at_a_time_until_it_ends_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_file, "PATIENCE_S", 0.05)
    directory = RunDirectory(tmp_path / "mine")
    command = [sys.executable, "-c", HOLD, str(directory.root), str(Path(emloc_ray.__file__).parent)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "locked"
        sentence = rf"in use by process {holder.pid} on .*; where its machine is gone for good, remove .*/\.lock\.$"
        with pytest.raises(ConfigError, match=sentence):
            directory.lock()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        directory.lock()
        directory.unlock()
    finally:
        holder.kill()
        holder.wait(10)


def test_processes_that_are_forked_neither_keep_a_run_nor_give_it_back(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path / "mine"), str(Path(emloc_ray.__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "True None\n"


def test_who_lost_its_lock_writes_nothing_more(tmp_path: Path) -> None:
    """As where a server of files lost the lock, or somebody removed the file."""
    run, file = RunDirectory(tmp_path / "mine"), tmp_path / "mine" / "emulator" / "a"
    run.lock()
    run.create({})
    run.write_metrics({"seed": 1})
    write_json(run.path("kept"), 1)
    made = tmp_path / "made"
    made.write_text("1")
    lock = tmp_path / "mine" / ".lock"
    content = lock.read_text()
    for taken in (lambda: lock.write_text(content.replace("process", "other process")), lock.unlink):
        taken()
        before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        for write in (
            lambda: run.write_metrics({"seed": 2}),
            lambda: run.commit("merge", "inputs", [], {}),
            lambda: write_json(file, 1),
            lambda: transfer(made, file, 1, digest(made)),
            lambda: append_object(file, {"step": 1}),
            lambda: discard(run.path("kept")),
        ):
            with pytest.raises(TakenOver, match=r"mine was taken over by another process: leave it to that, or stop"):
                write()
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
        assert run.metrics() == {"seed": 1}
    run.unlock()


@pytest.mark.parametrize("kind", ["a folder", "unreadable", "binary", "a link to itself"])
def test_a_lock_of_another_program_further_up_is_none_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lock, opened = tmp_path / ".lock", Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == lock:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    if kind == "a folder":
        lock.mkdir()
    elif kind == "a link to itself":
        lock.symlink_to(lock)
    else:
        lock.write_bytes(b"\xff\x00")
    if kind == "unreadable":
        monkeypatch.setattr(Path, "open", refused)
    write_json(tmp_path / "shared" / "a", 1)


def test_a_worker_writes_for_whom_it_wrote_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, file = tmp_path / "mine" / ".lock", tmp_path / "mine" / "slots" / "a"
    lock.parent.mkdir()
    lock.write_text(f"process 1 on here\n{1:032x}\n")
    write_json(file, 1)
    monkeypatch.setenv("RAY_RAYLET_PID", "1")
    write_json(file, 2)
    lock.write_text(f"process 2 on here\n{2:032x}\n")
    with pytest.raises(TakenOver):
        write_json(file, 3)
    assert (json.loads(file.read_text()), list(file.parent.iterdir())) == (2, [file])


def test_a_run_that_was_removed_and_made_anew_is_the_same_process_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers may serve it again."""
    lock, other = tmp_path / "mine" / ".lock", tmp_path / "other"
    lock.parent.mkdir()
    monkeypatch.setenv("RAY_RAYLET_PID", "1")
    for file in (lock, other):  # both there, so of two inodes
        file.write_text(f"process 1 on here\n{1:032x}\n")
    write_json(tmp_path / "mine" / "a", 1)
    other.replace(lock)
    write_json(tmp_path / "mine" / "a", 2)
    assert json.loads((tmp_path / "mine" / "a").read_text()) == 2


def test_a_worker_whose_first_write_comes_after_a_takeover_writes_nothing(ray_session: None, tmp_path: Path) -> None:
    """Also where the caller started Ray, as here. A lock file of another program, further up, is none of a run."""
    (tmp_path / ".lock").write_text("4711")
    run, taken = RunDirectory(tmp_path / "mine"), tmp_path / "taken"
    run.lock()
    taken.mkdir()
    (taken / ".lock").write_text(f"process 2 on here\n{2:032x}\n")
    write: Any = ray.remote(write_json)
    with connection():
        ray.get(write.remote(run.path("slots", "a"), 1))
        ray.get(write.remote(tmp_path / "elsewhere" / "a", 1))
        with pytest.raises(TakenOver, match=r"taken was taken over by another process: leave it to that, or stop"):
            ray.get(write.remote(taken / "a", 1))
    assert run.path("slots", "a").read_text().strip() == "1"
    assert [*taken.iterdir()] == [taken / ".lock"]
    run.unlock()


def test_a_look_at_who_holds_a_run_lets_it_start(tmp_path: Path) -> None:
    run, over = RunDirectory(tmp_path / "mine"), threading.Event()
    run.lock()
    run.unlock()

    def look() -> None:
        while not over.is_set():
            RunDirectory(tmp_path / "mine").holder()

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for _ in range(20):
        run.lock()
        run.unlock()
    over.set()
    for looker in lookers:
        looker.join()


def test_a_full_disk_while_the_lock_is_taken_leaves_it_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            RunDirectory(tmp_path).lock()
    again = RunDirectory(tmp_path)
    again.lock()
    again.unlock()


def test_unlocked_can_be_locked_again(tmp_path: Path) -> None:
    one, two = RunDirectory(tmp_path), RunDirectory(tmp_path)
    one.lock()
    with pytest.raises(ConfigError, match="in use by process"):
        two.lock()
    one.unlock()
    two.lock()
    two.unlock()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_not_taken_for_a_held_run(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "mine")
    run.create({"seed": 0})
    run.lock()
    run.unlock()

    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for ask in (run.lock, run.holder):
        with pytest.raises(ConfigError, match=r"gives no locks \(.*Lustre: -o flock"):
            ask()
