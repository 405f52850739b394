"""Compares the versions that a run's stages were made with to those installed: work of other versions is neither mixed in
nor redone unasked."""

import functools
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from emloc_ray.config.steps import VERBS
from emloc_ray.errors import ConfigError
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.order import STEPS, up_to
from emloc_ray.stages.stage import Stage
from emloc_ray.text import version_changes

Versions = Mapping[str, Any]
_PACKAGES = ("emloc-ray", "torch", "transformers", "peft", "tokenizers")


@functools.cache
def installed() -> dict[str, str]:
    """The versions, ``major.minor``, of the packages that a stage's outputs depend on."""
    return {package: ".".join(version(package).split(".")[:2]) for package in _PACKAGES}


def made_with(stage: Stage) -> dict[str, Any]:
    """The versions that a stage made now records: :func:`installed`, and the ``format`` of what it writes."""
    return {"format": stage.format, **installed()}


def is_foreign(entry: Mapping[str, Any], stage: Stage) -> bool:
    """Whether a finished stage was made with other versions, and not accepted under the present ones."""
    return made_with(stage) not in (entry.get("versions"), entry.get("accepted"))


def check_versions(
    prepared: Prepared,
    forced: Collection[str] = (),
    until: str = VERBS[-1],
    accept: bool = False,
    in_batch: bool = False,
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Raises ConfigError where a stage up to the verb ``until`` was finished or begun with other versions, unless it is
    ``forced``, which redoes it; with ``accept`` only where these versions write another format. ``manifest``: by default the
    run's as it is now."""
    manifest = {"stages": prepared.run.stages(), "begun": prepared.run.begun()} if manifest is None else manifest
    done, begun = manifest["stages"], manifest.get("begun", {})
    kept = [stage for stage in up_to(until) if stage.name not in forced and stage.wanted(prepared)]
    foreign: dict[Stage, Any] = {}
    for stage in kept:
        if stage.name in done and is_foreign(done[stage.name], stage):
            foreign[stage] = done[stage.name].get("versions")
        elif stage.name not in done and is_begun_by_others(stage, begun):
            foreign[stage] = begun[stage.name]
    unreadable = [stage for stage, then in foreign.items() if (then or {}).get("format", 1) != stage.format]
    if not foreign or (accept and not unreadable):
        return
    first = next(iter(foreign))
    names = ", ".join(stage.name for stage in foreign)
    one = len(foreign) == 1
    kinds = dict.fromkeys(version_changes(then, made_with(stage)) for stage, then in foreign.items())
    keep = "" if unreadable else f"give --accept-versions to take {'it as it is' if one else 'them as they are'}, or "
    raise ConfigError(
        f"{'' if in_batch else f'run_dir {prepared.run.place}: '}{names} {'was' if one else 'were'} made with"
        f" {'; '.join(kinds)}: {keep}{_redo(first, [*done, *begun], in_batch)}."
    )


def is_begun_by_others(stage: Stage, begun: Mapping[str, Versions]) -> bool:
    """Whether a killed try, which the next one would resume, ran with other versions."""
    continues = stage.resumes or bool(stage.scratch)
    return continues and stage.name in begun and begun[stage.name] != made_with(stage)


def _redo(first: Stage, names: Collection[str], in_batch: bool) -> str:
    """What redoes ``first`` and the stages ``names`` after it."""
    if in_batch:
        return "name a new run_dir, which redoes all"
    verb = first.verb if first.redone_by_from else None
    redone = [
        stage.name for stage in STEPS if stage.name in names and (verb is None or stage.name in redone_from(verb))
    ]
    return f"{'--fresh' if verb is None else f'emloc-ray run with --from {verb}'} to redo {', '.join(redone)}"


def redone_from(begin: str | None) -> tuple[str, ...]:
    """The stages that ``begin`` redoes: all from the verb's first one on, without the import and the data."""
    if begin is None:
        return ()
    names = [stage.name for stage in STEPS if stage.redone_by_from]
    first = next(stage.name for stage in STEPS if stage.verb == begin and stage.redone_by_from)
    return tuple(names[names.index(first) :])
