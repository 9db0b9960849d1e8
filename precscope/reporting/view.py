"""What a report says, as plain rows: profile + plan + runs -> View. No HTML, no torch, no drawing.

Every renderer (html, text, figures) takes a View or parts of one, so that they say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiles import Profile
from . import headline, verdict
from .material import Material
from .prices import priced_steps
from .provenance import provenance
from .rows import Curve, Fact, PlanRow, SiteRow, Statement, curve, plan_rows, site_rows

if TYPE_CHECKING:
    from ..comparison import RunRow
    from ..plans import PrecisionPlan


@dataclass(frozen=True)
class View:
    """All that a report shows.

    steps: recorded steps (the first of each merged group where there were many). format: the format that the what-if
    explorer opens with. shadow_steps: how many steps priced rounding. loss_scale: content of the plan's loss_scale.
    provenance: (heading, ((key, value), ...)).
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
    curves: tuple[Curve, ...] = ()
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()

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
    material = Material(
        profile, plan, rows, comparison.rows if comparison else (), Path(comparison.baseline).name if comparison else ""
    )
    steps, sites = site_rows(profile)
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
        curves=tuple(curve(path) for path in runs),
        provenance=provenance(profile, plan),
    )
