"""A training's job: where its artifacts are, and its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emloc_ray.data.processors import ImageInputs


@dataclass(frozen=True)
class ValidationJob:
    """How the emulator is scored while it is trained: on ``tokens_dir``, after each ``every`` steps.

    ``keeps_best``: the adapter of the lowest loss is the one that is saved. Training ends after ``patience`` scores in a row
    that are not better by more than ``threshold`` nats a token.
    """

    tokens_dir: Path
    every: int
    batch_size: int
    keeps_best: bool = False
    patience: int | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class FinetuneJob:
    """Artifact paths and flat settings; ``adapter`` as :func:`~emloc_ray.modeling.adapter_methods.adapter_config` takes
    them. With ``teacher_dir`` the loss is the divergence from what a teacher says there, not that of the labels. With
    ``start_dir`` the adapter there is trained on, with the rows that come after ``steps_before`` steps. With ``pack_length``
    rows are packed into sequences of so many tokens, of which a batch has ``batch_size``.
    A step reads about ``tokens_a_step``."""

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
        """The number of steps that are done, written by rank 0 now and then, in a file system."""
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
    def stop_path(self) -> Path:
        """Its presence asks the workers to save a checkpoint and end."""
        return self.storage_dir / f"{self.name}.stop"
