"""From a profile to a plan: range constraints, measured costs, one linear program, reasons on every choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..formats import get_format
from ..plans import STORED, LayerPrecision, PrecisionPlan, Reason
from ..profiles import Profile
from .constraints import Limits, Verdicts, judge
from .cost import LEAST_GAIN_MS, CostTable
from .loss_scale import common_interval
from .measured import Measured
from .noise import Noise
from .reasons import Choice, reasons_for
from .solve import Problem, Solution, solve
from .storage import optimizer_advice, storage_reasons, stored_modules
from .units import ModelGraph, Unit
from .updates import advised_updates, check_updates, kept_by

_COMPUTE = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")


def recommend(
    profile: Profile | str | Path,
    *,
    formats: Sequence[str] = ("fp16", "bf16", "fp32"),
    policy: str = "autocast",
    limits: Limits | None = None,
    costs: str = "auto",
    measured: Measured | None = None,
    updates: str | None = None,
) -> PrecisionPlan:
    """Recommend a format per module from a recorded run alone. See `precscope.recommend`, which also confirms.

    formats: what may be chosen; fp32 is the way out where ranges forbid the others. policy: "autocast" (fp32 master
    weights, PyTorch's op lists decide inside) or "cast" (everything in the module runs in the format). limits:
    tolerances of the range rules. costs: "auto" takes what was measured on the recording device; "model" a FLOP/byte
    model of a device where each halving of the width doubles the speed, fp8 included, for a plan to use elsewhere.
    measured: what trying formats on the model itself has shown. updates: how the optimizer will write parameters.

    The plan minimises predicted time per step: measured per module and format where the run has cost.parquet, else a
    FLOP and byte model, plus casts where neighbours differ. It is made from ranges and costs alone and says
    "predicted". Raises UsageError where no assignment is allowed, RunDirectoryError for an unreadable run.
    """
    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    limits = limits or Limits()
    names = _check(formats, policy)
    check_updates(updates)
    graph = ModelGraph.of(profile)
    verdicts = judge(profile, graph, names, limits=limits, policy=policy, measured=measured)
    if costs not in ("auto", "model"):
        raise UsageError(f"costs must be 'auto' or 'model', not {costs!r}")
    table = CostTable.of(profile.cost if costs == "auto" else None, graph, names)
    noise = Noise.of_run(profile, graph, names, share=limits.noise)
    tried = measured.formats if measured is not None else frozenset()
    # what was tried on the model overrules what its noise was predicted to do
    priced = Noise({k: v for k, v in noise.variance.items() if k[1] not in tried}, noise.budget, noise.spread)
    solution, main = _solve(graph, names, verdicts, table, priced)
    choice = Choice(names, main, _thresholds(graph, main, verdicts, table), verdicts, table, graph, priced)
    low_params = policy == "cast" or updates is not None
    storage, kept, optimizer = _storage(profile, solution, main, limits, updates) if low_params else ({}, {}, {})
    modules = {
        u.name: _layer(u, solution, choice, noise, policy, storage.get(u.name, []), kept.get(u.name, []), low_params)
        for u in graph.units
    }
    modules |= {
        name: LayerPrecision("fp32", policy=policy, params="fp32", reasons=tuple(reasons))
        for name, reasons in storage.items()
        if name not in modules  # it never ran in the recorded steps: an EMA copy, say
    }
    return PrecisionPlan(
        default=_default(modules, policy, low_params),
        modules=modules,
        loss_scale=_loss_scale(profile, graph, solution, limits, policy),
        optimizer=optimizer,
        made_from=_made_from(profile, names, policy, limits, graph, solution, main, table, noise, verdicts),
    )


def _storage(
    profile: Profile, solution: Solution, main: str, limits: Limits, updates: str | None
) -> tuple[dict[str, list[Reason]], dict[str, list[Reason]], dict[str, Any]]:
    """What must be stored in fp32 and why, what the optimizer lets be stored low, and advice for the optimizer."""
    formats = dict.fromkeys(stored_modules(profile), main) | dict(solution.choice)
    tolerated: dict[str, Any] = {"swallowed": limits.swallowed, "flushed_state": limits.flushed_state}
    plain = storage_reasons(profile, formats, **tolerated)
    if updates is None:
        return plain, {}, optimizer_advice(profile, formats, plain)
    if updates == "auto":
        low = {unit: get_format(fmt) for unit, fmt in formats.items() if get_format(fmt).bits == 16}
        updates = advised_updates(profile, low, plain)
    reasons = storage_reasons(profile, formats, updates=updates, **tolerated)
    kept = {unit: kept_by(updates, found) for unit, found in plain.items() if unit not in reasons}
    advice = optimizer_advice(profile, formats, reasons, updates=updates, flushed_state=limits.flushed_state)
    return reasons, kept, advice


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


def _solve(
    graph: ModelGraph, formats: tuple[str, ...], verdicts: Verdicts, costs: CostTable, noise: Noise
) -> tuple[Solution, str]:
    """The cheapest assignment and its main format: one program for each 16-bit format as the main one, and fp32
    throughout as the measure.

    Two 16-bit formats side by side cost casts, a loss scale and a reader's patience for gains that are mostly noise of
    the measurement: the other one is admitted only where the main one is forbidden. Low precision must gain more than
    two in a hundred over plain fp32, and more than `least_gain_ms`; where costs come from a model, which has no noise,
    anything.
    """
    mains = [f for f in formats if get_format(f).bits == 16] or list(formats[:1])
    solutions = [(solve(_problem(graph, formats, main, verdicts, costs, noise), costs.time_ms), main) for main in mains]
    best = min(solutions, key=lambda s: s[0].time_ms)
    if "fp32" in formats and mains != ["fp32"]:
        plain = solve(_problem(graph, ("fp32",), "fp32", verdicts, costs, noise), costs.time_ms)
        share = 1.02 if costs.least_gain_ms else 1.0
        if plain.time_ms <= max(share * best[0].time_ms, best[0].time_ms + costs.least_gain_ms):
            return plain, "fp32"
    return best


def _problem(
    graph: ModelGraph, formats: tuple[str, ...], main: str, verdicts: Verdicts, costs: CostTable, noise: Noise
) -> Problem:
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
        edges=[
            (index[e.producer], index[e.consumer], costs.cast(e.elements))
            for e in graph.edges
            if e.producer and e.consumer  # what the root takes and returns is cast or not outside the model
        ],
        groups=[[index[n] for n in group if n in index] for group in graph.groups],
        noise=np.asarray([[noise.of(u.name, f) for f in formats] for u in graph.units]) if noise.known else None,
        budget=noise.budget,
    )


def _leaving(cost: np.ndarray, main: int, with_main: np.ndarray) -> np.ndarray:
    """What leaving the main format must gain before it is worth it: a tenth of the unit's time, and a five-hundredth of
    the model's, which is about the noise of the measurement. float[U, F] in ms, 0 for the main format."""
    threshold = 0.1 * cost[:, main] + cost[:, main].sum() / 500
    penalty = np.where(with_main, threshold, 0.0)[:, None] * np.ones(cost.shape[1])
    penalty[:, main] = 0.0
    return penalty


def _thresholds(graph: ModelGraph, main: str, verdicts: Verdicts, costs: CostTable) -> dict[str, float]:
    """What `_leaving` asks of each unit, in ms."""
    cost = np.asarray([[costs.time_ms[u.name, main]] for u in graph.units])
    threshold = 0.1 * cost[:, 0] + cost.sum() / 500
    return {u.name: float(t) for u, t in zip(graph.units, threshold, strict=True) if verdicts.allows(u.name, main)}


def _layer(
    unit: Unit,
    solution: Solution,
    choice: Choice,
    noise: Noise,
    policy: str,
    against_storage: list[Reason],
    for_storage: list[Reason],
    low_params: bool,
) -> LayerPrecision:
    name, costs = unit.name, choice.costs
    compute = solution.choice[name]
    evidence: dict[str, Any] = {
        "time_ms": {f: round(costs.time_ms[name, f], 4) for f in choice.formats},
        "time_from": costs.how[name, compute],
        "forbidden": sorted(f for f in choice.formats if not choice.verdicts.allows(name, f)),
    }
    if noise.known:  # as it was priced, whether or not a trial has overruled it
        evidence["loss_noise"] = {f: noise.of(name, f) ** 0.5 for f in choice.formats}
    reasons = [*reasons_for(name, compute, choice), *against_storage, *for_storage]
    if against_storage and compute != "fp32" and "fp32" in choice.formats:
        gain = costs.time_ms[name, "fp32"] - costs.time_ms[name, compute] - costs.cast(unit.own_params)
        if gain < LEAST_GAIN_MS:
            text = f"fp32, as its parameters are: casting them to {compute} at each pass would gain {gain:.2g} ms"
            reason = Reason(code="cost", text=text, site=None, numbers={"gain_ms": gain})
            compute, reasons = "fp32", [*against_storage, reason]
    return LayerPrecision(
        compute=compute,
        policy=policy,
        params=compute if low_params and compute in STORED and not against_storage else "fp32",
        reasons=tuple(reasons),
        evidence=evidence,
    )


def _default(modules: dict[str, LayerPrecision], policy: str, low_params: bool) -> LayerPrecision:
    """For modules that never ran, and for the loss: what the root got, whose own code is no safer than theirs; where it
    did not run, what most modules got."""
    if "" in modules:
        return LayerPrecision(modules[""].compute, policy=policy, params=modules[""].params)
    compute = Counter(p.compute for p in modules.values()).most_common(1)[0][0]
    params = compute if low_params and compute in STORED else "fp32"
    return LayerPrecision(compute, policy=policy, params=params)


def _loss_scale(profile: Profile, graph: ModelGraph, solution: Solution, limits: Limits, policy: str) -> dict[str, Any]:
    """The loss_scale section, from the gradients of what computes in fp16: empty where nothing does."""
    units = [u for u in graph.units if solution.choice[u.name] == "fp16"]
    scale = common_interval(
        profile, units, policy=policy, headroom=limits.gradient_headroom, tolerance=limits.flushed_energy
    )
    if scale is None:
        return {}
    content: dict[str, Any] = {
        "initial": float(2.0**scale.recommended),
        "interval": [scale.lo, scale.hi],
        "floor": float(2.0**scale.lo),
    }
    sites = {"lo_site": scale.lo_site, "hi_site": scale.hi_site}
    return content | {key: str(site) for key, site in sites.items() if site is not None}


def _made_from(
    profile: Profile,
    formats: tuple[str, ...],
    policy: str,
    limits: Limits,
    graph: ModelGraph,
    solution: Solution,
    main: str,
    costs: CostTable,
    noise: Noise,
    verdicts: Verdicts,
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
        "main": main,
        "costs": "measured" if "measured" in costs.how.values() else "model",
        "predicted_ms": {
            "plan": solution.time_ms,
            **{f: sum(costs.time_ms[u.name, f] for u in graph.units) for f in formats},
        },
        "casts": solution.casts,
        "loss_noise": {
            "plan": noise.std(dict(solution.choice)),
            "budget": noise.budget**0.5,
            "spread_over_batches": noise.spread,
            "largest": _noisiest(noise, solution),
        }
        if noise.known
        else None,
        "says": _in_one_sentence(set(solution.choice.values()), policy) + _not_looked_at(solution, verdicts),
        "low_precision_flops_share": low / total if total else float("nan"),
    }


def _noisiest(noise: Noise, solution: Solution) -> dict[str, float]:
    """The units that spend most of the budget: unit -> standard deviation of the loss."""
    spent = {u: noise.of(u, f) ** 0.5 for u, f in solution.choice.items()}
    return {u: spent[u] for u in sorted(spent, key=spent.__getitem__, reverse=True)[:5] if spent[u] > 0}


def _not_looked_at(solution: Solution, verdicts: Verdicts) -> str:
    """Which ops inside modules could overflow the chosen format; "" where there are none."""
    doubts = {
        unit: next((r for r in verdicts.doubts.get((unit, fmt), ()) if r.code == "inside"), None)
        for unit, fmt in solution.choice.items()
    }
    found = sorted(((r.numbers["amax"], unit, r) for unit, r in doubts.items() if r is not None), reverse=True)
    if not found:
        return ""
    _, unit, reason = found[0]
    more = f" (and {len(found) - 1} more module{'s' if len(found) > 2 else ''})" if len(found) > 1 else ""
    return f" Not settled by ranges: {unit or '(root)'}{more}: {reason.text}."


def _in_one_sentence(chosen: set[str], policy: str) -> str:
    """What the plan comes to beside plain autocast."""
    if chosen == {"fp32"}:
        return "Every module stays in fp32: low precision is forbidden or gains too little on this device."
    if len(chosen) == 1 and policy == "autocast":
        only = next(iter(chosen))
        return f"Every module is {only}: plain {only} autocast is already right, the plan changes nothing."
    return "Modules differ: plain autocast would treat them alike."
