"""Locks of files that name their holder. A long wait for another holder is reported, and bounded where that one gets nowhere."""

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
_POLL_S, _LONGEST_GAP_S = 0.1, 2.0
_log = logging.getLogger(__name__)


class Still:
    """For how long something has not moved, as seen by one who looks at it every second or more often; a longer gap counts as two
    seconds, for this process itself may have been stopped meanwhile."""

    def __init__(self, moves: object = None) -> None:
        self.seconds = 0.0
        self._moves, self._looked = moves, time.monotonic()

    def look(self, moves: object) -> float | None:
        """``moves`` is another value than before where it has moved: returns for how long it had not, else None."""
        now = time.monotonic()
        self.seconds += min(now - self._looked, _LONGEST_GAP_S)
        self._looked = now
        if moves == self._moves:
            return None
        stood, self._moves, self.seconds = self.seconds, moves, 0.0
        return stood


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
    holder: Callable[[], str],
    acquire: Callable[[], bool],
    what: str,
    patience_s: float,
    tell: Callable[[str], None] = _log.warning,
    look: Callable[[], None] = lambda: None,
) -> bool:
    """Waits until ``acquire()``, such as a :func:`try_lock`, is true; whether it is within ``patience_s``.

    ``tell`` hears after a minute whom it waits for and ``what`` that one does, such as "makes x in y", and at the end of the
    patience that it waits no longer. ``look`` is called between two tries; what it raises ends the wait.
    """
    begun, still, is_told = time.monotonic(), Still(), False
    while not acquire():
        look()
        still.look(None)
        if still.seconds > patience_s:
            minutes = f"{still.seconds / 60:.0f} minutes"
            tell(f"{holder()} {what}, and nothing came of it for {minutes}: done here too, without waiting any longer.")
            return False
        if time.monotonic() - begun > WORD_S and not is_told:
            tell(f"{holder()} {what}: waiting for that.")
            is_told = True
        time.sleep(_POLL_S)
    return True


def holder_of(file: IO[str]) -> str:
    """Who wrote its name into a file that :func:`try_lock` takes."""
    file.seek(0)
    return file.read(400).strip() or "Another process"
