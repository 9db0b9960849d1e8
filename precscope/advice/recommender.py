"""From a profile to a plan: range constraints, measured costs, one linear program, reasons on every choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..formats import get_format
from ..histogram import swallowed_share
from ..plans import LayerPrecision, PrecisionPlan, Reason
from ..profiles import Profile
from ..sites import Role, Site
from .constraints import Limits, Verdicts, judge
from .cost import CostTable
from .solve import Problem, Solution, solve
from .units import ModelGraph, Unit

_COMPUTE = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")


def recommend(
    profile: Profile | str | Path,
    *,
    formats: Sequence[str] = ("fp16", "bf16", "fp32"),
    policy: str = "autocast",
    limits: Limits | None = None,
    costs: str = "auto",
) -> PrecisionPlan:
    """Recommend a format per module from a recorded run.

    formats: what may be chosen; fp32 is the way out where ranges forbid the others. policy: "autocast" (fp32 master
    weights, PyTorch's op lists decide inside) or "cast" (everything in the module runs in the format). limits:
    tolerances of the range rules. costs: "auto" takes what was measured on the recording device; "model" a FLOP/byte
    model of a device where each halving of the width doubles the speed, fp8 included, for a plan to use elsewhere.

    The plan minimises predicted time per step: measured per module and format where the run has cost.parquet, else a
    FLOP and byte model, plus casts where neighbours differ. It is made from ranges and costs alone and says
    "predicted". Raises UsageError where no assignment is allowed, RunDirectoryError for an unreadable run.
    """
    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    limits = limits or Limits()
    names = _check(formats, policy)
    graph = ModelGraph.of(profile)
    verdicts = judge(profile, graph, names, limits=limits, policy=policy)
    if costs not in ("auto", "model"):
        raise UsageError(f"costs must be 'auto' or 'model', not {costs!r}")
    table = CostTable.of(profile.cost if costs == "auto" else None, graph, names)
    solution = _solve(graph, names, verdicts, table)
    storage = _storage(profile, graph, limits) if policy == "cast" else {}
    modules = {u.name: _layer(u, solution, names, verdicts, table, policy, storage.get(u.name)) for u in graph.units}
    default = Counter(p.compute for p in modules.values()).most_common(1)[0][0]
    return PrecisionPlan(
        default=LayerPrecision(
            compute=default, policy=policy, params=default if policy == "cast" and default in _STORED else "fp32"
        ),
        modules=modules,
        loss_scale=_loss_scale(verdicts, solution),
        made_from=_made_from(profile, names, policy, limits, graph, solution, table),
    )


_STORED = ("fp32", "bf16", "fp16")
_HOW = {
    "measured": "measured",
    "emulated": "measured, emulated formats at fp32's time",
    "model": "by the FLOP/byte model",
}


def _check(formats: Sequence[str], policy: str) -> tuple[str, ...]:
    if isinstance(formats, str):
        formats = [f for f in formats.replace(",", " ").split() if f]
    names = tuple(dict.fromkeys(get_format(f).name for f in formats))
    for name in names:
        if name not in _COMPUTE:
            raise UsageError(f"a plan cannot compute in {name}: choose from {', '.join(_COMPUTE)}")
    if not names:
        raise UsageError(f"formats is empty: choose from {', '.join(_COMPUTE)}")
    if policy not in ("autocast", "cast"):
        raise UsageError(f"policy must be 'autocast' or 'cast', not {policy!r}")
    return names


def _solve(graph: ModelGraph, formats: tuple[str, ...], verdicts: Verdicts, costs: CostTable) -> Solution:
    """One program for each 16-bit format as the main one, fp32 throughout as the measure, the cheapest of these.

    Two 16-bit formats side by side cost casts, a loss scale and a reader's patience for gains that are mostly noise of
    the measurement: the other one is admitted only where the main one is forbidden. Low precision must gain more than
    two in a hundred over plain fp32.
    """
    mains = [f for f in formats if get_format(f).bits == 16]
    solutions = [solve(_problem(graph, formats, main, verdicts, costs), costs.time_ms) for main in mains or formats[:1]]
    best = min(solutions, key=lambda s: s.time_ms)
    if mains and "fp32" in formats:
        plain = solve(_problem(graph, ("fp32",), "fp32", verdicts, costs), costs.time_ms)
        if plain.time_ms < 1.02 * best.time_ms:
            return plain
    return best


def _problem(graph: ModelGraph, formats: tuple[str, ...], main: str, verdicts: Verdicts, costs: CostTable) -> Problem:
    index = {u.name: i for i, u in enumerate(graph.units)}
    allowed = np.asarray([[verdicts.allows(u.name, f) for f in formats] for u in graph.units])
    with_main = allowed[:, formats.index(main)]
    rivals = np.asarray([f != main and get_format(f).bits == 16 for f in formats])
    cost = np.asarray([[costs.time_ms[u.name, f] for f in formats] for u in graph.units])
    return Problem(
        units=[u.name for u in graph.units],
        formats=formats,
        cost=cost + _leaving(cost, formats.index(main), with_main),
        allowed=allowed & ~(with_main[:, None] & rivals[None, :]),
        edges=[(index[e.producer], index[e.consumer], costs.cast(e.elements)) for e in graph.edges],
        groups=[[index[n] for n in group if n in index] for group in graph.groups],
    )


def _leaving(cost: np.ndarray, main: int, with_main: np.ndarray) -> np.ndarray:
    """What leaving the main format must gain before it is worth it: a tenth of the unit's time, and a five-hundredth of
    the model's, which is about the noise of the measurement. float[U, F] in ms, 0 for the main format."""
    threshold = 0.1 * cost[:, main] + cost[:, main].sum() / 500
    penalty = np.where(with_main, threshold, 0.0)[:, None] * np.ones(cost.shape[1])
    penalty[:, main] = 0.0
    return penalty


def _layer(
    unit: Unit,
    solution: Solution,
    formats: tuple[str, ...],
    verdicts: Verdicts,
    costs: CostTable,
    policy: str,
    storage_reason: Reason | None,
) -> LayerPrecision:
    compute = solution.choice[unit.name]
    reasons: list[Reason] = []
    for fmt in formats:
        found = verdicts.forbidden.get((unit.name, fmt), ())
        for reason in sorted(found, key=lambda r: -r.numbers.get("amax", 0.0))[:2]:
            if reason.code != "cost":
                reasons.append(reason.model_copy(update={"text": f"not {fmt}: {reason.text}"}))
    reasons.append(_cost_reason(unit, compute, formats, verdicts, costs))
    params = "fp32"
    if policy == "cast" and compute in _STORED:
        params = compute if storage_reason is None else "fp32"
        if storage_reason is not None:
            reasons.append(storage_reason)
    evidence: dict[str, Any] = {
        "time_ms": {f: round(costs.time_ms[unit.name, f], 4) for f in formats},
        "time_from": costs.how[unit.name, compute],
        "forbidden": sorted(f for f in formats if not verdicts.allows(unit.name, f)),
    }
    return LayerPrecision(compute=compute, policy=policy, params=params, reasons=tuple(reasons), evidence=evidence)


def _cost_reason(unit: Unit, compute: str, formats: tuple[str, ...], verdicts: Verdicts, costs: CostTable) -> Reason:
    """Why `compute` among the formats that are allowed."""
    allowed = [f for f in formats if verdicts.allows(unit.name, f)]
    times = {f: costs.time_ms[unit.name, f] for f in allowed}
    if len(allowed) == 1:
        return Reason(code="only", text=f"{compute} is what remains", site=None, numbers={})
    word = _HOW[costs.how[unit.name, compute]]
    listed = ", ".join(f"{f} {times[f]:.3g}" for f in sorted(allowed, key=times.__getitem__))
    fastest = min(allowed, key=times.__getitem__)
    if max(times.values()) == min(times.values()):
        text = f"as its neighbours: it does nothing itself that is faster in one of {', '.join(allowed)}"
    elif times[compute] <= 1.02 * times[fastest]:
        text = f"fastest allowed ({listed} ms, {word})"
    elif compute == "fp32":
        text = f"low precision does not gain enough here ({listed} ms, {word})"
    else:
        text = f"as its neighbours: {fastest} would gain less than its casts cost ({listed} ms, {word})"
    return Reason(code="cost", text=text, site=None, numbers={f"time_ms_{f}": t for f, t in times.items()})


def _storage(profile: Profile, graph: ModelGraph, limits: Limits) -> dict[str, Reason]:
    """Units whose parameters must stay fp32 because 16-bit storage would swallow their updates."""
    kept: dict[str, Reason] = {}
    names = {u.name for u in graph.units}
    for index, (counts, unchanged, from_zero) in profile.ratios.items():
        site = profile.sites[index]
        if site.module not in names:
            continue
        lo, hi = swallowed_share(counts, get_format("bf16").precision, unchanged=unchanged, from_zero=from_zero)
        if lo > limits.swallowed and site.module not in kept:
            text = (
                f"params fp32: {lo:.0%} to {hi:.0%} of the updates of {site.tensor} are below half an ulp in bf16 "
                f"and would be swallowed; {limits.swallowed:.0%} are tolerated"
            )
            kept[site.module] = Reason(
                code="swallowed", text=text, site=str(Site(site.module, Role.UPDATE, 0, site.tensor)),
                numbers={"lo": lo, "hi": hi},
            )  # fmt: skip
    return kept


def _loss_scale(verdicts: Verdicts, solution: Solution) -> dict[str, Any]:
    """The loss_scale section: empty where nothing computes in fp16."""
    if verdicts.scale is None or "fp16" not in solution.choice.values():
        return {}
    scale = verdicts.scale
    return {
        "initial": float(2.0**scale.recommended),
        "interval": [scale.lo, scale.hi],
        "floor": float(2.0**scale.lo),
        "lo_site": str(scale.lo_site),
        "hi_site": str(scale.hi_site),
    }


def _made_from(
    profile: Profile,
    formats: tuple[str, ...],
    policy: str,
    limits: Limits,
    graph: ModelGraph,
    solution: Solution,
    costs: CostTable,
) -> dict[str, Any]:
    flops = {u.name: u.flops for u in graph.units}
    total = sum(flops.values())
    low = sum(n for u, n in flops.items() if get_format(solution.choice[u]).bits < 19)
    steps = profile.steps
    return {
        "run": str(profile.path),
        "model": profile.run.get("model"),
        "precision": profile.run.get("precision"),
        "steps": [steps[0], steps[-1], len(steps)] if steps else [],
        "formats": list(formats),
        "policy": policy,
        "limits": {k: getattr(limits, k) for k in limits.__dataclass_fields__},
        "costs": "measured" if "measured" in costs.how.values() else "model",
        "predicted_ms": {
            "plan": solution.time_ms,
            **{f: sum(costs.time_ms[u.name, f] for u in graph.units) for f in formats},
        },
        "casts": solution.casts,
        "low_precision_flops_share": low / total if total else 0.0,
    }
