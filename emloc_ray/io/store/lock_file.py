"""Who holds a run in a file system: a lock of the operating system on a file that names its holder.

Where the lock is lost, or somebody removes the file, two processes may each take the run for theirs: so whom it names is
compared before every write in the run, by its workers too.
"""

import contextlib
import fcntl
import os
import re
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from emloc_ray.errors import ConfigError, TakenOver
from emloc_ray.io.store.turns import HELD, own_name

NAME = ".lock"
PATIENCE_S = 1.0  # who asks whether a run is held has its lock for a moment
_TOKEN = uuid.uuid4().hex  # of this process: it may give a run back and take it again
_FILE_S = 0.05
_WORKER = "RAY_RAYLET_PID"  # which Ray gives to workers
_LEFT = "emloc_ray"  # where Ray keeps the tokens of a job's processes that hold runs
_NAMED = re.compile(r"[^\n]+\n[0-9a-f]{32}\n")  # a holder's name and its token
_known: dict[Path, str] = {}


class LockFile:
    """The lock of the run at ``root``; the operating system gives it back where this process ends, however it ends."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / NAME
        self._descriptor: int | None = None
        self._taker = 0

    def take(self) -> None:
        """Raises ConfigError where another process holds it, and says which; where its file system gives no locks."""
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            until = time.monotonic() + PATIENCE_S
            while not self._flock(descriptor, fcntl.LOCK_EX):
                if time.monotonic() > until:
                    name = _holder(os.read(descriptor, 400)) or "another process"
                    raise ConfigError(
                        f"run_dir {self.root} is in use by {name}: wait for it, or name another; where its machine is gone for"
                        f" good, remove {self.path}."
                    )
                time.sleep(_FILE_S)
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{own_name()}\n{_TOKEN}\n".encode(), 0)
            os.fsync(descriptor)  # on NFS other nodes see it from now on
            _known[self.root] = _content(self.path)
        except BaseException:  # else this process holds it on, and can never take it again
            _release(descriptor)
            raise
        self._descriptor, self._taker = descriptor, os.getpid()

    def holder(self) -> str | None:
        """The process that holds it now, or None."""
        try:
            with self.path.open("rb") as file:
                free = self._flock(file.fileno(), fcntl.LOCK_SH)
                return None if free else _holder(file.read()) or "another process"
        except (FileNotFoundError, NotADirectoryError):
            return None

    def give_back(self) -> None:
        """Lets others take it; in a process that was forked from its holder, leaves it to that."""
        if self._descriptor is not None:
            if os.getpid() == self._taker:
                _release(self._descriptor)
            else:
                os.close(self._descriptor)
            self._descriptor = None
            _known.pop(self.root, None)

    def _flock(self, descriptor: int, kind: int) -> bool:
        """Whether the lock was free; raises ConfigError where the file system has none."""
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                return False
            raise ConfigError(
                f"run_dir {self.root} is on a file system that gives no locks ({error.strerror}): have it mounted with"
                " them (Lustre: -o flock; NFS 3: with lockd running and without nolock), or name another place."
            ) from error
        return True


def _release(descriptor: int) -> None:
    """Unlocks before it closes: processes that were forked meanwhile share the lock, and closing alone leaves it to them."""
    with contextlib.suppress(OSError):  # a file system that gives no locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def tell_workers() -> None:
    """Leaves with Ray, to which this process is connected, its name in the locks that it takes: so its job's workers know it
    from their first write on, whoever started Ray."""
    ray = sys.modules["ray"]
    put = ray.experimental.internal_kv._internal_kv_put  # noqa: SLF001  the driver's side of a Ray Client has no other
    put(f"{_job(ray)}{_TOKEN}", b"", namespace=_LEFT)


def _is_ours(lock: str) -> bool:
    """Whether a lock names a process of this worker's job that told its workers; True where none did."""
    ray = sys.modules.get("ray")  # which io does without elsewhere
    if ray is None or not ray.is_initialized():
        return True
    job, names = _job(ray), ray.experimental.internal_kv._internal_kv_list  # noqa: SLF001  see above
    left = names(job, namespace=_LEFT)
    return not left or any(name.decode().removeprefix(job) in lock for name in left)


def _job(ray: Any) -> str:
    return f"{ray.get_runtime_context().get_job_id()} "


def check_lock(path: Path) -> None:
    """Raises TakenOver where the run that holds ``path`` has another lock than the one known here: none, or one that names
    another process. One of the same process is the same lock, though the run was removed and made anew.

    A process knows the lock that it took. A worker of Ray's knows that of the process that began it, or, where it was not told
    that, the one at its first write.
    """
    for root in path.parents:
        try:
            now = _content(root / NAME)
        except OSError as error:
            if root not in _known:
                continue  # there is none, or another program's
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                break
            raise
        if root not in _known and not _NAMED.fullmatch(now):
            continue  # another program's
        # Others than workers may write reports whoever holds the run.
        if _WORKER in os.environ and root not in _known and _is_ours(now):
            _known[root] = now
        if _known.get(root, None if _WORKER in os.environ else now) != now:
            break
        return
    else:
        return
    raise TakenOver(f"{root} was taken over by another process: leave it to that, or stop that first.")


def _content(path: Path) -> str:
    with path.open(errors="replace") as file:
        return file.read(400)


def _holder(content: bytes) -> str:
    return content.decode(errors="replace").partition("\n")[0].strip()
