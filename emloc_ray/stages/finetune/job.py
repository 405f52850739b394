"""A training's job: where its artifacts are, and its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.modeling.compiling import is_compiled

if TYPE_CHECKING:
    from emloc_ray.data.processors import ImageInputs


@dataclass(frozen=True)
class OriginalJob:
    """How the adapter is scored on the original while it is trained: at each ``every``-th score, on an original that is
    opened as ``hold`` says and closed after it. ``decides``: these scores choose the best adapter and the end."""

    model_dir: Path
    every: int
    hold: str = "resident"
    decides: bool = False


@dataclass(frozen=True)
class ValidationJob:
    """How the emulator is scored while it is trained: on ``tokens_dir``, after each ``every`` steps.

    ``keeps_best``: the adapter of the lowest loss is the one that is saved. Training ends after ``patience`` scores in a row
    that are not better by more than ``threshold`` nats a token. ``original``: it is scored too.
    """

    tokens_dir: Path
    every: int
    batch_size: int
    keeps_best: bool = False
    patience: int | None = None
    threshold: float = 0.0
    original: OriginalJob | None = None

    @property
    def goes_by(self) -> str:
        """The loss that decides, as it is called in a line of the log."""
        return "original_loss" if self.original is not None and self.original.decides else "loss"


@dataclass(frozen=True)
class FinetuneJob:
    """Artifact paths and flat settings; ``adapter`` as :func:`~emloc_ray.modeling.adapter_methods.adapter_config` takes
    them. With ``teacher_dir`` the loss is the divergence from what a teacher says there, not that of the labels. With
    ``start_dir`` the adapter there is trained on, with the rows that come after ``steps_before`` steps. With ``pack_length``
    rows are packed into sequences of so many tokens, of which a batch has ``batch_size``.
    A step reads about ``tokens_a_step``; the stage was planned to take ``planned_s``, 0 where that is not known."""

    emulator_dir: Path
    tokens_dir: Path
    out_dir: Path
    storage_dir: Path
    name: str
    adapter: dict[str, Any]
    portable_targets: Any
    base_model: str
    max_steps: int
    batch_size: int
    seed: int = 0
    loss_on: str = "completion"
    pad_token_id: int = 0
    max_failures: int = 3
    training_arguments: dict[str, Any] = field(default_factory=dict)
    zero_config: dict[str, Any] | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    teacher_dir: Path | None = None
    stage: str = "finetune"
    hold: str = "resident"
    start_dir: Path | None = None
    steps_before: int = 0
    pack_length: int | None = None
    validation: ValidationJob | None = None
    loraplus_lr_ratio: float | None = None
    tokens_a_step: float = 0.0
    images: ImageInputs | None = None
    planned_s: float = 0.0
    folder: str = ""

    @property
    def place(self) -> Path:
        """Where its checkpoints are: in ``folder``, which is this try's own."""
        return self.storage_dir / self.folder / self.name

    @property
    def log_path(self) -> Path:
        """One JSON line per logged step, written by rank 0."""
        return self.storage_dir / f"{self.name}.log.jsonl"

    @property
    def validation_path(self) -> Path:
        """One JSON line per validation loss, written by rank 0."""
        return self.storage_dir / f"{self.name}.validation.jsonl"

    @property
    def events_dir(self) -> Path:
        """TensorBoard's event files, where ``report_to`` asks for them: they outlive the training and its restarts."""
        return self.storage_dir.parent / "tensorboard" / self.name

    @property
    def failure_path(self) -> Path:
        """One sentence per lost worker."""
        return self.storage_dir / f"{self.name}.failures.txt"

    @property
    def step_path(self) -> Path:
        """One JSON object, written by rank 0 now and then: how many steps are ``done``, and the newest line of the log."""
        return self.storage_dir / f"{self.name}.step"

    @property
    def begun_path(self) -> Path:
        """Its presence says that a worker has begun, and looks for :attr:`stop_path` now and then."""
        return self.storage_dir / f"{self.name}.begun"

    @property
    def out_of_memory_path(self) -> Path:
        """Its presence says that a worker of a group ran out of memory, as it would again."""
        return self.storage_dir / f"{self.name}.out_of_memory"

    @property
    def last_word_path(self) -> Path:
        """Why a worker ended itself, for its next step did not come."""
        return self.storage_dir / f"{self.name}.last_word.txt"

    @property
    def stop_path(self) -> Path:
        """Its presence asks the workers to save a checkpoint and end."""
        return self.storage_dir / f"{self.name}.stop"

    @property
    def leaves_traces(self) -> bool:
        """Whether the training changes its process for the next one: it sets switches of torch, compiles, has Liger replace a
        model's functions, or a tracker holds a run open."""
        arguments = self.training_arguments
        report_to = arguments.get("report_to") or "none"
        trackers = {report_to} if isinstance(report_to, str) else set(report_to)
        changes = any(arguments.get(key) for key in ("full_determinism", "tf32", "use_liger_kernel"))
        return changes or is_compiled(arguments) or bool(trackers - {"none", "tensorboard"})
