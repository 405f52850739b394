"""The base of a config's sections: strict about names and sizes."""

import re
import typing
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from emloc_ray.text import shown

Patterns = str | typing.Annotated[list[str], Field(min_length=1)]

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:[kmgtpe]i?b|[kmgtpe]|b)?\s*", re.IGNORECASE)
_LEAST_BYTES = 4096  # of a size without a unit: less was meant in another one


def _whole_size(value: Any) -> Any:
    """pydantic reads the beginning of a size and ignores the rest: 1,5GiB would be a byte. A small number lacks its unit."""
    if isinstance(value, bool) or not (whole := _SIZE.fullmatch(str(value))):
        raise ValueError(f"{shown(value)} is no size: give a number and a unit, such as 24GiB")
    if whole[1] == str(value).strip() and 0 < float(whole[1]) < _LEAST_BYTES:
        raise ValueError(f"{whole[1]} is {whole[1]} bytes: write {whole[1]}GiB")
    return value


Size = typing.Annotated[ByteSize, BeforeValidator(_whole_size), Field(ge=1)]
Budget = typing.Annotated[
    typing.Annotated[Literal["inference"], Tag("inference")] | typing.Annotated[Size, Tag("function-size")],
    Discriminator(lambda value: "inference" if value == "inference" else "function-size"),
]
"""A size, or what inference of the original takes."""


class Section(BaseModel):
    """Base of every section: frozen; unknown names are errors, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    bare: ClassVar[str] = ""
    """The key that a text or a list in the section's place sets; none where it has to be a mapping."""

    @model_validator(mode="before")
    @classmethod
    def _from_bare(cls, values: Any) -> Any:
        return {cls.bare: values} if cls.bare and isinstance(values, str | list) else values

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for the number 1."""
        bools = [each for each in _singles(value) if isinstance(each, bool)]
        if bools:
            types = _types(cls.model_fields[str(info.field_name)].annotation)
            if bool not in types and (int in types or float in types):
                raise ValueError(f"{str(bools[0]).lower()} is no number: give one")
        return value


def _singles(value: Any) -> list[Any]:
    """What a value holds, its own items and those of what is in it."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if items is None else [each for item in items for each in _singles(item)]


def _types(annotation: Any) -> list[Any]:
    """An annotation and all that it is made of."""
    return [annotation, *(each for part in typing.get_args(annotation) for each in _types(part))]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key of this type has for a value; None where it has none."""
    options = (annotation, *typing.get_args(annotation))
    # list[str] passes for a type in Python 3.10.
    types = [option for option in options if isinstance(option, type) and typing.get_origin(option) is None]
    return next((option for option in types if issubclass(option, Section)), None)


class StageConfig(Section):
    """What a stage asks of Ray."""

    num_workers: int = Field(1, ge=1, description="workers at once")
    cpus_per_worker: float = Field(1, ge=0, description="cores and torch threads of one worker")
    gpus_per_worker: Literal["auto"] | typing.Annotated[float, Field(ge=0, le=1)] = Field(
        "auto", description="of one worker, one at most; auto: one where Ray has some or can add some; 0: it sees none"
    )

    together: ClassVar[bool] = False
    """Whether all workers have to be there at once."""

    @property
    def workers_at_once(self) -> int:
        """How many workers have to be there at once."""
        return self.num_workers if self.together else 1

    @property
    def gpus(self) -> float:
        """GPUs of one worker; none as long as ``auto`` is not decided (:meth:`RunConfig.with_gpus`)."""
        return 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker
