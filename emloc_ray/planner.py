"""What a run will do and need, as data that can be printed: shapes, ranks, memory, disk, time. Loads no weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from emloc_ray.data.reading import read_rows
from emloc_ray.preparation import Layout, Prepared
from emloc_ray.stages import STAGES

_WORKER_BASE = 450 * 2**20  # a worker with torch, transformers and peft imported


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes of one worker at its peak, bytes it leaves on disk, seconds, what it asks of Ray."""

    name: str
    worker_bytes: int
    disk_bytes: int
    seconds: float
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float


@dataclass(frozen=True)
class Plan:
    """The whole of a run before it starts."""

    layout: Layout
    stages: tuple[StagePlan, ...]
    parameters: int
    emulator_parameters: int
    inference_bytes: int
    mean_tokens: float

    @property
    def disk_bytes(self) -> int:
        """What the run directory grows to, temporary files included."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Predicted wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)


def make_plan(prepared: Prepared) -> Plan:
    """Predicts every stage from shapes, the config, a look at the data and a short timing of this machine's products."""
    mean_tokens = _mean_tokens(prepared)
    sizes = _Sizes(prepared)
    flops = _stage_flops(prepared, mean_tokens)
    speed = _flops_per_second()
    sections = _sections(prepared)
    stages = []
    for name in STAGES:
        section = sections[name]
        cpus = max(1.0, section.cpus_per_worker) * section.num_workers
        seconds = _START_SECONDS[name] + flops[name] / (speed * cpus * _EFFICIENCY[name]) + sizes.disk[name] / 250e6
        memory = _WORKER_BASE + sizes.memory(name, mean_tokens)
        stages.append(
            StagePlan(
                name,
                int(memory),
                int(sizes.disk[name]),
                seconds if flops[name] or sizes.disk[name] else 0.0,
                section.num_workers,
                section.cpus_per_worker,
                section.gpus_per_worker,
            )
        )
    layout = prepared.layout
    saved = layout.parameters_targeted - layout.parameters_factorized
    return Plan(
        layout,
        tuple(stages),
        layout.num_parameters,
        layout.num_parameters - saved,
        int(_WORKER_BASE + sizes.weights + sizes.inference_activations()),
        mean_tokens,
    )


# Starting a stage's workers and loading the model, seconds; the share of a matrix product's speed that a stage reaches.
_START_SECONDS = {"calibrate": 25, "factorize": 6, "finetune": 20, "correct": 10, "merge": 4, "evaluate": 15}
_EFFICIENCY = {"calibrate": 0.65, "factorize": 0.5, "finetune": 0.4, "correct": 0.5, "merge": 1.0, "evaluate": 0.45}


