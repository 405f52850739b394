"""What a card of 24 GiB can train on, of 8 B, 32 B and 70 B, and what keeping to the memory of inference costs 8 B.

    PYTHONPATH=. python pipelines/benchmarks/card_on_paper.py

All is as ``emloc-ray plan`` plans and chooses. cluster/README.md has all that this prints.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.gpu.shapes import SHAPES, llama_config
from benchmarks.on_paper import CALIBRATED, LENGTH, ROWS, SCORED, R, bare_prepared, whole_model
from emloc_ray.planning.alternatives import Alternative, Choice, choose_training
from emloc_ray.planning.batches import shrink_batches, without_budget
from emloc_ray.planning.costs import StageCost, busy_seconds
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import make_plan
from emloc_ray.stages.calibrate.stage import GRADIENTS
from emloc_ray.stages.order import STEPS
from emloc_ray.text import counted, duration

# A card of 165 TFLOPS in bfloat16, of which training is planned to reach a fifth, and of 1 TB/s, behind PCIe 4; a host that
# holds the weights.
CARD = Speeds(cpu_flops=1e11, gpu_flops=165e12, gpu_float32_flops=82e12, link=25e9, gpu_memory=1e12)
BUDGET, CARD_BYTES = "24GiB", 24 * 2**30
_OF_32_B = {**SHAPES["full"].model, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
SIZES = {
    "8 B": SHAPES["full"].model,
    "32 B": {**_OF_32_B, "num_attention_heads": 40, "vocab_size": 152064},
    "70 B": SHAPES["full"].large,
}


def choice_for(name: str) -> Choice:
    """What a card can train on, by sensitivity and predictions where that is an emulator."""
    values: dict[str, Any] = {
        "run_dir": "runs/paper",
        "memory_budget": BUDGET,
        "model": {"source": name, "dtype": "bfloat16"},
        "data": {"train": {"path": "-"}, "max_seq_length": LENGTH},
        "emulator": {"allocation": "sensitivity", "objective": "predictions"},
        "adapter": {"r": R},
        "calibration": {"num_calibration_samples": CALIBRATED, "gpus_per_worker": 1},
        "evaluation": {"num_samples": SCORED, "gpus_per_worker": 1},
        "finetune": {"per_device_train_batch_size": ROWS, "gpus_per_worker": 1},
        "ray": {"num_gpus": 1},
    }
    return choice_under(values, SIZES[name])


def choice_under(values: dict[str, Any], sizes: dict[str, int]) -> Choice:
    """What the card can train on under a config whose rows are all of ``data.max_seq_length``, of a Llama of these sizes."""
    length = values["data"]["max_seq_length"]
    prepared = dataclasses.replace(whole_model(values, sizes), gpu_bytes=CARD_BYTES)
    return choose_training(prepared, Lengths(length, length), CARD)


def choices_table(choices: dict[str, Choice]) -> str:
    """The Markdown of what 24 GiB train, side by side."""
    columns = [f"{name}, {what}" for name in choices for what in ("GiB", "a step")]
    lines = [f"| trained on | {' | '.join(columns)} | gap closed |", f"| --- |{' --- |' * (len(columns) + 1)}"]
    for row in zip(*(choice.alternatives for choice in choices.values()), strict=True):
        cells = [cell for one, choice in zip(row, choices.values(), strict=True) for cell in _cells(one, choice)]
        shown = [one.measured for one in row if one.fits and not one.unneeded]
        known = {f"{100 * m.gap_closed:.0f} %{m.where}": None for m in shown if m}
        name = row[0].name if row[0].config.emulator.budget is None else "an emulator by one budget"
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(known) or 'not measured'} |")
    return "\n".join(lines)


def stages_table(choices: dict[str, Choice]) -> str:
    """The Markdown of what else these runs hold, and an emulator's: the largest stage beside the training, and the passes of
    its gradient sums with their time."""
    emulated = {name: _emulators(choice) for name, choice in choices.items()}
    rows = {
        "the recommended run, its largest other stage": [
            _largest(choice.recommended.memory) for choice in choices.values()
        ],
        "an emulator's run, its largest other stage": [_largest(memory) for memory in emulated.values()],
        f"gradient sums of {CALIBRATED} rows": [_gradients(memory) for memory in emulated.values()],
    }
    lines = [f"| beside the training | {' | '.join(choices)} |", f"| --- |{' --- |' * len(choices)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _emulators(choice: Choice) -> MemoryModel:
    return next(one.memory for one in choice.alternatives if one.name == "an emulator")


def _largest(memory: MemoryModel) -> str:
    stages = make_plan(STEPS, memory.prepared, CARD).stages
    peaks = {stage.name: stage.worker_bytes for stage in stages if stage.name not in ("finetune", "heal")}
    name = max(peaks, key=peaks.__getitem__)
    fits = peaks[name] <= int(memory.budget or 0)
    return f"{name} {'' if fits else 'needs '}{peaks[name] / 2**30:.1f} GiB"


def _gradients(memory: MemoryModel) -> str:
    plan = memory.gradient_plan()
    cost = GRADIENTS.cost(memory) if GRADIENTS.cost is not None else StageCost({})
    seconds = cost.start_seconds + busy_seconds(cost, memory.config.calibration, CARD, memory.weights)
    seconds += cost.written / CARD.disk
    held = plan.hold.replace("_", " ")
    return f"{counted(len(plan.waves), 'pass', 'passes')}, {held}, {counted(plan.batch_size, 'row')} a batch: {duration(seconds)}"


def _cells(one: Alternative, choice: Choice) -> tuple[str, str]:
    """Memory, with an emulator's ratio or bits, and seconds; the recommended one's in bold."""
    if one.unneeded:
        return "not needed", ""
    emulator, needed = one.config.emulator, f"{one.needed / 2**30:.1f}"
    size = emulator.budget or ("" if emulator.compression_ratio == 1 else f"{emulator.compression_ratio:g}")
    if not one.fits:
        return f"needs {needed}", ""
    cells = f"{needed}{size and f' at {size}'}", duration(one.step_seconds)
    return (f"**{cells[0]}**", f"**{cells[1]}**") if one is choice.recommended else cells


def inference_table() -> str:
    """The Markdown of what keeping to the memory of inference costs 8 B: on a card of 80 GiB with 400 TFLOPS, 50 GB/s."""
    on_gpu = {"gpus_per_worker": 1}
    values = {
        "run_dir": "runs/paper",
        "model": {"source": "8 B", "dtype": "bfloat16"},
        "data": {"train": {"path": "-"}, "max_seq_length": LENGTH},
        "calibration": on_gpu,
        "emulator": {"allocation": "sensitivity", "objective": "predictions", **on_gpu},
        "adapter": {"r": R},
        "finetune": {"per_device_train_batch_size": ROWS, **on_gpu},
        "evaluation": on_gpu,
        "ray": {"num_gpus": 1},
    }
    whole = bare_prepared(values, llama_config(SIZES["8 B"]))
    vars(whole)["lengths"] = Lengths(LENGTH, LENGTH)  # of rows that are not there
    bounded, free = shrink_batches(whole), without_budget(whole)
    costs = []
    for prepared in (bounded, free):
        vars(prepared)["lengths"] = whole.lengths
        speeds = Speeds(cpu_flops=1e11, gpu_flops=400e12, gpu_float32_flops=40e12, link=50e9, gpu_memory=2e12)
        plan = make_plan(STEPS, prepared, speeds)
        seconds = {f"{stage.name}_s": f"{stage.seconds:.0f}" for stage in plan.stages}
        costs.append({**seconds, **{name: f"{size / 2**30:.1f}" for name, size in plan.worker_bytes.items()}})
    (ours, none), passes = costs, len(MemoryModel(bounded).gradient_plan().waves)
    stages = {
        "gradients": f"gradients, in {passes} passes",
        "calibrate": "Grams, block by block: their sums need less disk",
        "finetune": "training",
        "correct": "correction",
        "evaluate": "evaluation",
    }
    rows = [
        [what, *(costs[key] for costs in (ours, none) for key in (f"{stage}_s", stage))]
        for stage, what in stages.items()
    ]
    heads = [f"in {ours['inference']} GiB", "s", "GiB", "without budget, s", "GiB"]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


if __name__ == "__main__":
    side_by_side = {name: choice_for(name) for name in SIZES}
    print(choices_table(side_by_side), stages_table(side_by_side), inference_table(), sep="\n\n")
