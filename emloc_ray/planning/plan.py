"""What a run will do and need, as data that can be printed: shapes, ranks, memory, disk, time. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emloc_ray.config.steps import STEPS
from emloc_ray.data.formats import EXTRA_FIELDS, FIELDS
from emloc_ray.data.images import encoded_bytes, image_parts
from emloc_ray.data.reading import Place, Row, read_rows
from emloc_ray.io.formats.teacher_shards import BYTES_PER_LOGIT
from emloc_ray.io.store.node_cache import sizes
from emloc_ray.planning.budget import Solution, solve, with_settings
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.machine import cpu_flops
from emloc_ray.planning.memory import MemoryModel, Parts, total
from emloc_ray.planning.prepared import UNKNOWN_ROWS, Prepared
from emloc_ray.planning.sizes import Lengths, gradient_bytes, gram_bytes
from emloc_ray.planning.training import factor_ranks, healing_run

_CHARACTERS_PER_TOKEN = 3.5
_ON_HOSTS = ("base", "weights", "correction", "hidden states", "teacher")  # of a GPU's worker
_VQA_TOKENS = 24.0  # of a question and its answer
_VQA_BYTES = 2000.0  # of its image
_IMAGE_BYTES = 100e3  # of a photograph nobody has looked at


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes of one worker at its peak by part, bytes it leaves on disk, seconds, what it asks of Ray."""

    name: str
    memory: Parts
    disk_bytes: int
    seconds: float
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def worker_bytes(self) -> int:
        """One worker's peak."""
        return total(self.memory)

    @property
    def host_bytes(self) -> int:
        """What of that is its node's memory: where it has a GPU, its process, the weights on their way there, and what is
        read or corrected on the CPU all the same."""
        if not self.gpus_per_worker:
            return self.worker_bytes
        return int(sum(self.memory.get(part, 0) for part in _ON_HOSTS))


@dataclass(frozen=True)
class Plan:
    """The whole of a run before it starts."""

    layout: Layout
    stages: tuple[StagePlan, ...]
    parameters: int
    emulator_parameters: int
    inference: Parts
    lengths: Lengths
    calibration_mode: str
    seconds_before: float

    @property
    def disk_bytes(self) -> int:
        """What the run directory grows to, temporary files included."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Predicted wall time of all stages, and of importing the model and making token shards before them."""
        return self.seconds_before + sum(stage.seconds for stage in self.stages)


