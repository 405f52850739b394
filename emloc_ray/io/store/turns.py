"""Locks of files that name their holder. A long wait for another holder is reported, and bounded."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import IO

HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)  # NFS and others make flock of fcntl's locks
WORD_S = 60.0  # after which a wait is told
_POLL_S = 0.1
_log = logging.getLogger(__name__)


def own_name() -> str:
    """This process, as others name it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def try_lock(file: IO[str]) -> bool:
    """Takes the lock of a file that is open in mode "a+", and writes this process's name there; whether it was free. Raises
    OSError where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    file.truncate(0)
    file.write(own_name())
    file.flush()
    return True


def wait_for_turn(
    file: IO[str],
    acquire: Callable[[], bool],
    what: str,
    patience_s: float,
    tell: Callable[[str], None] = _log.warning,
    look: Callable[[], None] = lambda: None,
) -> bool:
    """Waits until ``acquire()``, a :func:`try_lock` of the file, is true; whether it is within ``patience_s``.

    ``tell`` hears after a minute whom it waits for and ``what`` that one does, such as "makes x in y", and at the end of the
    patience that it waits no longer. ``look`` is called between two tries; what it raises ends the wait.
    """
    begun, is_told = time.monotonic(), False
    while not acquire():
        look()
        waited = time.monotonic() - begun
        if waited > patience_s:
            tell(
                f"{_holder(file)} {what} for {waited / 60:.0f} minutes now: done here too, without waiting any longer."
            )
            return False
        if waited > WORD_S and not is_told:
            tell(f"{_holder(file)} {what}: waiting for that.")
            is_told = True
        time.sleep(_POLL_S)
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(400).strip() or "Another process"
