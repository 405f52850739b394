"""The emulator's section of a config."""

from __future__ import annotations

import re
import typing
from typing import Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from emloc_ray.config.base import Patterns, Section, Size, StageConfig
from emloc_ray.text import shown

_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bits?\s*")
_SIZE: TypeAdapter[int] = TypeAdapter(Size)
# What a budget decides, each with the values that do not contradict it.
DECIDED: dict[str, tuple[Any, ...]] = {
    "compression_ratio": (),
    "ratios": ({},),
    "quantization": ("none",),
    "residual_rank": (0,),
    "allocation": ("sensitivity",),
}


def _budget(value: Any) -> Any:
    """``2.3 bits`` or a size; a number alone could be either."""
    if isinstance(value, str) and _BITS.fullmatch(value) and float(value.split("b")[0]) > 0:
        return value
    if isinstance(value, str) and value.strip()[-1:].isalpha():
        try:
            _SIZE.validate_python(value)
        except ValidationError:
            pass
        else:
            return value
    raise ValueError(f"{shown(value)} is no budget: give bits a weight or bytes in all, such as 2.3 bits or 1.5GiB")


class HealingConfig(Section):
    """Distils the original into the emulator before the task's adapter is trained: a LoRA that becomes part of the factors.
    Other settings, and the workers, are those of ``finetune``, without packing, LoRA+ and evaluation."""

    steps: int = Field(ge=1, description="optimizer steps")
    r: int = Field(8, ge=1, description="taken from each layer's rank and given back by the healing")
    lora_alpha: float = Field(16, gt=0, description="scale of its update, times r")
    learning_rate: float | None = Field(None, gt=0, description="left out: finetune's")
    per_device_train_batch_size: int | None = Field(None, ge=1, description="left out: finetune's")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="left out: finetune's")
    num_teacher_logits: int = Field(64, ge=1, description="top logits of the original to cache for each label")
    loss_on: Literal["completion", "all"] = Field("all", description="the tokens to distil at")


class RefinementConfig(Section):
    """Fits each block's factors and integers to what the original's block gives, before healing: one block at a time, on the
    calibration rows, at the same bytes (AA-SVD, arXiv 2604.02119)."""

    steps: int = Field(ge=1, description="steps for each block, of calibration.batch_size rows each")
    learning_rate: float = Field(1e-2, gt=0, description="step size, as a share of what it changes")


