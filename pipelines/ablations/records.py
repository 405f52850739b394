"""The results of an ablation's cells: a record each, with the share of the gap that it closed, and what is published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablations.cell_figures import Cells
from ablations.cells import Ablation, Cell
from ablations.config import RATIO

Record = dict[str, Any]
MISSING = "missing"


def gap_closed(original: float, loss: float, upper_bound: float) -> float | None:
    """``(original − loss) / (original − upper bound)``, losses on the same held-out tokens; None where the bound gained
    nothing: there is no gap."""
    gap = original - upper_bound
    return (original - loss) / gap if gap > 0 else None


def collect(ablation: Ablation, cells: Cells, failed: Mapping[str, str]) -> list[Record]:
    """A record for each cell and each correction that was asked for, those that are missing too, each with the reason.

    Gaps are the upper bound's, that of a method with another, smaller model too: its ``losses`` are of its own model.
    """
    records = [record for cell in ablation.cells for record in _records(ablation, cells, cell, failed)]
    bounds = {
        (record["dataset"], record["seed"]): record["losses"]
        for record in records
        if record["method"] == ablation.config.upper_bound and record["loss"] is not None
    }
    for record in records:
        losses = bounds.get((record["dataset"], record["seed"]), {})
        original, bound = losses.get("original"), losses.get("corrected")
        record["upper_bound_loss"] = bound
        named = {"gap_closed": record["loss"], "gap_closed_by_emulator": record["losses"].get("emulator_adapter")}
        named["gap_closed_uncorrected"] = record["losses"].get("uncorrected")
        for key, loss in named.items():
            is_known = bound is not None and original is not None and loss is not None
            record[key] = gap_closed(original, loss, bound) if is_known else None
    return records


def _records(ablation: Ablation, cells: Cells, cell: Cell, failed: Mapping[str, str]) -> Iterator[Record]:
    figures, measured = cells.read(cell), cells.measured(cell)
    reason = failed.get(cell.name, "not run yet, or broken off: the same command does it")
    losses = dict(figures["losses"]) if figures else {}
    if cell.prune is not None and figures is not None:
        # Its run's original was the pruned model, and its emulator that in fewer bits, where it has any.
        own = {"emulator": losses["original"], "emulator_adapter": losses["emulator_adapter"]}
        losses = (
            own if measured is None else {**own, "original": measured["original"], "corrected": measured["recovered"]}
        )
    whole = {key: value for key, value in (figures or {}).items() if key not in ("run_dir", "losses")}
    if cell.start is not None and figures is not None:
        # Its run began at zero.
        own = {key: value for key, value in losses.items() if key in ("original", "emulator")}
        began = dict(measured or {})
        whole["training"] = {**whole["training"], "wall_s": began.pop("training_s", None)}
        losses = {**own, **began}
    yield {
        **_about(cell, cell.config.correction.method if cell.compresses else None),
        **_standing(losses, reason),
        **whole,
    }
    for name in ablation.config.corrections if cell.compresses else ():
        others = {key: value for key, value in losses.items() if key not in ("corrected", "finished", "merged")}
        if measured is not None:
            others["corrected"] = measured[name]
        why = reason if measured is None else "the model so corrected has a loss that is no number"
        correction = ablation.config.corrections[name]
        chosen = {"chosen_correction": correction.model_dump()} if figures else {}
        yield {**_about(cell, name), **_standing(others, why), **whole, **chosen}


def _about(cell: Cell, correction: str | None) -> Record:
    """What tells a record from others; None where that makes no difference to it."""
    calibrated = cell.compresses or cell.start is not None or cell.prune == "structured"
    return {
        "cell": cell.name,
        "dataset": cell.dataset,
        "method": cell.method,
        "seed": cell.seed,
        "ratio": None if cell.config.emulator.budget else cell.config.emulator.compression_ratio,
        "calibration": cell.calibration if calibrated else None,
        "correction": correction,
        "settings": cell.point,
    }


def _standing(losses: dict[str, float], reason: str) -> Record:
    """A cell's loss is that of the adapter it ends with: finished on the original where it has exact steps, else corrected."""
    loss = losses.get("finished", losses.get("corrected"))
    state = {"status": MISSING, "reason": reason} if loss is None else {"status": "done"}
    return {**state, "loss": loss, "losses": losses}


def published(ablation: Ablation, cells: Cells, records: Sequence[Record], rows: Sequence[Record]) -> dict[str, Any]:
    """Numbers, config and versions, and the ``cells`` as they were measured; no paths, nothing of the machine."""
    bound = ablation.bound.config
    source = bound.model.source
    base = bound.model_dump(mode="json", include={"calibration", "finetune", "correction", "evaluation"})
    base["data"] = {"max_seq_length": bound.data.max_seq_length}
    base["model"] = source.rsplit("/", 1)[-1]
    versions = {key: sorted({r["versions"][key] for r in records if "versions" in r}) for key in _libraries(records)}
    kept = (
        "dataset", "method", "seed", "ratio", "calibration", "correction", "settings", "status", "loss", "losses",
        "gap_closed", "gap_closed_uncorrected", "gap_closed_by_emulator", "chosen_correction", "bits_per_weight",
    )  # fmt: skip
    return {
        "kind": "ablation",
        "config": asked(ablation),
        "overrides": dict(ablation.overrides),
        "base": base,
        "versions": versions,
        "rows": list(rows),
        "records": [{key: record[key] for key in kept if key in record} for record in records],
        "cells": cells.known(),
    }


def asked(ablation: Ablation) -> dict[str, Any]:
    """What an ablation's file asks for, but for where and with how much of a machine; keys that methods have had since the
    first results, where they are set."""
    places = {"base", "run_dir", "shared", "limits", "cache", "max_concurrent"}
    values = ablation.config.model_dump(mode="json", exclude=places)
    methods = [{key: value for key, value in method.items() if key != "start" or value} for method in values["methods"]]
    return {**values, "methods": methods}


def _libraries(records: Sequence[Record]) -> list[str]:
    return sorted({name for record in records for name in record.get("versions", {})})


def label_keys(ablation: Ablation) -> list[str]:
    """The keys by which the rows of this ablation's table differ: the method, and what the file varies beside it."""
    config = ablation.config
    varied = [key for key, values in config.grid.items() if len(values) > 1]
    corrections = ["correction"] if config.corrections else []
    calibrations = ["calibration"] if len(config.calibrations) > 1 else []
    ratios = {cell.config.emulator.compression_ratio for cell in ablation.cells}
    ratio = [RATIO] if len(ratios) > 1 and RATIO not in varied else []
    return ["method", *ratio, *varied, *calibrations, *corrections]
