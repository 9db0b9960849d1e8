"""Plans made safer, module by module, their phases included.

A promotion lifts the code of one module: those within it keep the format they have (attention whose logits overflow
need not take its linear layers along). It never lowers: where a phase computes safer already, that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...attribution import unwrap
from ...plans import LayerPrecision, PrecisionPlan, Reason
from ...plans.model import Phase

SAFETY = ("e5m2", "e4m3", "fp16", "bf16", "tf32", "fp32")
"""From the format that fails first to that which fails last."""
OUTSIDE, EVERYTHING = "(outside)", "(all)"
"""Targets that are no module's name: code outside every module, and the whole model."""


def safer(compute: str) -> tuple[str, ...]:
    """The formats to try in place of `compute`, next one first."""
    if compute in ("fp32", "tf32"):
        return ("fp32",) if compute == "tf32" else ()
    return ("fp32",) if compute == "bf16" else ("bf16", "fp32")


@dataclass(frozen=True)
class Promotion:
    """target: FQN, OUTSIDE or EVERYTHING. compute: its format from here on; "": its parameters' storage alone changes.
    params: storage of its parameters, None: as it is. reason: why, in words."""

    target: str
    compute: str
    reason: str
    params: str | None = None

    def to_list(self) -> list[str]:
        """For a checkpoint."""
        return [self.target, self.compute, self.reason, self.params or ""]

    @classmethod
    def from_list(cls, values: list[str]) -> Promotion:
        """Inverse of to_list."""
        return cls(values[0], values[1], values[2], values[3] or None)


class Names:
    """The names of a model's modules: every one, and which are one and the same module."""

    def __init__(self, model: nn.Module) -> None:
        pairs = list(unwrap(model).named_modules(remove_duplicate=False))
        self.every = [name for name, _ in pairs]
        alike: dict[int, list[str]] = {}
        for name, module in pairs:
            alike.setdefault(id(module), []).append(name)
        self._alike = {name: alike[id(module)] for name, module in pairs}
        self._children: dict[str, list[str]] = {}
        for name in self.every:
            if name:
                self._children.setdefault(name.rpartition(".")[0], []).append(name)

    def alike(self, name: str) -> list[str]:
        """All names of the module called `name`."""
        return self._alike.get(name, [name])

    def children(self, name: str) -> list[str]:
        """The names directly below."""
        return self._children.get(name, [])


def format_of(plan: PrecisionPlan, target: str) -> str:
    """What `target` computes in, by a plan without phases; of EVERYTHING the least safe format."""
    if target == OUTSIDE:
        return plan.default.compute
    if target == EVERYTHING:
        return min((p.compute for p in [plan.default, *plan.modules.values()]), key=SAFETY.index)
    return plan[target].compute


def amended(plan: PrecisionPlan, promotions: Iterable[Promotion], names: Names) -> PrecisionPlan:
    """`plan` with all `promotions` made, in order, in all its phases."""
    promotions = list(promotions)
    if not promotions:
        return plan

    def change(bare: PrecisionPlan) -> PrecisionPlan:
        for promotion in promotions:
            bare = _promoted(bare, promotion, names)
        return bare

    return _everywhere(plan, change).replace(confirmed=None)


def _everywhere(plan: PrecisionPlan, change: Callable[[PrecisionPlan], PrecisionPlan]) -> PrecisionPlan:
    """`change` made to the plan and to that of each phase."""
    phases = []
    for phase in plan.phases:
        if phase.precision == "plan":
            phases.append(phase)
            continue
        inner = phase.plan
        if inner is None:
            inner = plan.replace(phases=(phase,)).at_step(phase.from_step)
        phases.append(Phase(from_step=phase.from_step, plan=_everywhere(inner, change)))
    return change(plan.replace(phases=())).replace(phases=tuple(phases))


def _promoted(plan: PrecisionPlan, promotion: Promotion, names: Names) -> PrecisionPlan:
    if promotion.target == EVERYTHING:
        return plan.replace(
            default=_lifted(plan.default, promotion),
            modules={key: _lifted(entry, promotion) for key, entry in plan.modules.items()},
        )
    if promotion.target == OUTSIDE:
        modules = {"": plan[""], **plan.modules}
        return plan.replace(default=_lifted(plan.default, promotion), modules=modules)
    own = names.alike(promotion.target)
    within = [child for name in own for child in names.children(name)]
    before = plan.resolve([*own, *within])
    lifted = {name: _lifted(before[name], promotion) for name in own}
    if all(lifted[name] == before[name] for name in own):
        return plan
    entries: dict[str, Any] = {**plan.modules, **lifted}
    amended = plan.replace(modules=entries)
    now = amended.resolve(within)
    kept = {child: before[child] for child in within if child not in own and now[child] != before[child]}
    return amended.replace(modules={**entries, **kept}) if kept else amended


def _lifted(layer: LayerPrecision, promotion: Promotion) -> LayerPrecision:
    compute = promotion.compute or layer.compute
    if SAFETY.index(compute) <= SAFETY.index(layer.compute):
        compute = layer.compute
    params = promotion.params or layer.params
    if (compute, params) == (layer.compute, layer.params):
        return layer
    reason = Reason(code="guard", text=promotion.reason)
    return LayerPrecision(
        compute, policy=layer.policy, params=params, reasons=(reason, *layer.reasons), evidence=layer.evidence
    )
