"""Plain rows that a report is made of: sentences, figures, sites, modules of a plan."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats import get_format
from ..histogram import EXP_LO
from ..profiles import Profile
from ..sites import Role, Site
from .prices import Price, site_prices

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

_HISTORY_CELLS = 300_000  # sites x steps that a page carries: beyond it, neighbouring steps are merged


@dataclass(frozen=True)
class Statement:
    """A sentence of the verdict. kind: "good", "care", "bad" or "note". items: lines below it."""

    kind: str
    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A headline figure: what it is, the figure, and a line that says what it is measured against."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class SiteRow:
    """A site and its statistics over all recorded steps.

    histogram: counts from binade 2^lo upwards, trimmed to the filled ones. prices: what loss noise is told from, None
    where it is not known. history: largest magnitude per entry of View.steps, None where the site was not recorded then
    or was all zero. broken: entries of View.steps with non-finite values.
    """

    module: str
    role: str
    call: int
    count: int
    zeros: int
    nonfinite: int
    amax: float
    amin_nonzero: float
    sumsq: float
    source: str
    source_exponent: int
    lo: int
    histogram: tuple[int, ...]
    prices: tuple[Price, ...] | None = None
    history: tuple[float | None, ...] = ()
    broken: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Module and role in one: "blocks.0.fc1.output", "#2" behind the module for its third call."""
        return str(Site(self.module, Role(self.role), self.call))


@dataclass(frozen=True)
class PlanRow:
    """A module and what the plan does with it, or several alike that `group_rows` made one.

    flops_share: of the model's forward FLOPs; None where not counted. parameters: of the module itself, children not
    counted. label: what to call it: "blocks.{0-3}.fc1" for four of them. count: how many modules it stands for.
    """

    module: str
    type: str
    compute: str
    params: str
    policy: str
    flops_share: float | None
    parameters: int | None
    reasons: tuple[str, ...]
    label: str = ""
    count: int = 1
    evidence: dict[str, Any] = field(default_factory=dict, hash=False, repr=False)

    @property
    def low(self) -> bool:
        """Whether it computes in fewer than 19 bits (tf32 and wider are not low)."""
        return get_format(self.compute).bits < 19


def site_rows(
    profile: Profile, *, by: str = "site", merge: Callable[[Site], Site] | None = None
) -> tuple[tuple[int, ...], tuple[SiteRow, ...]]:
    """(steps, a row per site): the statistics in the model's order, with their history over `steps`.

    merge: site -> the site that it is counted to, for example `alike.alike`.
    """
    sites, table = profile.merged(by)
    order = _model_order(profile, sites)
    sites, table = [sites[i] for i in order], table.take(np.asarray(order, np.int64))
    if merge is not None:
        places: dict[Site, int] = {}
        to = [places.setdefault(merge(s), len(places)) for s in sites]
        sites, table = list(places), table.group(np.asarray(to, np.int64), len(places))
    steps, history, broken = _history(profile, sites, merge)
    prices = site_prices(profile, sites, merge) if by == "site" else [None] * len(sites)
    counts, nonfinite = table.count.tolist(), table.nonfinite.tolist()
    rows = []
    for i, site in enumerate(sites):
        where = np.flatnonzero(table.counts[i])
        first, end = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
        rows.append(
            SiteRow(
                module=site.module,
                role=site.role.value,
                call=site.call,
                count=counts[i],
                zeros=int(table.zeros[i]),
                nonfinite=nonfinite[i],
                amax=float(table.amax[i]),
                amin_nonzero=float(table.amin_nonzero[i]),
                sumsq=float(table.sumsq[i]),
                source=str(table.source[i]),
                source_exponent=int(table.source_exponent[i]),
                lo=first + EXP_LO,
                histogram=tuple(table.counts[i, first:end].tolist()),
                prices=prices[i],
                history=tuple(None if v <= 0 else v for v in history[i].tolist()),
                broken=tuple(np.flatnonzero(broken[i]).tolist()),
            )
        )
    return steps, tuple(rows)


def _model_order(profile: Profile, sites: Sequence[Site]) -> list[int]:
    """Indices of `sites` by module as the model lists them (as recorded where it is not known), call and role."""
    names = [m["name"] for m in profile.graph.get("modules", ())]
    place = {name: i for i, name in enumerate(dict.fromkeys([*names, *(s.module for s in sites)]))}
    roles = list(Role)
    return sorted(range(len(sites)), key=lambda i: (place[sites[i].module], sites[i].call, roles.index(sites[i].role)))


