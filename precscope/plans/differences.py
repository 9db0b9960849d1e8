"""What changes from one plan to another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .layers import LayerPrecision, Value
from .lookup import is_pattern
from .mistakes import short

if TYPE_CHECKING:
    from .model import PrecisionPlan


class Difference(Value):
    """One difference between two plans: where, and what each has there."""

    where: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.where or '(root)'}: {self.before} -> {self.after}"


class PlanDiff(tuple[Difference, ...]):
    """The differences between two plans; prints one per line, and is empty (false) where they run alike."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no difference"


def differences(plan: PrecisionPlan, other: PrecisionPlan, names: Iterable[str] | None) -> PlanDiff:
    """See PrecisionPlan.diff."""
    found = [
        Difference(where=where, before=str(a) if a else "no entry", after=str(b) if b else "no entry")
        for where, a, b in _pairs(plan, other, names)
        if (a and a.precision) != (b and b.precision)
    ]
    for field in ("loss_scale", "optimizer", "phases"):
        before, after = getattr(plan, field), getattr(other, field)
        if before != after:
            found.append(Difference(where=field, before=_compact(before), after=_compact(after)))
    return PlanDiff(found)


def _pairs(
    plan: PrecisionPlan, other: PrecisionPlan, names: Iterable[str] | None
) -> Iterator[tuple[str, LayerPrecision | None, LayerPrecision | None]]:
    """What both have as default and for each of `names`, or at each key where these are not given."""
    yield "default", plan.default, other.default
    if names is not None:
        yield from ((name, plan[name], other[name]) for name in names)
    else:
        keys = dict.fromkeys([*plan.modules, *other.modules])
        yield from ((key, _at_key(plan, key), _at_key(other, key)) for key in keys)


def _at_key(plan: PrecisionPlan, key: str) -> LayerPrecision | None:
    """What holds at a key of another plan: None for a pattern this plan does not have word for word."""
    return plan.modules.get(key) if is_pattern(key) else plan[key]


def _compact(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"from {p.from_step}: {p.precision or 'another plan'}" for p in value) or "none"
    return ", ".join(f"{k} {short(v)}" for k, v in value.items()) or "none"
