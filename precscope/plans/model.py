"""The plan as a value."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from typing_extensions import TypedDict

from ..errors import PlanError
from . import files
from .differences import PlanDiff, differences
from .encoding import plain
from .layers import Compute, Json, LayerPrecision, Number, Value, short_name
from .lookup import Lookup
from .table import text_of


def _layer(value: Any) -> Any:
    return {"compute": value} if isinstance(value, str) else value


class LossScale(TypedDict, total=False):
    """initial: the loss scale to start with. interval: [lo, hi], exponents of 2 that are safe. floor: below this
    scale gradients are lost; engines with such a setting get it, precscope's own scaler goes below where it must.
    growth_interval: steps without overflow before it doubles. lo_site, hi_site: what binds the interval."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    initial: Number
    interval: Annotated[Annotated[list[float], Field(min_length=2, max_length=2)] | None, BeforeValidator(plain)]
    floor: Number
    growth_interval: int
    lo_site: str | None
    hi_site: str | None


class Phase(Value):
    """From optimizer step `from_step` on, train with `plan`, or with `precision` ("plan": the plan that holds this
    phase; else one format for the whole model, by autocast)."""

    from_step: Annotated[int, Field(ge=0)]
    precision: Annotated[Literal["plan"] | Compute | None, BeforeValidator(short_name)] = None
    plan: PrecisionPlan | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Phase:
        if (self.precision is None) == (self.plan is None):
            raise ValueError("precision: a phase has either precision or plan, not both, not neither")
        return self


class PrecisionPlan(Value):
    """The precision of every module of a model, and what training with it needs. See the package's docstring.

    loss_scale: LossScale, empty where no fp16 gradient needs one. optimizer: state dtype, eps, warnings. phases: plans
    over time, first step first. confirmed: what a measured confirmation found, None where the plan is only predicted.
    made_from: run, limits, versions. Raises PlanError, one line that names the field and what is allowed.
    """

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    default: Annotated[LayerPrecision, BeforeValidator(_layer)] = LayerPrecision()
    modules: Annotated[
        dict[str, LayerPrecision],
        BeforeValidator(lambda v: {k: _layer(p) for k, p in v.items()} if isinstance(v, dict) else v),
    ] = Field(default_factory=dict)
    loss_scale: LossScale = Field(default_factory=LossScale)
    optimizer: Json = Field(default_factory=dict)
    phases: Annotated[tuple[Phase, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    confirmed: Annotated[dict[str, Any] | None, BeforeValidator(plain)] = None
    made_from: Json = Field(default_factory=dict)

    _lookup: Lookup = PrivateAttr(default=Lookup())

    @model_validator(mode="after")
    def _phases_in_order(self) -> PrecisionPlan:
        steps = [p.from_step for p in self.phases]
        if steps != sorted(set(steps)):
            raise ValueError(f"phases: from_step must rise from phase to phase, got {steps}")
        return self

    def model_post_init(self, context: Any) -> None:
        self._lookup = Lookup.of(self.modules)

    @classmethod
    def uniform(cls, compute: str, *, policy: str = "autocast", params: str | None = None) -> PrecisionPlan:
        """One precision for the whole model. params: as for LayerPrecision."""
        return cls(default=LayerPrecision(compute, policy=policy, **({"params": params} if params else {})))

    def replace(self, **changes: Any) -> PrecisionPlan:
        """A plan like this one but for `changes` (fields by name), checked like a new one."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    # Look-up

    def __getitem__(self, name: str) -> LayerPrecision:
        return self._of(self.source(name))

    def source(self, name: str) -> str | None:
        """The key of `modules` that decides for module `name`, None where `default` does."""
        return self._lookup.sources([name])[name]

    def sources(self, names: Iterable[str]) -> dict[str, str | None]:
        """`source` of each name; quick for many."""
        return self._lookup.sources(names)

    def resolve(self, names: Iterable[str]) -> dict[str, LayerPrecision]:
        """The precision of each name. Raises PlanError where two patterns match."""
        return {name: self._of(key) for name, key in self.sources(names).items()}

    def _of(self, key: str | None) -> LayerPrecision:
        return self.default if key is None else self.modules[key]

    def check(self, names: Iterable[str]) -> None:
        """Whether the plan fits a model with modules `names`. Raises PlanError: a key that the model lacks (with the
        nearest names), a pattern that matches nothing, a module that two patterns match."""
        self._lookup.check(names)

    def at_step(self, step: int) -> PrecisionPlan:
        """The plan in force at optimizer step `step`, by `phases`; it has no phases itself."""
        now = next((p for p in reversed(self.phases) if p.from_step <= step), None)
        if now is None or now.precision == "plan":
            return self.replace(phases=())
        if now.plan is not None:
            return now.plan.at_step(step)
        assert now.precision is not None
        return self.replace(default=LayerPrecision(now.precision), modules={}, phases=(), confirmed=None)

    # Comparing, saving, showing

    @property
    def status(self) -> str:
        """ "confirmed" where a measurement confirmed the plan, else "predicted"."""
        return "confirmed" if self.confirmed and self.confirmed.get("passed", True) else "predicted"

    def diff(self, other: PrecisionPlan, *, names: Iterable[str] | None = None) -> PlanDiff:
        """What changes from this plan to `other`: per module of `names` where given, else per key that either has;
        then the loss scale, the optimizer and the phases. Reasons and evidence do not count."""
        return differences(self, other, names)

    def to_json(self) -> str:
        """The text of plan.json."""
        return files.text_from(self.model_dump(by_alias=True))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan; the file is complete or absent. Raises RunDirectoryError where it cannot be written."""
        path = Path(path)
        files.write(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecisionPlan:
        """Read a plan. Raises PlanError where the file is missing, is no JSON, or holds no plan of this schema."""
        text = files.read(Path(path))
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> PrecisionPlan:
        """The plan that `text` holds. Raises PlanError."""
        return cls(**files.data_from(text))

    def counts(self, names: Iterable[str] | None = None) -> Counter[str]:
        """How many modules of `names` (of the plan's own entries where not given) compute in each format."""
        layers = self.modules.values() if names is None else self.resolve(names).values()
        return Counter(layer.compute for layer in layers)

    def __str__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        from ..reporting.notebook import plan_html

        return plan_html(self)


Phase.model_rebuild()
