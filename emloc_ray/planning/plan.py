"""The plan of a run as data: shapes, ranks, memory, disk, time; loads no weights."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.store.node_cache import sizes
from emloc_ray.planning.alternatives import Choice, choose_training
from emloc_ray.planning.batches import shrink_batches
from emloc_ray.planning.budget import check_holding
from emloc_ray.planning.costs import Costed, busy_seconds, with_base
from emloc_ray.planning.machine import Speeds, assumed_speeds
from emloc_ray.planning.memory import MemoryModel, Parts, total
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import longest_lengths
from emloc_ray.text import counted, size, size_up

# The parts of a GPU worker's memory that are on its node.
_ON_HOSTS = ("base", "weights", "correction", "hidden states", "teacher", "in float64", "read ahead")
_ON_BOTH = "weights"
_BY_WEIGHTS = ("allocate", "factorize")  # stages whose memory follows from the largest weight, and no batch lowers
_SECONDS_BEFORE = 15  # to start Ray


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes of one worker at its peak by part, bytes on disk, seconds, the workers it asks of Ray."""

    name: str
    memory: Parts
    disk_bytes: int
    seconds: float
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    divisible: bool = False  # fewer workers than asked for can do it
    together: bool = False  # all of them have to be there at once
    steps: tuple[int, str] | None = None  # its optimizer steps, and of what
    step_seconds: float = 0.0  # of an optimizer step, where it has any
    step_bytes: float = 0.0  # of weights that come to its workers in one
    scoring_seconds: float = 0.0  # of all scores between its steps
    folders: tuple[str, ...] = ()  # of the run directory, that it writes

    @property
    def worker_bytes(self) -> int:
        """One worker's peak."""
        return total(self.memory)

    @property
    def host_bytes(self) -> int:
        """The part of it in the node's memory: with a GPU the process, weights on their way to the GPU, and what is read or
        corrected on the CPU."""
        if not self.gpus_per_worker:
            return self.worker_bytes
        return int(sum(self.memory.get(part, 0) for part in _ON_HOSTS))

    @property
    def gpu_bytes(self) -> int:
        """The part of it that is on its GPU; none without one."""
        if not self.gpus_per_worker:
            return 0
        return int(sum(held for part, held in self.memory.items() if part == _ON_BOTH or part not in _ON_HOSTS))


@dataclass(frozen=True)
class Plan:
    """The plan of a whole run; ``choice``: what else could be trained on within its budget, where that was asked."""

    prepared: Prepared
    stages: tuple[StagePlan, ...]
    parameters: int
    emulator_parameters: int
    inference: Parts
    calibration_hold: str
    speeds: Speeds
    choice: Choice | None = None

    @property
    def disk_bytes(self) -> int:
        """The size of the finished run directory, with temporary files."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def worker_bytes(self) -> dict[str, int]:
        """One worker's peak in every stage, and what ``inference`` of the original takes."""
        return {**{stage.name: stage.worker_bytes for stage in self.stages}, "inference": total(self.inference)}

    @property
    def steps(self) -> str:
        """The optimizer steps of all stages: ``16 steps of healing, 32 on the emulator, then 8 on the original``."""
        (number, words), *others = [stage.steps for stage in self.stages if stage.steps is not None]
        *before, last = [f"{counted(number, 'step')} {words}", *(f"{number:,} {words}" for number, words in others)]
        return f"{', '.join(before)}, then {last}" if before else last

    @property
    def host_bytes(self) -> dict[str, int]:
        """What one worker holds of its node's memory in every stage."""
        return {stage.name: stage.host_bytes for stage in self.stages}

    @property
    def gpu_bytes(self) -> dict[str, int]:
        """What one worker holds of its GPU, in every stage whose workers have one."""
        return {stage.name: stage.gpu_bytes for stage in self.stages if stage.gpus_per_worker}

    def takes_gpus(self, left: Container[str]) -> bool:
        """Whether a stage of those that are ``left`` has workers with a GPU."""
        return any(stage.gpus_per_worker > 0 for stage in self.stages if stage.name in left)

    @property
    def seconds(self) -> float:
        """Predicted wall time of all stages, and of Ray's start before them."""
        return _SECONDS_BEFORE + sum(stage.seconds for stage in self.stages)


