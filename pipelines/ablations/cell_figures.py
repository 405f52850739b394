"""The figures of an ablation's cells: a file each in ``cells/`` of its shared directory.

A file is named by a hash of all that its figures follow from, so that it can be had from another ablation, or from a published
result, that asked for the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablations.cells import Ablation, Cell
from ablations.datasets import split_files
from emloc_ray.config.schema import RunConfig
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.atomic import read_json, write_json
from emloc_ray.modeling.loading import content_of_source, resolve_source

# Stands for the code in every digest: set it to another word where the same inputs come to give other figures, so that none of
# the code before is taken for one of this. The first word was the package's version.
CODE = "0.1.0"

# What says where something is; the contents stand for it.
_SPLITS = {"train", "selection", "eval", "calibration", "healing"}
_PLACES: Any = {
    "run_dir": True,
    "ray": True,
    "data": {split: {"path"} for split in _SPLITS},
    "model": {"source", "revision"},
}


class Cells:
    """The figures of an ablation's cells, in the files of its directory."""

    def __init__(self, ablation: Ablation, contents: dict[tuple[str, int], dict[str, str]]) -> None:
        """``contents`` are the SHA-256 of the data sets' files, by name and seed."""
        self.ablation, self.contents = ablation, contents
        self._weights: dict[tuple[str, str | None], Any] = {}

    def digest(self, cell: Cell) -> str:
        """Of all that a cell's figures follow from; of keys that are later added to configs, where they are set."""
        asked = cell.config.model_dump(mode="json", exclude=_PLACES, exclude_defaults=True)
        asked["data"] = {key: value for key, value in asked["data"].items() if value != {}}
        if not cell.config.adapter.is_lora:  # what is not set is PEFT's default there, not LoRA's
            asked["adapter"] = cell.config.adapter.model_dump(mode="json")
        pruned = [cell.prune, self._aligned_on(cell)] if cell.align else cell.prune
        return fingerprint([asked, self._model(cell), self._rows(cell), pruned, CODE])

    def pruned_digest(self, cell: Cell) -> str:
        """Of all that a cell's pruned model follows from."""
        config, ratio = cell.config, cell.config.emulator.compression_ratio
        tokens = [config.data.max_seq_length, config.data.packing, self._rows(cell)["calibration"]]
        by_grams = [config.calibration.model_dump(mode="json"), *tokens] if cell.prune == "structured" else None
        inputs = [self._model(cell), config.model.dtype, cell.prune, ratio, cell.seed, by_grams]
        return fingerprint([*inputs, CODE])

    def aligned_digest(self, cell: Cell) -> str:
        """Of all that the aligning of a pruned model follows from."""
        return fingerprint([self._aligned_on(cell), cell.config.data.max_seq_length, CODE])

    def _model(self, cell: Cell) -> Any:
        """The commit of a model on the hub; of another a hash of its files, each read once."""
        asked = cell.config.model
        if (asked.source, asked.revision) not in self._weights:
            source = resolve_source(asked.source, asked.revision)
            commit = [source.hub_id, source.directory.name]
            digest = content_of_source(source) if source.hub_id is None else commit
            self._weights[asked.source, asked.revision] = digest
        return self._weights[asked.source, asked.revision]

    def _rows(self, cell: Cell) -> dict[str, str | None]:
        content = self.contents.get((cell.dataset, cell.seed), {})
        return {split: content.get(file) for split, file in split_files(cell.calibration, cell.heal_on).items()}

    def _aligned_on(self, cell: Cell) -> str | None:
        return self.contents.get((cell.dataset, cell.seed), {}).get(f"healing-{cell.align}")

    def path(self, cell: Cell) -> Path:
        """A cell's figures."""
        return self._file(self.digest(cell))

    def measured_path(self, cell: Cell) -> Path:
        """What was measured on its adapter afterwards."""
        corrections = {key: correction.model_dump() for key, correction in self.ablation.config.corrections.items()}
        asked = corrections if cell.prune is None else None
        return self._file(fingerprint([self.digest(cell), asked if cell.start is None else cell.start]))

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's figures, None where it is not done, or its adapter, yet to be measured, is there no more."""
        figures: dict[str, Any] | None = read_json(self.path(cell))
        if figures is None or not self._asks_more(cell) or self.measured(cell) is not None:
            return figures
        if "run_dir" not in figures:
            return None
        # Another ablation, or other overrides, may have trained something else in that directory since.
        scored = RunDirectory(figures["run_dir"]).metrics().get("evaluation", {})
        return figures if {variant: values["loss"] for variant, values in scored.items()} == figures["losses"] else None

    def measured(self, cell: Cell) -> dict[str, float] | None:
        """Losses of adapters that were made after the run, None where they are yet to be measured, or are of an adapter
        with other losses than the run's."""
        run, measured = read_json(self.path(cell)), read_json(self.measured_path(cell))
        return None if run is None or measured is None or measured["of"] != run["losses"] else dict(measured["losses"])

    def write(self, cell: Cell, figures: dict[str, Any]) -> None:
        """A cell is done."""
        write_json(self.path(cell), {"run_dir": cell.config.run_dir, **figures})

    def write_measured(self, cell: Cell, losses: dict[str, float]) -> None:
        """What was measured on the adapter of a cell that is done."""
        write_json(
            self.measured_path(cell), {"losses": losses, "of": json.loads(self.path(cell).read_text())["losses"]}
        )

    def known(self) -> dict[str, dict[str, Any]]:
        """All that is known, by the names of the files, without the places of the runs."""
        contents = {path.stem: read_json(path) for path in self._paths()}
        return {
            name: {key: value for key, value in content.items() if key != "run_dir"}
            for name, content in contents.items()
            if content is not None
        }

    def take(self, known: Mapping[str, dict[str, Any]]) -> int:
        """Takes what :meth:`known` gave elsewhere for the same inputs, where nothing is known here; returns how many files."""
        new = [path for path in self._paths() if path.stem in known and not path.exists()]
        for path in new:
            write_json(path, known[path.stem])
        return len(new)

    def _paths(self) -> list[Path]:
        own = [self.path(cell) for cell in self.ablation.cells]
        return own + [self.measured_path(cell) for cell in self.ablation.cells if self._asks_more(cell)]

    def run_of(self, cell: Cell) -> RunConfig:
        """The config of the run that a cell's figures are of, which may be another ablation's."""
        figures = self.read(cell)
        assert figures is not None
        return cell.config.model_copy(update={"run_dir": figures["run_dir"]})

    def is_to_be_measured(self, cell: Cell) -> bool:
        """Whether more than its run is asked of a cell, which is done, and was not measured yet."""
        return self._asks_more(cell) and self.read(cell) is not None and self.measured(cell) is None

    def _asks_more(self, cell: Cell) -> bool:
        if cell.prune is not None or cell.start is not None:
            return True
        return cell.compresses and bool(self.ablation.config.corrections)

    def _file(self, digest: str) -> Path:
        return self.ablation.shared / "cells" / f"{digest}.json"


