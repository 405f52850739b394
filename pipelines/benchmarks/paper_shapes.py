"""The plan's lines for the paper's models beside the paper's figures (arXiv 2506.12015); configs alone, no weights.

InternVL2.5 8B, 26B and 38B as transformers' own ``InternVLConfig`` has them, vision tower and projector included. The
paper does not say how long its sequences are: here 2 rows of 2,048 tokens, 1,792 of them image tokens, that is 7 tiles of
448² pixels, of which the vision tower sees 1,025 patches each. bfloat16, LoRA of r = 8 on every linear of the blocks,
gradient checkpointing, a budget of 24 GB. The trace of shared inputs feeds no images, so that each of the tower's linears
counts a Gram of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ablations.tables import render
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, Qwen2Config

from benchmarks.figures import write_result
from benchmarks.on_paper import bare_prepared
from emloc_ray.modeling.architecture import ImageShape
from emloc_ray.planning.budget import solve_for_budget, training_bytes, with_settings
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.memory import MemoryModel, Parts, total
from emloc_ray.planning.prepared import Prepared
from emloc_ray.stages.order import STEPS

ROWS, LENGTH, TILES = 2, 2048, 7
PATCHES = 1025  # of a tile, in the vision tower; 256 in the language model
BUDGET = 24 * 10**9
GB = 1e9
# The paper has no healing, and none of the memory that it names is for making tokens.
STAGES = [
    stage
    for stage in STEPS
    if stage.cost is not None and stage.verb == stage.name and stage.name not in ("data", "heal")
]

_SMALL_VISION = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_LARGE_VISION = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800}


@dataclass(frozen=True)
class Shape:
    """One of the paper's models: its towers' sizes, and the paper's peaks in GB where it gives them."""

    name: str
    vision: dict[str, Any]
    language: Any
    lora_gb: float | None = None
    emloc_gb: float | None = None


def _language(kind: type[Any], hidden: int, layers: int, mlp: int, heads: int, vocabulary: int) -> Any:
    return kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )


SHAPES = (
    Shape("8B", _SMALL_VISION, _language(LlamaConfig, 4096, 32, 14336, 32, 92553)),
    Shape("26B", _LARGE_VISION, _language(LlamaConfig, 6144, 48, 16384, 48, 92553), 72.9, 18.6),
    Shape("38B", _LARGE_VISION, _language(Qwen2Config, 5120, 64, 27648, 40, 151674), 94.8, 20.1),
)


def prepared_shape(shape: Shape) -> Prepared:
    """The model on the meta device, under the paper's settings."""
    vision = InternVLVisionConfig(image_size=[448, 448], patch_size=[14, 14], **shape.vision)
    model_config = InternVLConfig(vision_config=vision, text_config=shape.language)
    values = {
        "run_dir": f"runs/shapes-{shape.name}",
        "memory_budget": BUDGET,
        "model": {"source": f"InternVL2.5-{shape.name}", "dtype": "bfloat16"},
        "data": {"train": {"path": "-"}, "max_seq_length": LENGTH},
        "calibration": {"num_calibration_samples": 64, "batch_size": ROWS, "rows_per_shard": ROWS},
        "adapter": {"r": 8, "lora_alpha": 8},
        "finetune": {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 4},
        "evaluation": {"batch_size": ROWS},
    }
    bare = bare_prepared(values, model_config)
    patches = {spec.block: PATCHES for spec in bare.layout.specs if spec.block.startswith("model.vision_tower")}
    return replace(bare, layout=replace(bare.layout, image=ImageShape(LENGTH // TILES, patches)))


def _held_whole(original: MemoryModel) -> MemoryModel:
    """As users of LoRA elsewhere hold it: under the budget its blocks would come and go."""
    config = original.config
    model = config.model.model_copy(update={"hold": "resident"})
    return MemoryModel(replace(original.prepared, config=config.model_copy(update={"model": model})), original.lengths)


def plan_shape(shape: Shape) -> dict[str, Any]:
    """Parameters and peaks in GB, imports left out as the paper's figures of an allocator do."""
    prepared = prepared_shape(shape)
    lengths = Lengths(LENGTH, LENGTH, images=TILES)

    def at(ratio: float, rows: int = ROWS) -> MemoryModel:
        return MemoryModel(with_settings(prepared, ratio, rows, 8 // rows, True), lengths)

    original = at(1.0)
    figures: dict[str, Any] = {
        "parameters": prepared.layout.num_parameters,
        "weights": original.weights / GB,
        "inference": _gb(original.inference(ROWS)),
        "lora_on_the_original": _gb(_held_whole(original).finetuning_parts()),
        "paper_lora": shape.lora_gb,
        "paper_emloc": shape.emloc_gb,
    }
    ratios = (step / 100 for step in range(99, 0, -1))
    five = next((ratio for ratio in ratios if at(ratio).emulator <= 5e9 * torch.bfloat16.itemsize), None)
    if five is not None:
        figures["five_billion"] = {"ratio": five, "finetune": _gb(at(five).finetuning_parts())}
    solved = solve_for_budget(prepared, BUDGET, lengths)
    figures["budget"] = f"No compression ratio fits {BUDGET / GB:.0f} GB"
    if training_bytes(solved) <= BUDGET:
        chosen = solved.config
        ratio, rows = chosen.emulator.compression_ratio, chosen.finetune.per_device_train_batch_size
        memory = at(ratio, rows)
        figures["budget"] = {
            "ratio": ratio,
            "micro_batch": rows,
            "emulator_parameters": memory.emulator // memory.itemsize,
            "calibration": memory.calibration_hold(),
            **{stage.name: _gb(stage.cost(memory).memory) for stage in STAGES if stage.cost is not None},
        }
    return figures


def _gb(parts: Parts) -> float:
    return (total(parts) - parts.get("base", 0)) / GB


def write_shapes(out: Path) -> dict[str, dict[str, Any]]:
    """``paper_shapes.json`` and ``shapes.md``; returns what the former has by model."""
    models = {shape.name: plan_shape(shape) for shape in SHAPES}
    write_result(out / "paper_shapes.json", "shapes", "shapes", models=models)
    lines = [render({"kind": "shapes", "models": models}), "", "Within 24 GB a worker, imports included:", ""]
    lines += [
        f"| GB | ratio | rows | emulator | calibration | {' | '.join(stage.name for stage in STAGES)} |",
        f"| --- | --- | --- | --- | --- | {' | '.join('---' for _ in STAGES)} |",
    ]
    for name, row in models.items():
        solved = row["budget"]
        if isinstance(solved, str):
            lines.append(f"| {name} | {solved} |")
            continue
        peaks = " | ".join(f"{solved[stage.name]:.1f}" for stage in STAGES)
        size = f"{solved['emulator_parameters'] / 1e9:.1f}B"
        lines.append(
            f"| {name} | {solved['ratio']:g} | {solved['micro_batch']} | {size} | {solved['calibration']} | {peaks} |"
        )
    (out / "shapes.md").write_text("\n".join(lines) + "\n")
    return models
