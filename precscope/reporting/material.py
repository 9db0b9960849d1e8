"""What the verdict is made from, and the small questions it asks of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..formats import FloatFormat, get_format
from ..profiles import Profile
from ..sites import Role, Site
from .rows import PlanRow

if TYPE_CHECKING:
    import pandas as pd

    from ..advice.headroom import Headroom
    from ..comparison import Against, RunRow
    from ..plans import PrecisionPlan

GRADIENTS = ("grad_input", "grad_output", "grad_weight")
FORWARD = ("input", "output", "weight")
WIDE = 100  # a format whose largest exponent is this or more has the range of fp32


@dataclass(frozen=True)
class Material:
    """What the verdict is made from. runs, baseline: rows of a comparison and the name of the run they refer to.
    pairs: the other runs against it."""

    profile: Profile
    plan: PrecisionPlan | None
    rows: tuple[PlanRow, ...]
    runs: tuple[RunRow, ...]
    baseline: str
    pairs: tuple[Against, ...] = ()

    @property
    def confirmed(self) -> bool:
        """Whether a measurement confirmed the plan."""
        return self.plan is not None and self.plan.status == "confirmed"

    @property
    def failed(self) -> bool:
        """Whether the recorded run ended with an error."""
        return self.profile.run.get("status") == "failed"

    @property
    def low(self) -> list[PlanRow]:
        """Modules that compute low."""
        return [r for r in self.rows if r.low]

    @property
    def high(self) -> list[PlanRow]:
        """Modules that stay in fp32, tf32 or fp64."""
        return [r for r in self.rows if not r.low]

    @property
    def low_share(self) -> float | None:
        """Share of the FLOPs in low precision, None where FLOPs were not counted."""
        if not any(r.flops_share for r in self.rows):
            return None
        return sum(r.flops_share or 0.0 for r in self.low)

    @property
    def base_run(self) -> RunRow | None:
        """The run that the others are measured against."""
        return next((r for r in self.runs if r.run == self.baseline), None)

    @property
    def plan_run(self) -> RunRow | None:
        """The run that trained with a plan."""
        return next((r for r in self.runs if r.precision == "plan"), None)

    @cached_property
    def formats(self) -> list[FloatFormat]:
        """The low formats in question: those of the plan, or fp16 and bf16; most used first."""
        used = Counter(r.compute for r in self.low)
        return [get_format(name) for name, _ in used.most_common()] or [get_format("fp16"), get_format("bf16")]

    def ask(self, fmt: FloatFormat, roles: Sequence[str], scale_exponent: int = 0) -> pd.DataFrame:
        """Profile.ask, of the modules that the plan runs in `fmt` where there is a plan."""
        frame = self.profile.ask(fmt, scale_exponent=scale_exponent, roles=roles)
        if self.plan is not None and self.low:
            frame = frame[frame.module.isin({r.module for r in self.rows if r.compute == fmt.name})]
        return frame

    def nearest(self, fmt: FloatFormat) -> list[Headroom]:
        """The forward sites by their head-room in `fmt`, least first, of the modules that the plan runs in it where
        there is a plan. What a large value only passes through is left out, see advice.headroom."""
        from ..advice.headroom import headroom

        found = headroom(self.profile, fmt, roles=(Role.OUTPUT, Role.INPUT, Role.WEIGHT), limit=None)
        if self.plan is None or not self.low:
            return found
        chosen = {r.module for r in self.rows if r.compute == fmt.name}
        return [h for h in found if h.site.module in chosen]


def head_room(fmt: FloatFormat, amax: float) -> float:
    """Binades from a largest magnitude to the format's largest finite value; negative beyond it."""
    return math.log2(fmt.max / amax)


def site_name(row: Any) -> str:
    """Module and role of a row of Profile.ask in one: "blocks.0.fc1.output", "[bias]" behind it where a row is one of
    several tensors."""
    return str(Site(row.module, Role(row.role), int(row.call), getattr(row, "tensor", "")))


def overall(frame: pd.DataFrame, column: str) -> float | None:
    """A share over all elements of all rows."""
    total = frame["count"].sum()
    return float((frame[column] * frame["count"]).sum() / total) if total else None


def known(x: float | None) -> bool:
    """Whether a figure of a run was measured."""
    return x is not None and math.isfinite(x)


def signed(change: float) -> str:
    """A relative change as percent with its sign."""
    return f"{'+' if change >= 0 else ''}{100 * change:.2f}%"


def listed(words: Sequence[str]) -> str:
    """Words as "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""
