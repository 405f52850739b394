"""Calibration that stops early: Grams over an eighth, a quarter, a half and all of the data, until they hardly change."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import ray

from emloc_ray.io.grams import INDEX, GramStore, add_gram_files, write_gram_index
from emloc_ray.io.node_cache import discard, exists, sizes
from emloc_ray.stages.calibrate import calibrate, gather_again, unneeded
from emloc_ray.stages.calibration_job import CalibrationJob
from emloc_ray.stages.cluster import Progress, Resources, bounded, set_threads, silent
from emloc_ray.stages.failures import Losses, Tell, unheard
from emloc_ray.stages.thin_experts import clear_thin, describe, gather_thin, thin_names

_SHARES = (8, 4, 2, 1)  # of the shards, as divisors


def rounds(num_shards: int) -> list[tuple[int, int]]:
    """The shards ``[begin, end)`` of each round: together an eighth, a quarter, a half, all. No other property of the run
    enters, so that the Grams are the same on any cluster."""
    ends = sorted({-(-num_shards // share) for share in _SHARES})
    return list(zip([0, *ends], ends, strict=False))


def calibrate_until_converged(
    job: CalibrationJob,
    out_dir: Path,
    resources: Resources,
    tolerance: float,
    progress: Progress = silent,
    tell: Tell = unheard,
) -> dict[str, Any]:
    """As :func:`calibrate`, round by round, until a round changes no Gram by more than ``tolerance``.

    The change is :func:`emloc_ray.core.gram.relative_change`, a bound on that of the spectra. Every round is a
    calibration of its own shards, added to the total of those before. The result tells each round's largest change, of
    the Grams but those of experts that were sent too few tokens: these are seen to when it is over.
    """
    told: list[dict[str, Any]] = []
    before: Path | None = None
    for number, (begin, end) in enumerate(rounds(job.shards[1])):

        def passed_on(done: int, of: int, begin: int = begin, end: int = end) -> None:
            progress(begin * of + done * (end - begin), job.shards[1] * of)

        part, total = out_dir / f"round-{number + 1}", out_dir / f"total-{number + 1}"
        if not exists(total / INDEX):
            part.mkdir(parents=True, exist_ok=True)
            own = dataclasses.replace(job, shards=(begin, end), experts=())
            calibrate(own, part, resources, passed_on, tell=tell)
            _add(before, part, total, Losses("calibrate", tell))
        discard(part)
        for used in sizes(before) if before is not None else ():
            if used.suffix == ".safetensors":
                discard(used)  # its index stays, and says that this round is over
        index = GramStore(total).index
        thin = set(thin_names(job, index["num_tokens"]))
        changes = [change for name, change in index["changes"].items() if name not in thin]
        change = max(changes, default=0.0) if number else None
        told.append({"num_shards": end, "num_tokens": max(index["num_tokens"].values()), "change": change})
        before = total
        if change is not None and change <= tolerance:
            break
    store = GramStore(total)
    weight_map = {name: f"{total.name}/{file}" for name, file in store.index["weight_map"].items()}
    second = functools.partial(gather_again, resources, progress, Losses("calibrate", tell))
    seen = dataclasses.replace(job, shards=(0, end))
    (counts, weight_map), routed = gather_thin(seen, out_dir, (store.index["num_tokens"], weight_map), unneeded, second)
    write_gram_index(out_dir, job.groups, weight_map, counts, routed_tokens=routed)
    clear_thin(out_dir)
    return {
        "num_workers": min(resources.num_workers, job.shards[1]),
        "num_shards": end,
        "num_tokens": told[-1]["num_tokens"],
        "mode": job.mode,
        "waves": len(job.waves or (job.groups,)),
        "rounds": told,
        "converged": change is not None and change <= tolerance,
        **describe(job, counts, routed),
    }


def _add(before: Path | None, part: Path, total: Path, losses: Losses) -> None:
    """Writes the sum of two calibrations of the same groups, a file of Grams a task."""
    index = GramStore(part).index
    files = sorted(set(index["weight_map"].values()))
    task = Resources().task(_add_task)

    def submit(file: str) -> Any:
        named = task.options(name=f"calibrate: {total.name}, {file}")
        return named.remote(before and before / file, part / file, total / file)

    submits = [(f"the sum {file}", functools.partial(submit, file)) for file in files]
    results = bounded(submits, max(2, int(ray.cluster_resources().get("CPU", 1))), losses)
    counts = {name: count for found, _ in results for name, count in found.items()}
    changes = {name: change for _, found in results for name, change in found.items()}
    write_gram_index(total, list(index["groups"].values()), index["weight_map"], counts, changes)


def _add_task(before: Path | None, more: Path, target: Path) -> tuple[dict[str, int], dict[str, float]]:
    set_threads(1)
    return add_gram_files(before, more, target)
