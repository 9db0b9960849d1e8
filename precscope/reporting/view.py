"""What a report says, as plain rows: profile + plan + runs -> View. No HTML, no torch, no drawing.

Every renderer (html, text, figures) takes a View or parts of one, so that they say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiles import Profile
from . import headline, verdict
from .alike import merging
from .beside import Beside, beside
from .courses import Course, courses, run_names
from .material import Material
from .prices import priced_steps
from .provenance import provenance
from .rows import Fact, PlanRow, SiteRow, Statement, plan_rows, site_rows

if TYPE_CHECKING:
    from ..comparison import Comparison, RunRow
    from ..plans import Phase, PrecisionPlan


@dataclass(frozen=True)
class View:
    """All that a report shows.

    steps: recorded steps (the first of each merged group where there were many). format: the format that the what-if
    explorer opens with. shadow_steps: how many steps priced rounding. loss_scale: content of the plan's loss_scale.
    provenance: (heading, ((key, value), ...)). beside: the plan beside autocast. courses: how the runs went, a row per
    row of `runs`. merged_from: how many sites were recorded, where there were so many that those alike became one; 0
    where each has its own row. margin: what the comparison takes for no difference, as (share of the baseline's loss,
    the same in its unit); None where it judged no pair. phases: those of the plan, in words.
    confirmed: whether the plan was confirmed by a run of the model; None without a plan.
    """

    title: str
    subtitle: str
    lead: str
    facts: tuple[Fact, ...]
    statements: tuple[Statement, ...]
    next_step: str
    next_command: str
    sites: tuple[SiteRow, ...]
    steps: tuple[int, ...]
    format: str
    shadow_steps: int = 0
    plan: tuple[PlanRow, ...] = ()
    confirmed: bool | None = None
    loss_scale: dict[str, Any] = field(default_factory=dict)
    runs: tuple[RunRow, ...] = ()
    baseline: str = ""
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    beside: Beside | None = None
    courses: tuple[Course, ...] = ()
    merged_from: int = 0
    margin: tuple[float, float] | None = None
    phases: tuple[str, ...] = ()

    @property
    def shares(self) -> dict[str, float]:
        """Share of the FLOPs per compute format, of the modules where FLOPs were not counted; largest first."""
        counted = any(r.flops_share for r in self.plan)
        total: dict[str, float] = {}
        for row in self.plan:
            part = (row.flops_share or 0.0) if counted else 1 / len(self.plan)
            total[row.compute] = total.get(row.compute, 0.0) + part
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def build_view(
    profile: Profile | str | Path,
    *,
    plan: PrecisionPlan | str | Path | None = None,
    runs: Sequence[str | Path] = (),
    title: str | None = None,
) -> View:
    """Gather what a report of `profile` shows.

    plan: a PrecisionPlan or its file. runs: directories of training runs to compare. title: default is the model's
    name and the run's. Raises RunDirectoryError where a run cannot be read, PlanError for a broken plan file.
    """
    from ..comparison import compare

    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    if isinstance(plan, str | Path):
        from ..plans import PrecisionPlan

        plan = PrecisionPlan.load(plan)
    comparison = compare(runs) if len(runs) else None
    rows = plan_rows(profile, plan) if plan is not None else ()
    compared, baseline = _named(comparison) if comparison else ((), "")
    material = Material(profile, plan, rows, compared, baseline, comparison.pairs if comparison else ())
    recorded = profile.merged()[0]
    merge = merging(recorded)
    steps, sites = site_rows(profile, merge=merge)
    next_step, next_command = verdict.next_step(material)
    return View(
        title=title or headline.default_title(profile),
        subtitle=headline.subtitle(profile),
        lead=headline.lead(material),
        facts=headline.facts(material),
        statements=verdict.statements(material),
        next_step=next_step,
        next_command=next_command,
        sites=sites,
        steps=steps,
        format=headline.main_format(material),
        shadow_steps=priced_steps(profile),
        plan=rows,
        confirmed=None if plan is None else material.confirmed,
        loss_scale=dict(plan.loss_scale or {}) if plan is not None else {},
        runs=material.runs,
        baseline=material.baseline,
        provenance=provenance(profile, plan, comparison),
        beside=beside(material),
        courses=courses(comparison) if comparison else (),
        merged_from=len(recorded) if merge is not None else 0,
        margin=_margin(comparison) if comparison else None,
        phases=tuple(map(_phase, plan.phases)) if plan is not None else (),
    )


def _margin(comparison: Comparison) -> tuple[float, float] | None:
    bounds = [p.loss.bound for p in comparison.pairs if p.loss is not None and p.loss.bound]
    return (comparison.margin, bounds[0]) if bounds else None


def _phase(phase: Phase) -> str:
    what = phase.precision or (f"another plan, mostly {phase.plan.default.compute}" if phase.plan is not None else "")
    return f"from step {phase.from_step} {'this plan' if what == 'plan' else what}"


def _named(comparison: Comparison) -> tuple[tuple[RunRow, ...], str]:
    """(rows under names that tell them apart, the baseline's)."""
    names = run_names(comparison)
    base = next(n for n, g in zip(names, comparison.groups, strict=True) if str(g.run.path) == comparison.baseline)
    return tuple(replace(row, run=name) for row, name in zip(comparison.rows, names, strict=True)), base