class EmulatorConfig(StageConfig):
    """The compressed model."""

    compression_ratio: float = Field(0.5, gt=0, le=1, description="the share of parameters kept; 1: all of them")
    budget: typing.Annotated[str, BeforeValidator(_budget)] | None = Field(
        None,
        description="in place of a ratio: bits a weight or bytes in all, spent on ranks and bits where they tell most",
    )
    ratios: dict[str, float] = Field(default_factory=dict, description="pattern: ratio, the first match wins")
    target_modules: Patterns | None = Field(None, description="left out: every linear inside the blocks")
    exclude_modules: Patterns | None = Field(
        None,
        description="linears that get no factors: stored as quantization says, by intN to the nearest; under a budget dense",
    )
    dampening_frac: float = Field(1e-6, gt=0, lt=1, description="share of a Gram's mean diagonal that is added to it")
    quantization: Literal["none", "nf4", "int8", "int4", "int3", "int2"] = Field(
        "none", description="bits of the linears inside the blocks: nf4 as QLoRA's, intN rounded under the Grams"
    )
    group_size: int = Field(64, ge=8, multiple_of=8, description="of intN: columns that share a scale")
    residual_rank: int = Field(0, ge=0, description="of intN: factors of what the integers of a dense linear leave")
    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform", description="ranks: all alike, or by their effect on predictions"
    )
    objective: Literal["activations", "predictions", "weights"] = Field(
        "activations",
        description="what factors keep: their layer's outputs, the model's predictions (under a budget by default), its weights",
    )
    storage: Literal["factors", "pivoted"] = Field(
        "factors", description="pivoted: the same product in fewer numbers, so that ranks are higher at a ratio"
    )
    rank_multiple: Literal["auto"] | typing.Annotated[int, Field(ge=1)] = Field(
        "auto", description="what ranks are multiples of; auto: 64 in large linears, 8 in small ones, 1 in tiny ones"
    )
    gradient_dampening_frac: float = Field(1e-2, gt=0, lt=1, description="as dampening_frac, for the sums of gradients")
    refinement: RefinementConfig | None = Field(
        None, description="each block's factors and integers fitted together to the original's block"
    )
    healing: HealingConfig | None = Field(None, description="distillation of the original into it, before training")

    @field_validator("healing", "refinement", mode="before")
    @classmethod
    def _has_steps(cls, value: Any, info: ValidationInfo) -> Any:
        if value is True:
            raise ValueError(f"give steps, such as {info.field_name}: {{steps: 20}}")
        return None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _budget_alone_decides(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("budget") is None:
            return values
        values = {key: value for key, value in values.items() if value is not None or key not in DECIDED}
        given = [key for key in DECIDED if key in values and values[key] not in DECIDED[key]]
        if given:
            raise ValueError(
                f"budget: {values['budget']} decides every linear's ranks and bits, and {given[0]} is given too: remove one of"
                f" them, or set the other to null: budget: null, or {given[0]}: null"
            )
        values = {key: value for key, value in values.items() if key not in DECIDED}
        # It is spent by what predictions lose, for which their gradients are summed anyway.
        return values if values.get("objective") is not None else {**values, "objective": "predictions"}

    @model_serializer(mode="wrap")
    def _without_what_a_budget_decides(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {k: v for k, v in values.items() if k not in DECIDED} if values.get("budget") is not None else values

    @property
    def budget_bits(self) -> float | None:
        """Bits a weight that the budget gives; None where it is in bytes, or there is none."""
        bits = _BITS.fullmatch(self.budget or "")
        return float(bits[1]) if bits else None

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of the whole emulator that the budget gives; None where it is in bits, or there is none."""
        return None if self.budget is None or self.budget_bits is not None else int(_SIZE.validate_python(self.budget))

    @property
    def bits(self) -> int | None:
        """Bits of the integers that linears are stored in; None where they are not."""
        return int(self.quantization.removeprefix("int")) if self.quantization.startswith("int") else None

    @model_validator(mode="after")
    def _settings_agree(self) -> EmulatorConfig:
        if self.bits is None and self.residual_rank:
            raise ValueError(
                f"residual_rank: {self.residual_rank} is of factors beside integers: set quantization to int2, int3, int4"
                " or int8, or remove it"
            )
        if self.bits is not None and self.storage == "pivoted":
            raise ValueError(
                f"storage: pivoted does not go with quantization: {self.quantization}: take factors, or nf4"
            )
        if self.refinement is not None and self.quantization == "nf4" and self.healing is None:
            raise ValueError(
                "refinement fits floats and integers, and quantization: nf4 is neither: take int4, remove one of them, or add"
                " healing, after which it rounds"
            )
        if self.budget is not None and self.objective == "weights":
            raise ValueError(
                "objective: weights reads no data, which a budget is spent by: take activations or predictions"
            )
        return self

    @property
    def asks_for_gradients(self) -> str | None:
        """The setting that needs gradients of the model's predictions; None where none does."""
        if self.budget is not None:
            return "emulator.budget"
        if self.compression_ratio == 1:
            return None
        if self.objective == "predictions":
            return "emulator.objective: predictions"
        return "emulator.allocation: sensitivity" if self.allocation == "sensitivity" else None

    @property
    def refines(self) -> RefinementConfig | None:
        """The refinement; None where the emulator has neither factors nor integers to fit."""
        return None if self.compression_ratio == 1 and self.bits is None else self.refinement

    @property
    def heals(self) -> HealingConfig | None:
        """The healing; None where nothing is compressed."""
        return None if self.compression_ratio == 1 else self.healing

    @field_validator("ratios")
    @classmethod
    def _ratios_in_range(cls, ratios: dict[str, float]) -> dict[str, float]:
        for pattern, ratio in ratios.items():
            if not 0 < ratio <= 1:
                raise ValueError(f"the ratio of {pattern!r} is {ratio}: give one above 0 and up to 1")
        return ratios