def make_plan(stages: Sequence[Costed], prepared: Prepared, speeds: Speeds | None = None) -> Plan:
    """Predicts every stage from shapes, the config and the first rows; ``speeds``: of a short timing of this machine's
    products, and assumed ones of a GPU, by default."""
    memory, speeds, layout = MemoryModel(prepared), speeds or assumed_speeds(), prepared.layout
    saved = layout.parameters_targeted - layout.parameters_factorized
    return Plan(
        prepared,
        tuple(_planned(stage, memory, speeds) for stage in stages if stage.cost is not None and stage.wanted(prepared)),
        layout.num_parameters,
        layout.num_parameters - saved,
        memory.inference(),
        memory.calibration_hold(),
        speeds,
    )


def _planned(stage: Costed, memory: MemoryModel, speeds: Speeds) -> StagePlan:
    assert stage.cost is not None
    cost, asked = stage.cost(memory), stage.asked(memory.prepared)
    busy, steps = busy_seconds(cost, asked, speeds, memory.weights), max(1.0, cost.steps)
    scoring = 0.0 if cost.scores is None else busy_seconds(cost.scores, asked, speeds, memory.weights)
    seconds = cost.start_seconds + busy + scoring + cost.written / speeds.disk
    return StagePlan(
        stage.name,
        with_base(cost.memory),
        cost.disk_bytes,
        seconds if cost.flops or cost.float32_flops or cost.disk_bytes else 0.0,
        asked.num_workers,
        asked.cpus_per_worker,
        asked.gpus,
        stage.divisible,
        asked.together,
        stage.steps and stage.steps(memory.prepared),
        busy / steps if cost.steps else 0.0,
        cost.moved_bytes / steps if cost.steps else 0.0,
        scoring,
        (*stage.outputs, *stage.scratch),
    )


def check_stages(plan: Plan, left: Container[str] | None = None) -> None:
    """Raises ConfigError where a stage of those that are ``left``, by default any, is planned to hold more of a GPU than can be
    filled. GPUs that are not known hold all, and DeepSpeed's ranks share what is planned for each. ``memory_budget: null`` lifts
    it but for the weights: a plan may be too high."""
    config, memory = plan.prepared.config, MemoryModel(plan.prepared)
    lifted = config.memory_budget is None
    for stage in plan.stages:
        scattered = stage.steps is not None and config.finetune.deepspeed is not None
        if not stage.gpus_per_worker or scattered or (left is not None and stage.name not in left):
            continue
        held = int(stage.memory.get("weights", 0)) if lifted else stage.gpu_bytes
        if held > (fillable := memory.fillable(stage.gpus_per_worker)):
            raise ConfigError(
                f"{stage.name} is planned to hold {size_up(held)}{' of weights' if lifted else ''} of a GPU of which"
                f" {size(fillable)} can be filled: {_advice(stage, plan.prepared)}"
                f"{'' if lifted else '; memory_budget: null tries it all the same'}."
            )


def _advice(stage: StagePlan, prepared: Prepared) -> str:
    """What to change where a stage takes more of its GPU than there is; without a budget only what makes its weights smaller."""
    if stage.name in _BY_WEIGHTS:
        return "set emulator.gpus_per_worker to 0"
    config = prepared.config
    ratio = "compression_ratio" if config.emulator.budget is None else "budget"
    batch = "" if config.memory_budget is None else "its batch, data.max_seq_length or "
    refined = ", remove emulator.refinement" if stage.name == "refine" else ""
    return (
        f"lower {batch}emulator.{ratio} (emloc-ray plan --memory-budget says what fits){refined}, or set its section's"
        " gpus_per_worker to 0"
    )


def missing_disk(plan: Plan, run: RunDirectory, left: Container[str]) -> int:
    """The bytes that the run directory still grows by at most: those of the stages that are ``left``, without what lies in the
    folders of each, which it goes on from or removes."""
    stages = [stage for stage in plan.stages if stage.name in left]
    return sum(max(0, stage.disk_bytes - _bytes_below(run, stage.folders)) for stage in stages)


def _bytes_below(run: RunDirectory, folders: Sequence[str]) -> int:
    return sum(sum(sizes(run.path(folder)).values()) for folder in folders)


def within_budget(prepared: Prepared, stages: Sequence[Costed] = (), speeds: Speeds | None = None) -> Choice:
    """What can be trained on within the config's ``memory_budget``, and the settings that fit; what one of the ``stages`` would
    refuse is not recommended where there is another. Raises ConfigError where none fit."""
    speeds = speeds or assumed_speeds()

    def runs(candidate: Prepared) -> bool:
        try:
            check_holding(candidate)
            check_stages(make_plan(stages, shrink_batches(candidate), speeds))
        except ConfigError:
            return False
        return True

    return choose_training(prepared, longest_lengths(prepared), speeds, runs)