def disagreeing(published: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[str]:
    """Those of some names of results, each with what :meth:`Cells.known` gave there, that have other losses than another one for
    the same inputs: some are of older code, and nothing says which."""
    names: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, held in published.items():
        for digest, content in held.items():
            names[digest][json.dumps(content["losses"], sort_keys=True)].add(name)
    split = [by_losses.values() for by_losses in names.values() if len(by_losses) > 1]
    return sorted({name for sides in split for side in sides for name in side})


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run's metrics: losses in nats a token, seconds, bytes."""
    usages, planned, correction = metrics["stages"], metrics["planned_memory"], metrics["correction"]
    training = {name: usages[name] for name in ("heal", "finetune", "finish") if name in usages}
    return {
        "losses": {variant: values["loss"] for variant, values in metrics["evaluation"].items()},
        "num_tokens": metrics["evaluation"]["original"]["num_tokens"],
        "chosen_correction": {key: correction[key] for key in ("method", "clamp", "strength")},
        "parameters_kept": metrics["emulator"]["parameters_kept"],
        "bits_per_weight": metrics["emulator"]["bits_per_weight"],
        "training": {
            # Healing that came from the cache says nothing of what it takes.
            "wall_s": None
            if any("taken_from" in u for u in training.values())
            else sum(u["wall_s"] for u in training.values()),
            # As planned: a measurement beside other runs on the machine includes them.
            "planned_bytes": max(planned[name] for name in training),
        },
        "inference_planned_bytes": planned["inference"],
        "wall_s": {name: usage["wall_s"] for name, usage in usages.items()},
        "versions": metrics["versions"],
    }