def _sections(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    return {
        "calibrate": config.calibration,
        "factorize": config.emulator,
        "finetune": config.finetune,
        "correct": config.merge,
        "merge": config.merge,
        "evaluate": config.evaluation,
    }


class _Sizes:
    """Bytes of the model, the Grams and the emulator, in the dtype that they are kept in."""

    def __init__(self, prepared: Prepared) -> None:
        self.config, self.layout = prepared.config, prepared.layout
        self.itemsize = _dtype(prepared).itemsize
        layout = self.layout
        self.weights = layout.num_parameters * self.itemsize
        self.emulator = (
            layout.num_parameters - layout.parameters_targeted + layout.parameters_factorized
        ) * self.itemsize
        needed = [group for group in layout.groups if any(spec.name in layout.ranks for spec in group)]
        self.grams = sum(4 * group[0].in_features ** 2 for group in needed)
        self.largest = max(spec.num_parameters for spec in layout.specs)
        adapter = sum(
            prepared.config.adapter.r * (s.in_features + s.out_features)
            for s in layout.specs
            if s.name in layout.adapted
        )
        self.adapter = adapter * 4
        imported = self.weights if prepared.source.gguf_file else 0
        slots = prepared.config.calibration.num_workers
        self.disk = {
            "calibrate": imported + self.grams * (slots + 0.5),
            "factorize": self.emulator,
            "finetune": self.adapter * 4,
            "correct": self.adapter,
            "merge": self.weights,
            "evaluate": 0,
        }

    def memory(self, stage: str, mean_tokens: float) -> float:
        config = self.config
        length = min(config.data.max_seq_length, 2 * mean_tokens)
        if stage == "calibrate":
            return self.weights + self.grams + self._activations(config.calibration.batch_size * length, 1)
        if stage == "factorize":
            return 6 * 4 * self.largest
        if stage == "finetune":
            tokens = config.finetune.per_device_train_batch_size * length
            blocks = 1 if config.finetune.gradient_checkpointing else self._num_blocks()
            kept = tokens * self.layout.hidden_size * 4 * self._num_blocks()
            return self.emulator + self.adapter * 4 + self._activations(tokens, blocks) + kept
        if stage == "correct":
            return self.weights + 8 * 4 * self.largest + self._activations(config.evaluation.batch_size * length, 1)
        if stage == "merge":
            return 3 * config.merge.chunk_bytes + self.adapter
        return self.weights + self.adapter + self._activations(config.evaluation.batch_size * length, 1)

    def inference_activations(self) -> float:
        return self._activations(self.config.data.max_seq_length, 1)

    def _num_blocks(self) -> int:
        return len({spec.block for spec in self.layout.specs})

    def _activations(self, tokens: float, blocks: int) -> float:
        """Every linear's input and output of ``blocks`` blocks, and logits for a quarter of the tokens."""
        per_token = sum(s.in_features + s.out_features for s in self.layout.specs) / self._num_blocks()
        vocabulary = self.layout.head_parameters / self.layout.hidden_size
        return 4 * tokens * (per_token * blocks + 3 * 0.25 * vocabulary)


def _dtype(prepared: Prepared) -> torch.dtype:
    wanted = prepared.config.model.dtype
    if wanted != "auto":
        return getattr(torch, wanted)
    if prepared.source.gguf_file:
        return torch.float32
    return getattr(prepared.model_config, "dtype", None) or torch.float32


def _mean_tokens(prepared: Prepared) -> float:
    """Tokens a row, guessed from the first rows' characters; the docstring task's rows are about 80."""
    sources = prepared.files.get("train")
    if not sources:
        return 80.0
    rows = [row for _, row in read_rows(sources[0], range(min(200, sources[0].num_rows)))]
    characters = sum(len(str(value)) for row in rows for value in row.values())
    return min(characters / len(rows) / 3.5, prepared.config.data.max_seq_length)


def num_steps(config: Any, num_rows: int) -> int:
    """Optimizer steps of a run: ``max_steps``, or what ``num_train_epochs`` of the rows make."""
    finetune = config.finetune
    if finetune.max_steps > 0:
        return int(finetune.max_steps)
    rows_per_step = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    return max(1, round(finetune.num_train_epochs * num_rows / rows_per_step))


def _stage_flops(prepared: Prepared, tokens: float) -> dict[str, float]:
    config, layout = prepared.config, prepared.layout
    blocks = sum(spec.num_parameters for spec in layout.specs)
    kept = sum(layout.kept(spec) for spec in layout.specs)
    head = layout.head_parameters * 0.25  # logits at labels alone
    grams = sum(group[0].in_features ** 2 for group in layout.groups) * 1.2
    calibrated = tokens * config.calibration.num_calibration_samples if layout.ranks else 0
    train = prepared.files.get("train", ())
    steps = num_steps(config, sum(source.num_rows for source in train) or 8000)
    finetune = config.finetune
    rows = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers * steps
    passes = 6 if finetune.gradient_checkpointing else 4
    selection = config.correction.num_selection_samples * (7 if config.correction.method == "auto" else 0)
    held_out = config.evaluation.num_samples or 1000
    work = sum(
        2 * s.num_parameters * max(s.in_features, 2 * layout.ranks[s.name])
        for s in layout.specs
        if s.name in layout.ranks
    )
    return {
        "calibrate": calibrated * 2 * (blocks + grams),
        "factorize": 2.5 * work,
        "finetune": rows * tokens * passes * (kept + head),
        "correct": tokens * selection * 2 * (blocks + head) + work,
        "merge": 0,
        "evaluate": tokens * held_out * 2 * (4 * (blocks + head) + 2 * (kept + head))
        + 2 * config.evaluation.num_exact_match * config.evaluation.max_new_tokens * 2 * (blocks + 4 * head),
    }


def _flops_per_second() -> float:
    """One thread's speed in a matrix product like the model's, measured for a tenth of a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(512, 768), torch.randn(768, 768)
        left @ right
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < 0.1:
            left @ right
            count += 1
        return count * 2 * 512 * 768 * 768 / (time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
