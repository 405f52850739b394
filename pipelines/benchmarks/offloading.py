"""A model whose blocks come and go: what a pass costs beside compute and transfer, and a whole run of one above its budget."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import emloc_ray
from benchmarks.figures import Figures, calibrated, figure, interleaved, paper_config, saved_whole
from benchmarks.memory import LARGE
from emloc_ray.modeling.holding import Offloaded
from emloc_ray.modeling.loading import copy_tokenizer, load_model

DEPTH = 12  # blocks of the model that is passed through, of the widths of one of 1.1 B parameters
SHAPE = (4, 256)  # rows and tokens of a batch
VARIANTS = 4
BUDGET = 2 * 2**30
_REPEATS = 3


def offloading(out: Path) -> Figures:
    """An offloaded pass against the slower of a resident pass and of the transfer that it needs, which is none on a CPU,
    where weights are mapped; and passes of four models together against four alone."""
    config = LlamaConfig(**{**LARGE, "num_hidden_layers": DEPTH}, dtype=torch.bfloat16 if _on_gpu() else torch.float32)
    directory = saved_whole(out / "offloaded-model", lambda path: _random(config).save_pretrained(path))
    held = Offloaded(directory, num_models=VARIANTS)
    ids = torch.randint(3, 1000, SHAPE, device=held.device)

    def together(number: int) -> None:
        held.in_step([functools.partial(_forward, model, ids) for model in held.models[:number]])

    def each_alone() -> None:
        for model in held.models:
            _forward(model, ids)

    whole = load_model(directory)
    actions = [lambda: _forward(held.model, ids), lambda: _forward(whole, ids), lambda: together(VARIANTS), each_alone]
    offloaded, resident, shared, alone = interleaved(actions, _REPEATS)
    transfer = _transfer_seconds(whole)
    return {
        "an offloaded pass": figure(
            offloaded, max(resident, transfer), "s (baseline: the slower of a resident pass and its weights' transfer)"
        ),
        f"{VARIANTS} models in one offloaded pass": figure(shared, alone, "s (baseline: in a pass each)"),
    }


def bounded(out: Path) -> Figures:
    """A whole run of a random model of 1.1 B parameters under 2 GiB: what each stage's largest worker held above its imports.

    By sensitivity and predictions, healed, corrected, finished on the original and evaluated.
    """
    _, quickstart = calibrated(out)

    def save(path: Path) -> None:
        vocabulary = LlamaConfig.from_pretrained(quickstart / "model").vocab_size
        _random(LlamaConfig(**LARGE, vocab_size=vocabulary, dtype=torch.bfloat16)).save_pretrained(path)
        copy_tokenizer(quickstart / "model", path)

    model = saved_whole(out / "bounded-model", save)
    config = paper_config(
        out / "bounded",
        f"model.source={model}",
        f"memory_budget={BUDGET}",
        "emulator.compression_ratio=0.2",
        "emulator.allocation=sensitivity",
        "emulator.objective=predictions",
        "emulator.healing={steps: 1}",
        "calibration.num_calibration_samples=4",  # memory does not grow with rows, time does
        "finetune.per_device_train_batch_size=2",
        "finetune.max_steps=2",
        "finetune.exact_steps=1",
        "correction.num_selection_samples=4",
        "evaluation.num_samples=4",
        "evaluation.num_exact_match=0",
        "evaluation.num_generations=0",
    )
    metrics = emloc_ray.run(config, fresh=True)
    above, imports = "peak_above_imports_bytes", metrics["planned_imports_bytes"]
    peaks = {name: stage[above] for name, stage in metrics["stages"].items() if above in stage}
    return {
        f"1.1 B under 2 GiB, {name}": figure(
            peak / 2**20, (BUDGET - imports) / 2**20, "MiB above imports (baseline: the limit less the planned imports)"
        )
        for name, peak in peaks.items()
    }


def _random(config: LlamaConfig) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(config.dtype)


@torch.no_grad()
def _forward(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if _on_gpu():
        torch.cuda.synchronize()


def _transfer_seconds(whole: Any) -> float:
    """Of the blocks' weights from pinned memory to a GPU."""
    if not _on_gpu():
        return 0.0
    waiting = [parameter.cpu().pin_memory() for parameter in whole.model.layers.parameters()]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for weight in waiting:
        weight.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _on_gpu() -> bool:
    return torch.cuda.is_available()
