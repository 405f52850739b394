"""One process that runs a stage's own functions on given artifacts and prints the peak of its memory as JSON.

    python pipelines/benchmarks/memory_probe.py inference MODEL_DIR --rows 1 --length 512
    python pipelines/benchmarks/memory_probe.py finetune EMULATOR_DIR --rows 1 --length 512
    python pipelines/benchmarks/memory_probe.py stage - <JOB

A job is pickled as ``(name, arguments)``, the arguments of one of this file's functions. ``peak`` is the most bytes held
above what the imports took: the resident set on a CPU, the allocator's peak on a GPU. ``weights`` is what opening the
model added, every page of it touched (checkpoints are mapped lazily); it is left out where no model is opened.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  part of the baseline
import psutil
import torch

from emloc_ray.io.formats.grams import GramStore
from emloc_ray.modeling import holding
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.holding import open_model
from emloc_ray.modeling.loss import TopLogProbs, teacher_logits, token_loss
from emloc_ray.modeling.replay import BlockReplay
from emloc_ray.stages.calibrate import resident_slot, streamed_slot
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.job import CorrectionJob
from emloc_ray.stages.evaluate import evaluate as evaluate_stage
from emloc_ray.stages.factorize import factorize as factorize_stage
from emloc_ray.stages.factorize.job import FactorizationJob
from emloc_ray.stages.merge import merge as merge_stage

_weights: list[int] = []


def held_bytes() -> int:
    """What this process, or its GPU allocator, holds."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most that it has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def weighed_model(directory: Path, hold: str = "resident", **options: Any) -> Any:
    """:func:`open_model`, noting what it added."""
    before = held_bytes()
    model = open_model(directory, hold, **options)
    _touch(model)
    _weights.append(held_bytes() - before)
    return model


def _touch(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if not parameter.is_meta:
            float(parameter.detach().view(-1)[:: 4096 // parameter.element_size()].sum())


def inference(directory: Path, rows: int, length: int) -> None:
    """Prefill of the original with its KV cache, logits of the last token."""
    model = weighed_model(directory)
    with torch.no_grad():
        ids = _random_ids(rows, length, model.config.vocab_size)
        model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1)


def teach(directory: Path, rows: int, length: int, num_logits: int = 64) -> None:
    """The original's top logits at every label of a batch, as healing caches them."""
    model = weighed_model(directory)
    batch = {key: value.to(model.device) for key, value in _batch(rows, length, model.config.vocab_size).items()}
    teacher_logits(model, batch, "all", num_logits)


def finetune(
    directory: Path,
    rows: int,
    length: int,
    r: int = 8,
    checkpointing: bool = True,
    loss_on: str = "all",
    num_logits: int = 0,
) -> None:
    """Two steps of LoRA on every linear of the emulator's blocks, as the stage takes them; half of a row is completion.

    With ``num_logits`` of a teacher, as healing takes them.
    """
    model = weighed_model(directory)
    targets = [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]
    targets = targets or [spec.name for spec in block_linears(model)]
    model = attach_adapter(model, adapter_config(target_modules=targets, r=r, lora_alpha=2 * r))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = {key: value.to(model.device) for key, value in _batch(rows, length, model.config.vocab_size).items()}
    teacher = None
    if num_logits:
        labels = rows * (length - 1)
        ids = torch.arange(num_logits).expand(labels, num_logits)
        teacher = TopLogProbs(ids, torch.full(ids.shape, -6.0)).to(model.device)
    for _ in range(2):
        result = token_loss(model, batch, loss_on, teacher=teacher)
        (result.loss_sum / result.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def _batch(rows: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = _random_ids(rows, length, vocabulary)
    completion = (torch.arange(length) >= length // 2).expand(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def _random_ids(rows: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, min(1000, vocabulary), (rows, length), generator=torch.Generator().manual_seed(0))


def calibrate_resident(job: CalibrationJob, out_dir: Path, threads: int) -> None:
    """A slot that holds the model, over two token shards: its peak is the same in all."""
    resident_slot.open_model = weighed_model
    slot = resident_slot.ResidentSlot(job, out_dir / "slot.safetensors", threads)
    for number in range(min(2, slot.shards.num_shards)):
        slot.accumulate(number)
    slot.commit()


def calibrate_streamed(job: CalibrationJob, out_dir: Path, num_blocks: int, threads: int) -> None:
    """A slot that holds a block, through the first ``num_blocks`` of them."""

    class Weighed(BlockReplay):
        def load_block(self, position: int) -> None:
            super().load_block(position)
            _touch(self.model)
            if not position:
                _weights.append(held_bytes() - begin)

    begin = held_bytes()
    streamed_slot.BlockReplay = Weighed  # type: ignore[misc]
    slot = streamed_slot.StreamedSlot(job, out_dir, 0, 1, num_blocks, threads)
    for position in range(num_blocks):
        slot.accumulate(position)


def factorize(job: FactorizationJob, grams_dir: Path, threads: int) -> None:
    """All groups that compression targets, one after the other."""
    torch.set_num_threads(threads)
    grams = GramStore(grams_dir)
    for group in job.groups:
        ranked = [spec for spec in group if spec.name in job.ranks]
        if ranked:
            gram = grams.stored(ranked[0].name)
            factorize_stage.factorize_group(job, ranked, gram, job.out_dir / "factors.safetensors")


def correct(job: CorrectionJob, threads: int) -> None:
    """All modules and candidates, one after the other."""
    torch.set_num_threads(threads)
    holding.open_model = weighed_model
    correct_adapter(job)


def merge(job: merge_stage.MergeJob, threads: int) -> None:
    """All shards, one after the other."""
    torch.set_num_threads(threads)
    for shard in merge_stage.Checkpoint(job.model_dir).shards:
        merge_stage.merge_shard(job, shard, job.out_dir / shard.file.name)


def evaluate(job: evaluate_stage.EvaluationJob, family: str, num_parts: int, threads: int) -> None:
    """What one base model serves, on the first slice of the rows."""
    torch.set_num_threads(threads)
    evaluate_stage.open_model = weighed_model
    evaluate_stage.evaluate_slice(job, family, 0, num_parts)


STAGES: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (inference, teach, finetune, calibrate_resident, calibrate_streamed, factorize, correct, merge, evaluate)
}


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["inference", "finetune", "stage"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name: str = arguments.what
    settings: dict[str, Any] = {"directory": arguments.path, "rows": arguments.rows, "length": arguments.length}
    if name == "stage":
        name, settings = pickle.load(sys.stdin.buffer)
    baseline = 0 if torch.cuda.is_available() else held_bytes()
    STAGES[name](**settings)
    held = {"baseline": baseline, "peak": peak_bytes() - baseline}
    print(json.dumps({**held, **({"weights": max(_weights)} if _weights else {})}))


if __name__ == "__main__":
    main()