def _history(
    profile: Profile, sites: Sequence[Site], merge: Callable[[Site], Site] | None = None
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Steps, amax float64[sites, steps] (0 where absent), and int64[sites, steps], 0 where all values were finite."""
    peaks = profile.peaks
    if not len(peaks.steps) or not sites:
        return (), np.zeros((len(sites), 0)), np.zeros((len(sites), 0), np.int64)
    steps = peaks.steps
    bins = min(len(steps), max(12, min(160, _HISTORY_CELLS // len(sites))))
    bin_of = np.arange(len(steps)) * bins // len(steps)
    starts = np.unique(bin_of, return_index=True)[1]
    keys = {key: i for i, key in enumerate((s.module, s.role.value, s.call) for s in sites)}
    if merge is not None:
        merged = {(s.module, s.role.value, s.call): merge(s) for s in dict.fromkeys(profile.sites)}
        keys = {key: keys.get((to.module, to.role.value, to.call), -1) for key, to in merged.items()}
    row = np.asarray([keys.get((s.module, s.role.value, s.call), -1) for s in peaks.sites], np.int64)
    keep = np.flatnonzero(row >= 0)
    amax, broken = np.zeros((len(sites), bins)), np.zeros((len(sites), bins), np.int64)
    largest = np.nan_to_num(peaks.amax[keep], nan=0.0, posinf=0.0)
    np.maximum.at(amax, row[keep], np.maximum.reduceat(largest, starts, axis=1))
    np.maximum.at(broken, row[keep], np.maximum.reduceat(peaks.broken[keep], starts, axis=1))
    return tuple(int(s) for s in steps[starts]), amax, broken


def plan_rows(profile: Profile, plan: PrecisionPlan) -> tuple[PlanRow, ...]:
    """A row per module that computes or that the plan names, in the model's order."""
    modules = {m["name"]: m for m in profile.graph.get("modules", ())}
    total = sum(m.get("flops") or 0 for m in modules.values())
    ran = [
        m["name"]
        for m in modules.values()
        if m.get("calls", 1) and (m.get("flops") or m.get("own_params") or m["name"] in plan.modules)
    ]
    names = ran or [name for name in plan.modules if not set("*?[") & set(name)]
    rows = []
    for name in names:
        layer, known = plan[name], modules.get(name, {})
        rows.append(
            PlanRow(
                module=name,
                type=known.get("type", ""),
                compute=str(layer.compute),
                params=str(layer.params),
                policy=str(layer.policy),
                flops_share=(known.get("flops") or 0) / total if total else None,
                parameters=known.get("own_params"),
                reasons=tuple(getattr(r, "text", None) or str(r) for r in layer.reasons),
                evidence=dict(layer.evidence or {}),
            )
        )
    return tuple(rows)


def group_rows(rows: Iterable[PlanRow]) -> tuple[PlanRow, ...]:
    """Rows that agree but for one number in the name (the first) and the numbers in their reasons, as one: FLOPs add
    up, the reasons are those of the first."""
    groups: dict[Any, list[tuple[int | None, PlanRow]]] = {}
    for row in rows:
        found = re.fullmatch(r"(|.*?\.)(\d+)((?:\..*)?)", row.module)
        alike = (
            row.type,
            row.compute,
            row.params,
            row.policy,
            row.parameters,
            tuple(map(_without_numbers, row.reasons)),
        )
        key = (found[1], found[3], alike) if found else (row.module, None, None)
        groups.setdefault(key, []).append((int(found[2]) if found else None, row))
    return tuple(_merged(members, key) for key, members in groups.items())


def _without_numbers(text: str) -> str:
    return re.sub(r"\d[\d.e+-]*", "#", text)


def _merged(members: list[tuple[int | None, PlanRow]], key: tuple[str, str | None, Any]) -> PlanRow:
    row = members[0][1]
    if len(members) == 1:
        return replace(row, label=row.module or "(root)")
    share = None if row.flops_share is None else sum(r.flops_share or 0.0 for _, r in members)
    numbers = _ranges(sorted(n for n, _ in members if n is not None))
    return replace(row, label=f"{key[0]}{{{numbers}}}{key[1]}", count=len(members), flops_share=share)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
