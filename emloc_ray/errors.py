"""What can go wrong, in one sentence each: what, where (file, row, layer, config key), what to do.

Every error is made of its message, so that it survives pickling through Ray.
"""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Of an OSError: a disk, or this user's share of it, is full."""


def refusal(error: OSError) -> str:
    """What the operating system refused, where, and what to do: a sentence without its stop."""
    if error.errno in FULL:
        where = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{where}: free some and run the same command again"
    what = f"{error.filename} cannot be read or written" if error.filename else "A file or a host cannot be reached"
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{what} ({why}): see to it, then run the same command again"


class EmlocError(Exception):
    """Base of every error that emloc_ray raises on purpose; ``str(error)`` is one plain sentence."""

    exit_code = 1


class ConfigError(EmlocError):
    """The call or the config is wrong: found before anything starts, nothing written."""

    exit_code = 2


class DataError(EmlocError):
    """A row, a field or a file of the user's data is wrong; names file and row."""


class NumericsError(EmlocError):
    """A NaN or Inf in weights, activations or loss; names the layer or the step."""


class ArtifactError(EmlocError):
    """A checkpoint, an adapter or a run's artifact is missing, cut short or altered; names the file."""


class DamagedArtifactError(ArtifactError):
    """A file of a run is not what its writer wrote; ``path`` names it from the run's directory on, "" where unknown."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (str(self), self.path)


class StageError(EmlocError):
    """A stage could not finish (a worker was lost for good, memory ran out); names the stage."""


class TakenOver(StageError):
    """Another process holds the run by now: what this one still writes would be mixed with that one's."""


class Stopped(EmlocError):
    """The task was cancelled, or its batch is being stopped."""
