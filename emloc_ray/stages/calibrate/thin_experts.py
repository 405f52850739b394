"""Experts that the router sent too few tokens to: their Grams are gathered anew, over all tokens of their block."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc_ray.io.store.node_cache import discard, local_only
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.calibrate.tokens_read import tokens_read

FOLDER = "reread"

Gathered = tuple[dict[str, int], dict[str, str]]  # tokens of every Gram, and the file of each that lies in one


def thin_names(job: CalibrationJob, counts: Mapping[str, int]) -> list[str]:
    """The Grams of experts' linears that have fewer tokens than ``job.min_expert_tokens``."""
    return [name for name, _ in job.experts if counts.get(name, job.min_expert_tokens) < job.min_expert_tokens]


def gather_for_thin_experts(
    job: CalibrationJob, out_dir: Path, first: Gathered, gather: Callable[[CalibrationJob, Path], Gathered]
) -> tuple[Gathered, dict[str, int]]:
    """Has ``gather`` run all tokens through the experts that saw too few, and takes those Grams instead.

    Where there are too few tokens even so, the Gram is the identity, over no token, in no file: what is left is the plain SVD.
    Nothing is gathered where the rows have too few. Returns the tokens and files of all Grams, and how many tokens the router had
    sent to those that were replaced.
    """
    counts, weight_map = first
    names = thin_names(job, counts)
    if not names:
        return first, {}
    recounted: dict[str, int] = dict.fromkeys(names, 0)
    files: dict[str, str] = {}
    if tokens_read(job, counts) >= job.min_expert_tokens:
        recounted, files = gather(_only(job, names), out_dir / FOLDER)
    still = {*thin_names(job, recounted)}
    replaced = {**recounted, **dict.fromkeys(still, 0)}
    placed = {name: file for name, file in weight_map.items() if name not in replaced}
    placed |= {name: f"{FOLDER}/{file}" for name, file in files.items() if name not in still}
    routed = {name: counts[name] for name in names}
    return ({**counts, **replaced}, placed), routed


def _only(job: CalibrationJob, names: Sequence[str]) -> CalibrationJob:
    """The job of the second pass, in waves that are no larger than the first one's."""
    wanted = set(names)
    groups = tuple(group for group in job.groups if group[0] in wanted)
    waves = tuple(tuple(group for group in wave if group[0] in wanted) for wave in job.waves or ())
    return dataclasses.replace(job, groups=groups, waves=tuple(filter(None, waves)) or None, reread=True)


def clear_thin(out_dir: Path) -> None:
    """Removes what a second pass needs no longer."""
    discard(out_dir / FOLDER / "slots")
    discard(local_only(out_dir / FOLDER) / "hidden")


def describe(job: CalibrationJob, counts: Mapping[str, int], routed: Mapping[str, int]) -> dict[str, Any]:
    """In numbers, for the stage's result: how many experts there are, how many saw too few tokens and what was done; empty for
    a model without. ``counts`` are the tokens of the Grams as they are now, ``routed`` those of the Grams that were replaced."""
    if not job.experts:
        return {}
    sent = {name: routed.get(name, counts[name]) for name, _ in job.experts}
    return {
        "experts": {
            "number": len(_owners(sent)),
            "min_expert_tokens": job.min_expert_tokens,
            "fewest_routed_tokens": min(sent.values()),
            "too_few": len(_owners(routed)),
            "never_routed": len(_owners(name for name, count in sent.items() if count == 0)),
            "plain_svd": len(_owners(name for name in routed if counts[name] == 0)),
            "reread_tokens": max((counts[name] for name in routed), default=0),
        }
    }


def _owners(names: Any) -> set[str]:
    return {name.rpartition(".")[0] for name in names}
