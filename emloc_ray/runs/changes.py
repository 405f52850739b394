"""What a changed config or changed files would redo or remove of a run's finished stages: the user is asked first."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from emloc_ray.stages.correct.stage import CORRECT
from emloc_ray.stages.finetune.stage import FINETUNE
from emloc_ray.stages.finish import FINISH
from emloc_ray.stages.importing import IMPORT, original_dir
from emloc_ray.stages.order import STEPS, up_to
from emloc_ray.stages.stage import Stage
from emloc_ray.stages.tokens.stage import DATA
from emloc_ray.text import listed

Accept = bool | Callable[[Sequence[str]], bool]
"""Whether what is finished may be redone or removed; or who is asked, with a sentence for each run."""
_MOST = 6  # keys that a sentence names
_READ_FOR_INPUTS = (IMPORT, DATA, FINETUNE, CORRECT, FINISH)  # whose files are in the inputs of later stages


def find_changes(prepared: Prepared, forced: Collection[str] = (), until: str = VERBS[-1]) -> str | None:
    """Names the up-to-date stages that a run up to the verb ``until`` would redo, remove or leave out of date, and the changed
    keys, as a sentence without its end; None where there are none.

    The stages in ``forced`` are redone on request. Stages behind one that is missing are no longer up to date; those behind one
    whose files are damaged are, as long as their inputs stay the same.
    """
    if MANIFEST not in prepared.run.names():
        return None
    manifest = prepared.run.manifest()
    older = older_stages(manifest)
    kept = {name: entry for name, entry in manifest["stages"].items() if name not in older}
    steps = up_to(until)
    removed = [s for s in steps if s.name in kept and s.name not in forced and not s.wanted(prepared)]
    outdated, keys = _first_outdated(prepared, manifest, kept, forced), changed_keys(prepared, manifest)
    edited = None
    if outdated is not None and not keys:
        outdated, edited = _edited(prepared.run, kept, outdated)
    following = STEPS[STEPS.index(outdated) :] if outdated is not None else ()
    later = [stage for stage in following if stage.name in manifest["stages"] and stage.wanted(prepared)]
    redone = [stage for stage in later if stage in steps]
    if not later and not removed:
        return None
    named = [f"{key} {new} (was {old})" for key, (old, new) in keys.items()]
    rest = f" and {len(named) - _MOST} more" if len(named) > _MOST else ""
    what = f"the config has {', '.join(named[:_MOST])}{rest}" if named else "files of the model or the data changed"
    what = what if edited is None else edited
    does = []
    if redone:
        first, *others = (stage.name for stage in redone)
        does.append(f"redoes {first}" + (f", and of {', '.join(others)} what follows from it" if others else ""))
    if len(redone) < len(later):
        does.append(f"makes {', '.join(stage.name for stage in later[len(redone) :])} out of date")
    if removed:
        does.append(f"removes {', '.join(stage.name for stage in removed)}")
    folders = ", ".join(f"{folder}/" for folder in _folders(prepared.run, [*redone, *removed]))
    unchanged = [stage.name for stage in steps if stage not in (*following, *removed) and stage.name not in forced]
    sentence = f"{what}: that {' and '.join(does)}" + (f" (in {folders})" if folders else "")
    return "; ".join([sentence, *_made_again(prepared.run, {name: kept[name] for name in unchanged if name in kept})])


def outdated_stage(prepared: Prepared) -> str | None:
    """The first finished stage that a run up to the last verb would make of other inputs now; None where there is none."""
    if MANIFEST not in prepared.run.names():
        return None
    manifest = prepared.run.manifest()
    stage = _first_outdated(prepared, manifest, manifest["stages"])
    return None if stage is None else stage.name


def is_finished(prepared: Prepared, left: Collection[str], until: str = VERBS[-1]) -> bool:
    """Whether a run up to the verb ``until`` has no stage ``left`` to make (:func:`unfinished`) and none to remove: it needs no
    Ray."""
    kept = prepared.run.stages()
    return not any(stage.name in (left if stage.wanted(prepared) else kept) for stage in up_to(until))


def unfinished(prepared: Prepared, forced: Collection[str] = (), until: str = VERBS[-1]) -> set[str]:
    """The stages up to the verb ``until`` that a run would make: those that are not finished, are ``forced``, have other inputs
    now or damaged files; and those that the config leaves out."""
    names = {stage.name for stage in up_to(until)}
    if not prepared.run.stages():
        return names
    manifest = prepared.run.manifest()
    steps = [stage for stage in up_to(until) if stage.wanted(prepared)]
    return names - {
        stage.name for stage, _, whole in _judged(prepared, steps, manifest, manifest["stages"], forced) if whole
    }


def _first_outdated(
    prepared: Prepared, manifest: Mapping[str, Any], done: Mapping[str, Any], forced: Collection[str] = ()
) -> Stage | None:
    """The first stage that is ``done`` and has other inputs now, or that is new before one that is."""
    steps = [stage for stage in STEPS if stage.wanted(prepared)]
    last = max((number for number, stage in enumerate(steps, 1) if stage.name in done), default=0)
    judged = _judged(prepared, steps[:last], manifest, done, forced)
    return next((stage for stage, same, _ in judged if not same), None)


def _edited(run: RunDirectory, kept: Collection[str], outdated: Stage) -> tuple[Stage, str | None]:
    """The stage, before the ``outdated`` one, of a file that is not as it was written, which is redone then, and a clause on it;
    the outdated one itself where all are. Only those are read whose content later stages go by."""
    for stage in STEPS[: STEPS.index(outdated)]:
        if stage in _READ_FOR_INPUTS and stage is not IMPORT and stage.name in kept:
            for file in run.damaged(stage.name):
                return stage, f"{file.relative_to(run.root).as_posix()} is not what {stage.name} wrote"
    return outdated, None


def _made_again(run: RunDirectory, entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A clause on each finished stage that stands but for files that are gone or of another size."""
    for name, entry in entries.items():
        if files := [file.relative_to(run.root).as_posix() for file in run.altered(entry)]:
            yield f"{name} makes {listed(files, 1)} again, missing or altered"


def _judged(
    prepared: Prepared,
    steps: Sequence[Stage],
    manifest: Mapping[str, Any],
    done: Mapping[str, Any],
    forced: Collection[str],
) -> Iterator[tuple[Stage, bool, bool]]:
    """Each step, with whether it was ``done`` from the inputs that it has now, or is ``forced``; and whether it stands: its files
    are whole too, and it is not forced.

    Behind the first with other inputs none has the same. Behind files that are gone and in the inputs of later stages, these are
    the same where the config is.
    """
    context = Context(prepared, original_dir(prepared))
    rest: bool | None = None  # whether all that follow stand, once their inputs cannot be known
    for stage in steps:
        entry, same, is_whole = done.get(stage.name), bool(rest), bool(rest)
        if entry is None:
            same = is_whole = False
        elif rest is None:
            context.made[stage.name] = key = fingerprint(stage.inputs(context))
            context.results[stage.name] = entry["result"]
            same = entry["inputs"] == key
            is_whole = same and prepared.run.is_done(stage.name, key)
        if not same:
            rest = False
        elif rest is None and not is_whole and stage in _READ_FOR_INPUTS:
            rest = not changed_keys(prepared, manifest)
        yield stage, same or stage.name in forced, is_whole and stage.name not in forced


def changed_keys(prepared: Prepared, manifest: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The keys of the config that are others than in the manifest, each with its value there and now."""
    config = (prepared.written_config or prepared.config).model_dump(mode="json")
    return _changed_keys(manifest["config"], without_secrets(config))


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
