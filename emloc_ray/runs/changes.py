"""What a changed config or changed files would redo or remove of a run's finished stages: the user is asked first."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.config.steps import VERBS
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.secret_values import without_secrets
from emloc_ray.io.store.node_cache import sizes
from emloc_ray.io.store.object_store import MANIFEST
from emloc_ray.planning.prepared import Prepared
from emloc_ray.runs.status import older_stages
from emloc_ray.stages.context import Context
from emloc_ray.stages.importing import original_dir
from emloc_ray.stages.order import STEPS, up_to
from emloc_ray.stages.stage import Stage

Accept = bool | Callable[[Sequence[str]], bool]
"""Whether what is finished may be redone or removed; or who is asked, with a sentence for each run."""
_MOST = 6  # keys that a sentence names


def find_changes(prepared: Prepared, forced: Collection[str] = (), until: str = VERBS[-1]) -> str | None:
    """Names the up-to-date stages that a run up to the verb ``until`` would redo, remove or leave out of date, and the changed
    keys, as a sentence without its end; None where there are none.

    The stages in ``forced`` are redone on request. Stages behind one that is missing or damaged are no longer up to date.
    """
    if MANIFEST not in prepared.run.names():
        return None
    manifest = prepared.run.manifest()
    older = older_stages(manifest)
    kept = {name: entry for name, entry in manifest["stages"].items() if name not in older}
    steps = [stage for stage in up_to(until) if stage.name not in forced]
    removed = [stage for stage in steps if stage.name in kept and not stage.wanted(prepared)]
    outdated = _outdated(prepared, [stage for stage in steps if stage.wanted(prepared)], kept)
    following = STEPS[STEPS.index(outdated) :] if outdated is not None else ()
    later = [stage for stage in following if stage.name in manifest["stages"] and stage.wanted(prepared)]
    redone = [stage for stage in later if stage in up_to(until)]
    if not later and not removed:
        return None
    config = (prepared.written_config or prepared.config).model_dump(mode="json")
    keys = _changed_keys(manifest["config"], without_secrets(config))
    named = [f"{key} {new} (was {old})" for key, (old, new) in keys.items()]
    rest = f" and {len(named) - _MOST} more" if len(named) > _MOST else ""
    what = f"the config has {', '.join(named[:_MOST])}{rest}" if named else "files of the model or the data changed"
    does = []
    if redone:
        first, *others = (stage.name for stage in redone)
        does.append(f"redoes {first}" + (f", and of {', '.join(others)} what follows from it" if others else ""))
    if len(redone) < len(later):
        does.append(f"makes {', '.join(stage.name for stage in later[len(redone) :])} out of date")
    if removed:
        does.append(f"removes {', '.join(stage.name for stage in removed)}")
    folders = ", ".join(f"{folder}/" for folder in _folders(prepared.run, [*redone, *removed]))
    return f"{what}: that {' and '.join(does)}" + (f" (in {folders})" if folders else "")


def _outdated(prepared: Prepared, steps: Sequence[Stage], kept: Mapping[str, Any]) -> Stage | None:
    """The first stage that stands and has other inputs now, or that is new before one that stands."""
    last = max((number for number, stage in enumerate(steps, 1) if stage.name in kept), default=0)
    undone, is_damaged = _first_undone(prepared, steps[:last], kept)
    return None if is_damaged else undone


def is_finished(prepared: Prepared, forced: Collection[str] = (), until: str = VERBS[-1]) -> bool:
    """Whether a run up to the verb ``until`` has no stage left to make and none to remove: it needs no Ray."""
    kept = prepared.run.manifest()["stages"] if MANIFEST in prepared.run.names() else {}
    steps = [stage for stage in up_to(until) if stage.wanted(prepared)]
    if any(stage.name in kept for stage in up_to(until) if stage not in steps):
        return False
    return not any(stage.name in forced for stage in steps) and _first_undone(prepared, steps, kept)[0] is None


def _first_undone(prepared: Prepared, steps: Sequence[Stage], kept: Mapping[str, Any]) -> tuple[Stage | None, bool]:
    """The first stage that is new, has other inputs now or damaged files; and whether it has none but these."""
    context = Context(prepared, original_dir(prepared))
    for stage in steps:
        entry = kept.get(stage.name)
        if entry is None:
            return stage, False
        context.made[stage.name] = key = fingerprint(stage.inputs(context))
        if entry["inputs"] != key or not prepared.run.is_done(stage.name, key):
            return stage, entry["inputs"] == key
        context.results[stage.name] = entry["result"]
    return None, False


def _changed_keys(old: Any, new: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Every key that both configs have with other values, or one alone has with a value; each with both as text."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return {} if old == new else {path: (_text(old), _text(new))}
    changed: dict[str, tuple[str, str]] = {}
    for key in dict.fromkeys([*new, *old]):
        changed |= _changed_keys(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    changed.pop("run_dir", None)  # a run that was moved is the same
    return changed


def _text(value: Any) -> str:
    return "not set" if value is None else str(value)


def _folders(run: RunDirectory, stages: Collection[Stage]) -> list[str]:
    outputs = dict.fromkeys(output.partition("/")[0] for stage in stages for output in stage.outputs)
    return [folder for folder in outputs if sizes(Path(run.path(folder)))]


def check_accepted(sentences: Sequence[str], accept: Accept) -> None:
    """Raises ConfigError with the sentences, if any, unless the changes are accepted."""
    if not sentences or accept is True or (callable(accept) and accept(sentences)):
        return
    agree = "give --yes (in Python accept_changes=True) to agree, or name a new run_dir"
    raise ConfigError("\n".join(f"{sentence}: {agree}." for sentence in sentences))
