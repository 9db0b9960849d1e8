"""What one module runs in, and why."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import FormatError, PlanError
from ..formats import get_format
from .encoding import plain
from .mistakes import one_line

STORED = ("fp32", "bf16", "fp16")
"""Formats parameters can be stored in."""

Compute = Literal["fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2"]
Stored = Literal["fp32", "bf16", "fp16"]
Json = Annotated[dict[str, Any], BeforeValidator(plain)]
Number = Annotated[float, BeforeValidator(plain)]


def short_name(value: Any) -> Any:
    """ "float16" -> "fp16"; what is no format's name passes, for the field to refuse."""
    try:
        return get_format(value).name if isinstance(value, str) else value
    except FormatError:
        return value


class Value(BaseModel):
    """A frozen record whose mistakes are one-line PlanErrors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PlanError(one_line(error, type(self))) from None


class Reason(Value):
    """Why a module got its format.

    code: a short word ("overflow", "flushed", "swallowed", "cost", "default", "group", "user", ...). text: a plain
    sentence with the numbers in it. site: the tensor it speaks of. numbers: the same numbers for machines.
    """

    code: str
    text: str
    site: Annotated[str | None, BeforeValidator(lambda v: None if v is None else str(v))] = None
    numbers: Annotated[dict[str, float], BeforeValidator(plain)] = Field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


class LayerPrecision(Value):
    """What one module runs in.

    compute: format of its arithmetic. policy: "autocast" (PyTorch's op lists decide inside) or "cast" (everything in it
    runs in `compute`); no difference for fp32 and tf32. params: format its parameters are stored in; where not given,
    `compute` under "cast" if it can be stored, else fp32 (master weights). reasons: Reason or plain text, most
    important first. evidence: JSON for later readers.
    """

    compute: Annotated[Compute, BeforeValidator(short_name)] = "fp32"
    policy: Literal["autocast", "cast"] = "autocast"
    params: Annotated[Stored, BeforeValidator(short_name)] = "fp32"
    reasons: Annotated[tuple[Reason | str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    evidence: Json = Field(default_factory=dict)

    def __init__(self, compute: str = "fp32", **data: Any) -> None:
        super().__init__(compute=compute, **data)

    @model_validator(mode="before")
    @classmethod
    def _default_params(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("params") is None and data.get("policy") == "cast":
            short = short_name(data.get("compute", "fp32"))
            data = {**data, "params": short if short in STORED else "fp32"}
        return data

    @property
    def precision(self) -> tuple[str, str, str]:
        """(compute, policy, params): what makes two layers run alike. The policy of fp32 and tf32 does not count."""
        return self.compute, "autocast" if self.compute in ("fp32", "tf32") else self.policy, self.params

    def __str__(self) -> str:
        words: list[str] = [self.compute]
        if self.precision[1] == "cast":
            words.append("cast")
        if self.params != "fp32":
            words.append(f"params {self.params}")
        return " ".join(words)
