"""What a plan is worth on a case: whom it keeps out of the format, who of them needed it, and whether it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .cases import Accepted

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

LARGEST_SHARE = 0.10
"""Share of leaf modules that a plan may keep high needlessly."""


def kept_high(plan: PrecisionPlan, names: Iterable[str], fmt: str, *, storage: bool) -> list[str]:
    """The modules of `names` that the plan computes in another format than `fmt`; with `storage` also those whose
    parameters it stores in another one."""
    layers = plan.resolve(names)
    return [n for n, p in layers.items() if p.compute != fmt or (storage and p.params != fmt)]


def is_named(high: Iterable[str], guilty: Sequence[str], accepted: Accepted) -> bool:
    """Whether all guilty modules that need it are among `high`, or a stand-in that cures alone is."""
    high = set(high)
    needed = set(guilty) - set(accepted.spared)
    return bool(needed) and (needed <= high or bool(high & set(accepted.stand_ins)))


def needless(high: Iterable[str], leaves: Iterable[str], guilty: Sequence[str], accepted: Accepted) -> list[str]:
    """The leaf modules among `high` that are neither guilty nor accepted, nor inside a module that is."""
    excused = {*guilty, *accepted.stand_ins, *accepted.spared}
    return [n for n in sorted(set(high) & set(leaves)) if not any(n == e or n.startswith(f"{e}.") for e in excused)]


@dataclass(frozen=True)
class Score:
    """One (case, format).

    failing: training in the format is to fail. values: how the runs "fp32", "low" and "planned" ended; fp32, low,
    planned: the same as text (planned: what it raised, where it did). low_fails: the plain run in the format did fail
    here. passed: the planned run did not. named: see `is_named`. high: module -> first reason, for every module kept
    high. needless: leaf modules kept high for nothing. high_leaves, leaves: how many leaf modules are kept high, and
    are called. status: of the plan, "confirmed" or "predicted". error: what broke the advice. seconds: in all.
    advice_s: for the advice.
    """

    case: str
    format: str
    failing: bool
    values: dict[str, float] = field(default_factory=dict)
    fp32: str = ""
    low: str = ""
    planned: str = ""
    low_fails: bool = False
    passed: bool = False
    named: bool = False
    high: dict[str, str] = field(default_factory=dict)
    needless: list[str] = field(default_factory=list)
    high_leaves: int = 0
    leaves: int = 0
    status: str = ""
    error: str | None = None
    seconds: float = 0.0
    advice_s: float = 0.0

    @property
    def share(self) -> float:
        """Needless leaves over leaves."""
        return len(self.needless) / self.leaves if self.leaves else 0.0

    @property
    def good(self) -> bool:
        """A failing pair is cured: the guilty are named and the planned run passes. Any other is quiet: it passes, and
        few modules are kept high."""
        if self.error is not None or not self.passed:
            return False
        return self.named if self.failing else self.share <= LARGEST_SHARE + 1e-9

    @property
    def verdict(self) -> str:
        """One word or two: what is right or wrong."""
        if self.error is not None:
            return "error"
        if not self.passed:
            return "named, fails" if self.failing and self.named else "fails"
        if self.failing:
            return "cured" if self.named else "not named"
        return "quiet" if self.good else "loud"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "share": self.share, "good": self.good, "verdict": self.verdict}


@dataclass(frozen=True)
class Summary:
    """Over all pairs. share: mean needless share of the failing pairs, NaN where there are none."""

    failing: int
    cured: int
    passing: int
    quiet: int
    share: float
    missing: list[str]

    @property
    def good(self) -> bool:
        """Everything cured and quiet, and little kept high needlessly."""
        few = math.isnan(self.share) or self.share <= LARGEST_SHARE + 1e-9
        return self.cured == self.failing and self.quiet == self.passing and few

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON (a share of NaN as None)."""
        return {**asdict(self), "share": None if math.isnan(self.share) else self.share, "good": self.good}


def summarise(scores: Sequence[Score]) -> Summary:
    """Counts and means of `scores`. missing: the pairs that are not good, "case fmt: verdict"."""
    failing = [s for s in scores if s.failing]
    passing = [s for s in scores if not s.failing]
    return Summary(
        failing=len(failing),
        cured=sum(s.good for s in failing),
        passing=len(passing),
        quiet=sum(s.good for s in passing),
        share=sum(s.share for s in failing) / len(failing) if failing else math.nan,
        missing=[f"{s.case} {s.format}: {s.verdict}" for s in scores if not s.good],
    )
