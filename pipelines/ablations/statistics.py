"""Means over data sets and seeds, their spread, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from scipy import stats

Record = Mapping[str, Any]
_ROUNDING = 1e-6  # one adapter scored twice, alone and among others, differs by less


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Of those values that are there: ``mean``, ``sd`` (sample standard deviation), ``sem`` (standard error of the mean), the
    number ``n``; and how many are ``missing``."""
    there = [value for value in values if value is not None]
    counts = {"n": len(there), "missing": len(values) - len(there)}
    several = len(there) > 1
    return {
        **counts,
        "mean": float(np.mean(there)) if there else None,
        "sd": float(np.std(there, ddof=1)) if several else None,
        "sem": float(stats.sem(there)) if several else None,
    }


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, Any]:
    """The differences ``ours − theirs`` where both are there, and the two-sided p value of the paired t-test that their mean
    is 0; None where it has none, as of one pair."""
    both = [(our, their) for our, their in zip(ours, theirs, strict=True) if our is not None and their is not None]
    differences = [our - their if abs(our - their) > _ROUNDING else 0.0 for our, their in both]
    p = None
    if len(both) > 1 and np.std(differences) > 0:
        p = float(stats.ttest_1samp(differences, 0).pvalue)
    return {**spread(differences), "p": p if p is not None and math.isfinite(p) else None}


def label(record: Record, keys: Sequence[str]) -> dict[str, Any]:
    """What tells a record's row from the others."""
    of_record = {key: record[key] for key in ("method", "calibration", "correction")}
    known = {**record["settings"], "emulator.compression_ratio": record["ratio"], **of_record}
    return {key: known.get(key) for key in keys}


def summarize(
    records: Sequence[Record], keys: Sequence[str], compare_with: Mapping[str, Any], value: str = "gap_closed"
) -> list[dict[str, Any]]:
    """A row for each label: the spread of ``value`` over seeds in each data set and of its mean over all of these, the paired
    comparison with the row whose label is this one's but for ``compare_with``, and means of memory and time.

    What a seed gives, over several data sets, is one value, their mean: runs of one data set are alike, so that as many values
    as runs would make errors look smaller than they are. Errors are over seeds, of the data sets that are there. Pairs are of
    the same data set and seed.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(map(str, label(record, keys).values())), []).append(record)
    labels = {group: label(members[0], keys) for group, members in groups.items()}
    datasets = list(dict.fromkeys(record["dataset"] for record in records))
    alike = {"method", "calibration", "correction", *(key for record in records for key in record["settings"])}
    rows = []
    for group, members in groups.items():
        row: dict[str, Any] = {"label": labels[group]}
        row["datasets"] = {
            name: {"loss": spread(_values(members, "loss", name)), value: spread(_values(members, value, name))}
            for name in datasets
        }
        row["all"] = {
            key: spread(list(_by_seed(members, key).values()))
            for key in (value, "gap_closed_uncorrected", "gap_closed_by_emulator")
        }
        reference = _reference(labels, group, compare_with, alike)
        if reference is not None and reference != group:
            row["against"] = {"label": labels[reference], **_paired(members, groups[reference], value)}
        row["training_s"] = spread([_of(record, lambda r: r["training"]["wall_s"]) for record in members])
        row["training_bytes"] = spread([_of(record, lambda r: r["training"]["planned_bytes"]) for record in members])
        row["bits_per_weight"] = spread([record.get("bits_per_weight") for record in members])
        row["inference_bytes"] = spread([_of(record, lambda r: r["inference_planned_bytes"]) for record in members])
        rows.append(row)
    return rows


def _values(records: Sequence[Record], key: str, dataset: str) -> list[float | None]:
    return [record[key] for record in records if dataset == record["dataset"]]


def _by_seed(records: Sequence[Record], key: str) -> dict[int, float | None]:
    """Each seed's mean over its data sets; None where one of them is missing."""
    of_seed: dict[int, list[float | None]] = {}
    for record in records:
        of_seed.setdefault(record["seed"], []).append(record[key])
    return {seed: None if None in values else float(np.mean(values)) for seed, values in of_seed.items()}  # type: ignore[arg-type]


def _of(record: Record, get: Callable[[Record], float]) -> float | None:
    return get(record) if "training" in record else None


def _paired(ours: Sequence[Record], theirs: Sequence[Record], value: str) -> dict[str, Any]:
    our, their = _by_seed(ours, value), _by_seed(theirs, value)
    return paired(list(our.values()), [their.get(seed) for seed in our])


def _reference(
    labels: Mapping[tuple[Any, ...], dict[str, Any]],
    group: tuple[Any, ...],
    compare_with: Mapping[str, Any],
    alike: Set[str],
) -> tuple[Any, ...] | None:
    """The row to compare with: with the labels of ``compare_with``, and with this row's own in ``alike``, or none there."""
    if not compare_with:
        return None
    own = labels[group]
    exact = {**own, **compare_with}
    for candidate, label in labels.items():
        if all(label.get(key) == compare_with[key] for key in compare_with if key in label) and all(
            label[key] == exact[key] or label[key] is None or own[key] is None for key in alike & label.keys()
        ):
            return candidate
    return None
