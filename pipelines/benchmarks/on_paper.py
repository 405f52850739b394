"""Every stage of 8 B and 70 B on 16 cores and on one H100, as ``emloc-ray plan`` counts it.

    PYTHONPATH=. python pipelines/benchmarks/on_paper.py

Then, of 70 B, what calibrating block by block holds and what correcting multiplies. cluster/README.md has all that this
prints.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.gpu.shapes import SHAPES, llama_config
from emloc_ray.config.reading import parse_config
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.architecture import LinearSpec, empty_model
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.planning.gpu_speeds import speed_of
from emloc_ray.planning.layout import Layout, layout_under, make_layout
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.sizes import gram_bytes
from emloc_ray.planning.skeleton import Skeleton, skeleton_of
from emloc_ray.stages.order import STEPS
from emloc_ray.text import duration

RATIO, R, LENGTH, ROWS = 0.5, 8, 512, 8  # of the emulator, the adapter, a row, a batch
CALIBRATED, STEPS_TRAINED, SCORED = 128, 1000, 256  # rows, steps, rows
SIZES = {"8 B": SHAPES["full"].model, "70 B": SHAPES["full"].large}

# A core: two AVX-512 units at 3 GHz are 192 GFLOPS in float32, of which products reach half. The H100 by its data sheet.
_H100 = speed_of("NVIDIA H100 80GB HBM3")
assert _H100 is not None
_ON_H100 = Speeds(96e9, _H100.flops, _H100.float32_flops, _H100.link, _H100.memory, disk=2e9)
MACHINES: dict[str, tuple[dict[str, Any], str, Speeds]] = {
    "16 cores": ({"cpus_per_worker": 16}, "512GiB", Speeds(96e9, disk=2e9)),
    "one H100": ({"gpus_per_worker": 1}, "72GiB", _ON_H100),
}


_SKELETONS: dict[
    tuple[str, str | None], Skeleton
] = {}  # by the model's config and attention: each takes longer than the plan


def bare_prepared(values: dict[str, Any], model_config: Any) -> Prepared:
    """A config on a model that has no files: enough to plan with."""
    config = parse_config(values)
    opened = model_config.to_json_string(), config.model.attn_implementation
    if opened not in _SKELETONS:
        _SKELETONS[opened] = skeleton_of(model_config, empty_model(model_config, attn_implementation=opened[1]))
    layout = make_layout(config, _SKELETONS[opened])
    place = RunDirectory(config.run_dir)
    return Prepared(config, place, ModelSource(Path()), model_config, layout, {}, host_bytes=float("inf"))


def whole_model(values: dict[str, Any], sizes: dict[str, int]) -> Prepared:
    """A run of a Llama of these sizes, of which one block alone is built."""
    bare = bare_prepared(values, llama_config({**sizes, "num_hidden_layers": 1}))
    layout = layout_under(deepened(bare.layout, sizes["num_hidden_layers"]), bare.config)
    return replace(bare, model_config=llama_config(sizes), layout=layout)


def deepened(layout: Layout, blocks: int) -> Layout:
    """A model of one block with so many of the kind."""
    groups = tuple(tuple(_moved(spec, number) for spec in group) for number in range(blocks) for group in layout.groups)
    specs = tuple(spec for group in groups for spec in group)
    names = tuple(spec.name for spec in specs)
    parameters = layout.num_parameters + (blocks - 1) * sum(spec.num_parameters for spec in layout.specs)
    whole = replace(layout, specs=specs, groups=groups, num_parameters=parameters)
    return replace(whole, compressed=names, adapted=names, free=names, replaceable=names)


def _moved(spec: LinearSpec, number: int) -> LinearSpec:
    return replace(spec, name=spec.name.replace(".0.", f".{number}."), block=spec.block.replace(".0", f".{number}"))


def paper_run(size: str, machine: str, emulator: dict[str, Any], **finetune: Any) -> Prepared:
    """The run of a model of that size on a machine, its rows all of one length."""
    workers, budget, _ = MACHINES[machine]
    values: dict[str, Any] = {
        "run_dir": "runs/paper",
        "memory_budget": budget,
        "model": {"source": size, "dtype": "bfloat16"},
        "data": {"train": {"path": "-"}, "max_seq_length": LENGTH},
        "calibration": {"num_calibration_samples": CALIBRATED, **workers},
        "emulator": {**emulator, **workers},
        "adapter": {"r": R},
        "finetune": {"per_device_train_batch_size": ROWS, "max_steps": STEPS_TRAINED, **finetune, **workers},
        "evaluation": {"num_samples": SCORED, "num_generations": 0, "num_exact_match": 0, **workers},
        **({"ray": {"num_gpus": 1}} if "gpus_per_worker" in workers else {}),
    }
    whole = whole_model(values, SIZES[size])
    vars(whole)["lengths"] = Lengths(LENGTH, LENGTH)  # of rows that are not there
    return whole


WHOLE = {
    "compression_ratio": RATIO,
    "allocation": "sensitivity",
    "objective": "predictions",
    "refinement": {"steps": 25},
    "healing": {"steps": 100},
}
# Its stages that a row of the table has, and under which name.
RUNS: tuple[tuple[dict[str, Any], dict[str, int], dict[str, str]], ...] = (
    (WHOLE, {"exact_steps": 3}, {}),
    ({"compression_ratio": 1.0, "quantization": "int4"}, {}, {"factorize": "round to 4 bits"}),
    ({"compression_ratio": 1.0}, {}, {"finetune": "LoRA on the original"}),
)


def table() -> str:
    """The Markdown of both models."""
    columns = [f"{size}, {what}" for size in SIZES for what in ("TFLOP", *MACHINES)]
    rows: dict[str, list[str]] = {}
    for emulator, finetune, named in RUNS:
        for size in SIZES:
            for number, (machine, (_, _, speeds)) in enumerate(MACHINES.items()):
                prepared = paper_run(size, machine, emulator, **finetune)
                memory = MemoryModel(prepared)
                for stage, planned in zip(_costed(prepared), make_plan(STEPS, prepared, speeds).stages, strict=True):
                    if not named or stage.name in named:
                        cost, cells = stage.cost(memory), rows.setdefault(named.get(stage.name, stage.name), [])
                        cells += [] if number else [f"{(cost.flops + cost.float32_flops) / 1e12:,.0f}"]
                        cells.append(duration(planned.seconds))
    lines = [f"| stage | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _costed(prepared: Prepared) -> list[Any]:
    return [stage for stage in STEPS if stage.cost is not None and stage.wanted(prepared)]


def correction_table() -> str:
    """The Markdown of what the correction multiplies, of 70 B parameters."""
    layout = paper_run("70 B", "one H100", {"compression_ratio": RATIO}).layout
    squares = sum(float(spec.in_features) ** 2 for spec in layout.specs)
    deltas = sum(2.0 * spec.num_parameters * spec.in_features for spec in layout.specs)
    products = {
        ("`G Q`", "2 r in², each linear"): 2 * R * squares,
        ("`W [Q, GQ]`", "4 r out · in"): 4.0 * R * sum(spec.num_parameters for spec in layout.specs),
        ("`W_E [Q, GQ]`", "4 r of what the emulator keeps"): 4.0 * R * sum(map(layout.kept, layout.specs)),
    }
    lines = ["| product | operations | TFLOP |", "| --- | --- | --- |"]
    lines += [f"| {what} | {how} | {count / 1e12:.1f} |" for (what, how), count in products.items()]
    lines.append(f"| in all | | {sum(products.values()) / 1e12:.1f} |")
    lines.append(f"| not made: `Δ G` | 2 out · in² | {round(deltas / 1e12, -2):,.0f} |")
    return "\n".join(lines)


def blocks_table() -> str:
    """The Markdown of what calibrating 70 B parameters block by block holds, 256 rows of 512 tokens on a worker's disk."""
    layout, blocks = (
        paper_run("70 B", "one H100", {"compression_ratio": RATIO}).layout,
        SIZES["70 B"]["num_hidden_layers"],
    )
    hidden, every = 2.0 * layout.hidden_size, sum(map(gram_bytes, layout.groups))
    weights, block = 2 * sum(spec.num_parameters for spec in layout.specs), every / blocks
    lines = ["| what | size |", "| --- | --- |"]
    lines += [
        f"| Grams of all blocks, in all | {every / 1e9:.0f} GB: out of reach for `resident` |",
        f"| Grams of one block: in a worker; while they are summed, on some node | {block / 1e9:.0f} GB;"
        f" {1.5 * block / 1e9:.0f} GB |",
        f"| a block's weights; the embedding | {weights / blocks / 1e9:.1f} GB; {2 * layout.head_parameters / 1e9:.0f} GB |",
        f"| hidden states of two blocks, 256 rows of 512 tokens, on a worker's disk | {2 * hidden * 256 * 512 / 1e9:.1f} GB,"
        f" {2 * hidden / 1e3:.0f} kB a token |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), blocks_table(), correction_table(), sep="\n\n")
