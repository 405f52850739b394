"""The adapter's section of a config; its keys beside LoRA's are PEFT's own."""

import typing
from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from emloc_ray.config.base import Patterns, Section

LORA_METHODS = ("lora", "rslora", "dora")
PROMPT_METHODS = ("prefix_tuning", "prompt_tuning")


class AdapterConfig(Section):
    """The adapter, in PEFT's names with PEFT's meaning.

    The keys below are those of LoRA, rsLoRA and DoRA. For another ``method`` every other key is a field of PEFT's own config
    of that method, with PEFT's default.
    """

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    method: Literal["lora", "rslora", "dora", "loha", "lokr", "vera", "ia3", "prefix_tuning", "prompt_tuning"] = Field(
        "lora", description="the kind of adapter"
    )
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: float = Field(16, gt=0, description="scale of the update, times r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the adapter's input")
    target_modules: Patterns | None = Field(None, description="every linear inside the model's blocks by default")
    exclude_modules: Patterns | None = Field(None, description="linears without an adapter")
    use_rslora: bool = Field(False, description="scale by the root of r; as method: rslora")
    rank_pattern: dict[str, typing.Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="pattern: r of these"
    )
    alpha_pattern: dict[str, typing.Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="pattern: lora_alpha of these"
    )
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = Field(
        True, description="PEFT's; false: no zeros, for tests"
    )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _leaves_the_base(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in ("gaussian", "orthogonal"):
            why = "reads the base's weights or inputs" if value in ("eva", "mica") else "changes the base's weights"
            raise ValueError(f"{value!r} is not supported, as it {why}: give true, false, gaussian or orthogonal")
        return value

    @model_validator(mode="after")
    def _is_orthogonal_by_pairs(self) -> "AdapterConfig":
        odd = [r for r in (self.r, *self.rank_pattern.values()) if r % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise ValueError(f"init_lora_weights: orthogonal pairs ranks, and {odd[0]} is odd: make r even")
        return self

    @property
    def is_lora(self) -> bool:
        """Whether it is LoRA or one of its variants."""
        return self.method in LORA_METHODS

    @property
    def is_prompt(self) -> bool:
        """Whether it changes what the model reads instead of its linears."""
        return self.method in PROMPT_METHODS

    @property
    def is_additive(self) -> bool:
        """Whether it adds to weights, so that its update can be corrected; DoRA's does before its rows are scaled."""
        return self.method not in ("ia3", *PROMPT_METHODS)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of PEFT's config of the method, without the modules: LoRA's keys, or those that are set."""
        values = self.model_dump(exclude={"method", "target_modules", "exclude_modules"})
        variants = {"use_rslora": self.use_rslora or self.method == "rslora", "use_dora": self.method == "dora"}
        return values | (variants if self.is_lora else {})

    @model_serializer(mode="wrap")
    def _of_the_method(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves LoRA's defaults out where another method is set."""
        values: dict[str, Any] = dump(self)
        shown = {"method", *self.model_fields_set}
        return values if self.is_lora else {key: value for key, value in values.items() if key in shown}