def make_plan(prepared: Prepared) -> Plan:
    """Predicts every stage from shapes, the config, a look at the data and a short timing of this machine's products."""
    lengths = row_lengths(prepared)
    memory = MemoryModel(prepared, lengths)
    disk = _disk_bytes(prepared, memory, lengths)
    flops = _stage_flops(prepared, lengths.mean)
    speed = cpu_flops()
    sections, planned = _sections(prepared), _stage_memory(prepared, memory)
    stages = []
    for name in planned_steps(prepared):
        section = sections[name]
        each = section.gpus_per_worker * _GPU_FLOPS or max(1.0, section.cpus_per_worker) * speed
        work = flops[name] / (each * section.num_workers * _EFFICIENCY[name])
        seconds = _START_SECONDS[name] + work + disk[name] / 250e6
        stages.append(
            StagePlan(
                name,
                planned[name],
                disk[name],
                seconds if flops[name] or disk[name] else 0.0,
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
        memory.inference(),
        lengths,
        memory.calibration_mode(),
        _SECONDS_BEFORE + (memory.weights / 20e6 if prepared.source.gguf_file else 0),
    )


def planned_steps(prepared: Prepared) -> list[str]:
    """The stages, but for a healing that is not asked for; and what goes before a factorization whose ranks or factors
    follow from more than Grams."""
    left_out = {"import", "data"}
    left_out |= set() if prepared.layout.weighed else {"gradients"}
    left_out |= set() if prepared.layout.allocated else {"allocate"}
    left_out |= set() if prepared.config.emulator.heals else {"heal"}
    return [name for name in STEPS if name not in left_out]


def needed_steps(prepared: Prepared) -> list[str]:
    """The steps that the run is done with, beside the data, and the import, which goes by where the model lies."""
    left_out = {
        *(() if prepared.layout.differs else ("calibrate",)),
        *(("merge",) if prepared.config.adapter.is_prompt else ()),
    }
    return [name for name in planned_steps(prepared) if name not in left_out]


def planned_memory(prepared: Prepared) -> dict[str, int]:
    """Bytes that one worker of every stage is planned to hold at its peak, and what ``inference`` of the original takes."""
    memory = MemoryModel(prepared, row_lengths(prepared))
    stages = {name: total(parts) for name, parts in _stage_memory(prepared, memory).items()}
    return {**stages, "inference": total(memory.inference())}


def missing_disk(prepared: Prepared, fresh: bool = False) -> int:
    """Bytes that the run directory has still to grow by, at most: what the stages that are not done leave there, and no more
    than the whole plan beside what is there already (``fresh``: to be removed)."""
    memory = MemoryModel(prepared, row_lengths(prepared))
    planned = _disk_bytes(prepared, memory, memory.lengths)
    done = set() if fresh else prepared.run.stages().keys()
    left = [name for name in planned_steps(prepared) if name not in done]
    held = sum(sizes(prepared.run.root).values())
    return max(
        0, min(sum(planned[name] for name in left), sum(planned[name] for name in planned_steps(prepared)) - held)
    )


def _stage_memory(prepared: Prepared, memory: MemoryModel) -> dict[str, Parts]:
    """Every stage's peak by part; the healing's at the lengths of the rows that it reads."""
    stages, healing = {name: memory.stage(name) for name in planned_steps(prepared)}, prepared.config.emulator.heals
    if healing is not None:
        stages["heal"] = MemoryModel(prepared, row_lengths(healing_run(prepared, healing))).stage("heal")
    return stages


def within_budget(prepared: Prepared) -> tuple[Solution, Prepared]:
    """The settings that fit the config's ``memory_budget``, and the run with them.

    Raises:
        ConfigError: where none fit.
    """
    lengths, healing = row_lengths(prepared), prepared.config.emulator.heals
    if healing is not None:
        lengths = max(lengths, row_lengths(healing_run(prepared, healing)), key=lambda found: found.longest)
    solution = solve(prepared, int(prepared.config.memory_budget or 0), lengths)
    return solution, with_settings(
        prepared,
        solution.compression_ratio,
        solution.micro_batch,
        solution.gradient_accumulation_steps,
        solution.gradient_checkpointing,
    )


# Corrections that auto tries at most.
_CANDIDATES = 7
# Making token shards, mostly of starting Ray and its workers.
_SECONDS_BEFORE = 20
# Starting a stage's workers and loading the model, seconds; the share of a matrix product's speed that a stage reaches.
_START_SECONDS = {
    "calibrate": 25,
    "gradients": 25,
    "allocate": 6,
    "factorize": 6,
    "heal": 30,
    "finetune": 20,
    "correct": 15,
    "merge": 4,
    "evaluate": 20,
}
# A second's floating-point operations of a GPU, of which a stage reaches the shares below: no GPU is asked for a plan.
_GPU_FLOPS = 2e13
_EFFICIENCY = {
    "calibrate": 0.65,
    "gradients": 0.5,
    "allocate": 0.5,
    "factorize": 0.5,
    "heal": 0.2,
    "finetune": 0.2,
    "correct": 0.5,
    "merge": 1.0,
    "evaluate": 0.45,
}


def _sections(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    return {
        "calibrate": config.calibration,
        "gradients": config.calibration,
        "allocate": config.emulator,
        "factorize": config.emulator,
        "heal": config.finetune,
        "finetune": config.finetune,
        "correct": config.evaluation.model_copy(update={"num_workers": 1}),
        "merge": config.merge,
        "evaluate": config.evaluation,
    }


def _disk_bytes(prepared: Prepared, memory: MemoryModel, lengths: Lengths) -> dict[str, int]:
    """What every stage leaves on disk, calibration's hidden states while it lasts, and the teacher's logits."""
    adapter, healing = 4 * memory.adapter_parameters, prepared.config.emulator.heals
    emulator = memory.emulator_files
    if healing is not None:
        emulator = MemoryModel(healing_run(prepared, healing), lengths).emulator_files
    grams = sum(gram_bytes(group) for wave in memory.waves() for group in wave)
    rows = sum(source.num_rows for files in prepared.files.values() for source in files) or UNKNOWN_ROWS
    images = int(rows * memory.lengths.image_bytes)  # which the token shards hold
    gradients = sum(gradient_bytes(spec) for wave in memory.gradient_waves() for spec in wave)
    streamed = memory.calibration_mode() == "streamed"
    held = memory.hidden_state_disk_bytes() if streamed else grams * prepared.config.calibration.num_workers
    return {
        "calibrate": (memory.weight_files if prepared.source.gguf_file else 0) + images + grams // 2 + held,
        "gradients": gradients // 2 + gradients * prepared.config.calibration.num_workers,
        "allocate": 8 * sum(min(s.out_features, s.in_features) for s in prepared.layout.specs),
        "factorize": emulator,
        "heal": _healing_bytes(prepared, memory),
        "finetune": 4 * adapter,
        "correct": 4 * memory.corrected_parameters,
        "merge": 0 if prepared.config.adapter.is_prompt else memory.weight_files,
        "evaluate": 0,
    }


def _healing_bytes(prepared: Prepared, memory: MemoryModel) -> int:
    """The healed emulator, and while it is made the teacher's logits (k · 6 bytes of a token) and training checkpoints."""
    healing = prepared.config.emulator.heals
    if healing is None:
        return 0
    run = healing_run(prepared, healing)
    rows = min(_num_train_rows(run), _rows_trained(run))
    cached = rows * row_lengths(run).mean * healing.num_teacher_logits * BYTES_PER_LOGIT
    lora = sum(healing.r * (s.out_features + s.in_features) for s in run.layout.specs if s.name in run.layout.adapted)
    return int(memory.emulator_files + cached + 4 * 4 * lora)


def _num_train_rows(prepared: Prepared) -> int:
    return sum(source.num_rows for source in prepared.files.get("train", ())) or UNKNOWN_ROWS


def _rows_trained(prepared: Prepared) -> int:
    """Rows that all steps of the fine-tuning read together."""
    finetune = prepared.config.finetune
    rows = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    return rows * num_steps(prepared.config, _num_train_rows(prepared))


def _rows_scored(prepared: Prepared) -> float:
    """Rows that all candidates of the correction read together."""
    section = prepared.config.correction
    rows: float = section.num_selection_samples * _CANDIDATES
    return rows if section.max_share is None else min(rows, section.max_share * _rows_trained(prepared))


def row_lengths(prepared: Prepared) -> Lengths:
    """Tokens a row, guessed from the first rows' characters and images; the docstring task's rows are about 80, and rows of
    the hub, which are not there before the run, as long as rows may be."""
    data, sources = prepared.config.data, prepared.files.get("train")
    limit, shown = data.max_seq_length, prepared.layout.image.row_tokens
    if data.generate == "vqa":
        asked = _VQA_TOKENS + shown
        return Lengths(min(asked, limit), min(asked + _VQA_TOKENS, limit), 1.0, _VQA_BYTES)
    if data.packing or (not sources and data.generate is None):
        images = limit // shown if shown and data.format == "messages" and not data.packing else 0
        # As many as fit count for memory, which fails; one for the disk.
        return Lengths(limit, limit, images, _IMAGE_BYTES if images else 0.0)
    if not sources:
        return Lengths(80.0, min(limit, 256.0))
    numbers = range(min(200, sources[0].num_rows))
    tokens, images, size = [], 0, 0
    fields, extra = FIELDS[data.format], EXTRA_FIELDS[data.format]
    for number, row in read_rows(sources[0], numbers, fields, extra, data.on_error == "skip"):
        count = 0
        if data.format == "messages":
            count = sum(1 for _ in image_parts(row))
            size += encoded_bytes(row, Place.of(sources[0], number).folder)
        tokens.append(_characters(row) / _CHARACTERS_PER_TOKEN + shown * count)
        images += count
    mean = min(sum(tokens) / len(tokens), limit)
    return Lengths(mean, min(1.25 * max(tokens), limit), images / len(tokens), size / len(tokens))


def _characters(row: Row) -> int:
    """What of a row is text: the images inside messages are none."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return sum(len(value) for value in row.values() if isinstance(value, str))
    contents = [turn.get("content") for turn in turns]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return sum(len(str(part.get("text") or "") if isinstance(part, dict) else str(part)) for part in parts)


def num_steps(config: Any, num_rows: int) -> int:
    """Optimizer steps of a run: ``max_steps``, or what ``num_train_epochs`` of the rows make."""
    finetune = config.finetune
    if finetune.max_steps > 0:
        return int(finetune.max_steps)
    rows_per_step = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    return max(1, round(finetune.num_train_epochs * num_rows / rows_per_step))


def _stage_flops(prepared: Prepared, tokens: float) -> dict[str, float]:
    config, layout = prepared.config, prepared.layout
    blocks = sum(spec.token_share * spec.num_parameters for spec in layout.specs)
    kept = sum(spec.token_share * layout.kept(spec) for spec in layout.specs)
    head = layout.head_parameters * 0.25  # logits at labels alone
    grams = sum(group[0].token_share * group[0].in_features ** 2 for group in layout.groups) * 1.2
    calibrated = prepared.calibration_tokens(tokens) if layout.differs else 0
    passes = 6 if config.finetune.gradient_checkpointing else 4
    selection = _rows_scored(prepared) if config.correction.method == "auto" and layout.differs else 0
    held_out = config.evaluation.num_samples or 1000
    scored, small = config.evaluation.variants, ("emulator", "emulator_adapter")
    ranks = factor_ranks(prepared)
    work = sum(2 * s.num_parameters * max(s.in_features, 2 * ranks[s.name]) for s in layout.specs if s.name in ranks)
    weighed, spread = set(layout.weighed), set(layout.allocated)
    # Forward, once more for what the backward pass reads, and back; and the sums.
    sums = sum(s.token_share * s.out_features**2 for s in layout.specs if s.name in weighed) * 1.2
    values = sum(2 * s.num_parameters * s.in_features for s in layout.specs if s.name in spread)
    taught = healed = 0.0  # tokens
    if config.emulator.heals is not None:
        run = healing_run(prepared, config.emulator.heals)
        rows, length = _rows_trained(run), row_lengths(run).mean
        healed, taught = rows * length, min(rows, _num_train_rows(run)) * length
    return {
        "calibrate": calibrated * 2 * (blocks + grams),
        "gradients": calibrated * 2 * (3 * (blocks + head) + sums) if weighed else 0,
        "allocate": 2.5 * values,
        "factorize": 2.5 * work,
        "heal": healed * passes * (kept + 4 * head) + taught * 2 * (blocks + 4 * head),
        "finetune": _rows_trained(prepared) * tokens * passes * (kept + head),
        "correct": tokens * selection * 2 * (blocks + head) + work,
        "merge": 0,
        "evaluate": tokens * held_out * 2 * sum((kept if name in small else blocks) + head for name in scored)
        + 2 * config.evaluation.num_exact_match * config.evaluation.max_new_tokens * 2 * (blocks + 4 * head),
    }
