"""One step of a run as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emloc_ray.config.base import StageConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.planning.costs import Costed
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.context import Context, Inputs, Result

if TYPE_CHECKING:
    from emloc_ray.stages.ray.tasks import Progress, Resources


@dataclass(frozen=True, kw_only=True)
class Stage(Costed):
    """A step of a run: what it is made from, what it writes, how it runs, what it costs, and what is said of it.

    ``title`` is its word on screens, ``verb`` the command that runs up to it, its own name unless another's.
    """

    title: str
    inputs: Callable[[Context], Inputs]
    """All that decides what comes out."""
    run: Callable[[Context, Inputs, Resources, Progress], Result]
    """Writes ``outputs``; imports what uses Ray when it is called."""
    format: int = 1
    """Raised with what it writes: what has another is made again, or the run refused."""
    verb: str = ""
    reads: Callable[[Context], Sequence[str]] = lambda context: ()
    """The stages whose files it reads that may have been dropped by now."""
    drops: Callable[[Context], Sequence[str]] = lambda context: ()
    """The stages whose files nothing needs once this one is recorded."""
    is_shared: Callable[[Context], bool] | None = None
    """Whether runs of equal ``inputs`` share its work through a cache; None: they never do."""
    resumes: bool = False
    """Whether what a killed try left in ``outputs`` is continued from."""
    redone_by_from: bool = True
    """Whether ``--from`` its verb makes it again."""
    summary: Callable[[Result], str] = lambda result: ""
    """Its one line when it has ended."""
    remarks: Callable[[Context, Result], Sequence[str | None]] = lambda context, result: ()
    """What a reader should know of its result."""
    note_if_left_out: Callable[[RunConfig], str | None] = lambda config: None
    """What a reader should know where the config leaves it out."""
    metrics: Callable[[Prepared, dict[str, Result]], dict[str, Any]] = lambda prepared, results: {}
    """Its part of ``metrics.json``, from the results of the stages that are done."""
    metrics_keys: tuple[str, ...] = ()
    """The keys of that part."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "verb", self.verb or self.name)


def metrics_of(section: str, stage: str, *keys: str) -> Callable[[Prepared, dict[str, Result]], dict[str, Any]]:
    """Makes a stage's ``metrics`` of one section: those of the ``keys`` that its result has."""
    return lambda prepared, results: {
        section: {key: results[stage][key] for key in keys if results[stage].get(key) is not None}
    }


def one_worker(section: StageConfig) -> StageConfig:
    """The section's worker, once."""
    return section.model_copy(update={"num_workers": 1})
