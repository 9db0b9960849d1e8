"""The plan that an integration is given: an object or a file."""

from __future__ import annotations

from pathlib import Path

from ..errors import PlanError
from ..plans import PrecisionPlan


def read_plan(plan: PrecisionPlan | str | Path) -> PrecisionPlan:
    """`plan`, or the one in the file of that name. Raises PlanError for a plan with phases, too."""
    if isinstance(plan, str | Path):
        plan = PrecisionPlan.load(plan)
    if not isinstance(plan, PrecisionPlan):
        raise PlanError(f"plan must be a PrecisionPlan or the path of one, not {type(plan).__name__}")
    if plan.phases:
        raise PlanError(
            "this plan has phases, which only precscope's own trainer (ps.train) switches between: "
            "give one of them, plan.at_step(step)"
        )
    return plan
