"""The settings of the training on the emulator."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, StrictBool, field_validator, model_validator

from emloc_ray.config.base import StageConfig


class FinetuneConfig(StageConfig):
    """Training on the emulator; every other key is a Hugging Face TrainingArguments field."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    together: ClassVar[bool] = True

    loss_on: Literal["completion", "all"] = Field("completion", description="the tokens of a row to learn")
    max_steps: int = Field(-1, description="optimizer steps; -1: num_train_epochs of the data")
    num_train_epochs: float = Field(
        1.0, gt=0, description="passes over the data, where max_steps is -1; the last step is full"
    )
    per_device_train_batch_size: int = Field(8, ge=1, description="rows of a worker's forward pass")
    gradient_accumulation_steps: int = Field(1, ge=1, description="passes a step")
    learning_rate: float = Field(2e-4, gt=0, description="peak of the schedule (lr_scheduler_type)")
    loraplus_lr_ratio: float | None = Field(None, ge=1, description="LoRA+: lora_B learns at so many times the rate")
    bf16: Literal["auto"] | StrictBool = Field(
        "auto", description="mixed precision; auto: where the worker's GPU has it"
    )
    packing: bool = Field(
        False,
        description="rows in sequences of data.max_seq_length that do not see each other; a batch's rows are these",
    )
    gradient_checkpointing: bool = Field(True, description="less memory, about a third more time")
    save_steps: int = Field(100, ge=1, description="steps between checkpoints, which a later try continues from")
    eval_strategy: Literal["no", "steps"] = Field("no", description="steps: the emulator is scored while it is trained")
    eval_steps: int | None = Field(None, ge=1, description="steps between scores; left out: save_steps")
    eval_original_every: int | None = Field(
        None, ge=1, description="scores between those of the original with the adapter; left out: it is not scored"
    )
    metric_for_best_model: Literal["eval_loss", "eval_original_loss"] = Field(
        "eval_loss", description="what the best adapter and early stopping go by: the loss on emulator or original"
    )
    num_validation_samples: int = Field(64, ge=1, description="rows kept from train for them, without data.validation")
    load_best_model_at_end: bool = Field(
        False, description="keep the adapter of the lowest validation loss, not the last"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="scores in a row that are no better before training ends; left out: it does not"
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="nats a token that count as better")
    logging_steps: int = Field(10, ge=1, description="steps between losses")
    max_failures: int = Field(3, ge=0, description="lost workers to recover from before the run fails")
    exact_steps: int = Field(0, ge=0, description="further steps, on the original itself, of the corrected adapter")
    deepspeed: str | None = Field(None, description="path of a DeepSpeed JSON, from the working directory")

    @field_validator("max_steps")
    @classmethod
    def _one_step_or_more(cls, max_steps: int) -> int:
        if max_steps != -1 and max_steps < 1:
            raise ValueError(f"{max_steps} is no number of steps: give one, or -1 for num_train_epochs of the data")
        return max_steps

    @property
    def validates(self) -> bool:
        """Whether the emulator is scored while it is trained."""
        return self.eval_strategy == "steps"

    @property
    def scores_every(self) -> int:
        """Steps between scores."""
        return self.eval_steps or self.save_steps

    @model_validator(mode="after")
    def _scores_are_made(self) -> FinetuneConfig:
        names = ("eval_steps", "eval_original_every", "load_best_model_at_end", "early_stopping_patience")
        asked = [name for name in names if getattr(self, name)]
        asked += ["eval_on_start"] if (self.model_extra or {}).get("eval_on_start") else []
        if asked and not self.validates:
            raise ValueError(f"{asked[0]} needs validation losses: set eval_strategy to steps, or remove it")
        if self.metric_for_best_model == "eval_original_loss" and self.eval_original_every is None:
            raise ValueError(
                "metric_for_best_model: eval_original_loss needs scores of the original: set eval_original_every, or remove it"
            )
        if self.loraplus_lr_ratio is not None and self.deepspeed is not None:
            raise ValueError(
                "loraplus_lr_ratio does not go with deepspeed, which makes its optimizer itself: remove one of them"
            )
        if self.validates and self.deepspeed is not None:
            raise ValueError(
                "eval_strategy: steps does not go with deepspeed, which scatters what is scored: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _whole_gpus_in_a_group(self) -> FinetuneConfig:
        if self.num_workers > 1 and 0 < self.gpus < 1:
            raise ValueError(
                f"finetune.gpus_per_worker is {self.gpus:g}, and NCCL takes no two workers on one GPU: give 1, or num_workers: 1"
            )
        return self
