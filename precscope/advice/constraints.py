"""What the recorded ranges forbid, in words and numbers.

For each unit and low format: values that the format must hold without overflow (with head-room), the rounding noise of
its tensors, and gradients under one loss scale for the whole model. Ranges do not see cancellation, long sums or what a
module hides between its input and its output: a plan made from them alone says "predicted".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..formats import FloatFormat, get_format
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role, Site
from ..stats import StatsTable
from .forecast import required_headroom
from .inside import hidden_overflows
from .loss_scale import judge_gradients, largest_scale
from .measured import Measured
from .units import ModelGraph, Unit, is_inside

_NEAR = 2.0**6  # how far below the end of a format a tensor may be forecast to get there
_FORECASTS = 256  # of the tensors nearest to it: each takes some milliseconds
_MASK_FROM = 1e4  # additive masks use -1e4 (for fp16), -1e9 or the lowest finite value in place of -inf


@dataclass(frozen=True)
class Limits:
    """Tolerances of the range rules.

    headroom: binades between the largest recorded magnitude and the format's end, for sites whose history carries no
    forecast. horizon: steps ahead that the others must get through; None: as many as were recorded. noise: share of
    the spread of the loss over minibatches that the loss noise of a whole plan may be. flushed_energy: share of
    sum(g^2) of a gradient that may round to zero; activations and weights answer to min_sqnr_db instead, the least
    signal-to-quantisation-noise ratio, in which flushed values count as noise. swallowed: share of updates that
    low-precision storage may lose before fp32 parameters are advised. gradient_headroom: binades between the largest
    scaled gradient and the end of fp16. flushed_state: share of the non-zero values of an optimizer state that
    low-precision storage may flush to zero.
    """

    headroom: float = 2.0
    horizon: int | None = None
    noise: float = 0.3
    flushed_energy: float = 1e-3
    min_sqnr_db: float = 15.0
    swallowed: float = 0.1
    gradient_headroom: int = 1
    flushed_state: float = 0.01


@dataclass(frozen=True)
class Verdicts:
    """forbidden: (unit, format) -> reasons against it. doubts: (unit, format) -> what the run could not tell about it,
    though it is allowed."""

    forbidden: dict[tuple[str, str], list[Reason]]
    doubts: dict[tuple[str, str], list[Reason]] = field(default_factory=dict)

    def allows(self, unit: str, fmt: str) -> bool:
        """Whether nothing forbids `fmt` for `unit`."""
        return (unit, fmt) not in self.forbidden


def judge(
    profile: Profile,
    graph: ModelGraph,
    formats: tuple[str, ...],
    *,
    limits: Limits,
    policy: str,
    measured: Measured | None = None,
) -> Verdicts:
    """Apply the range rules to every unit and every format narrower than fp32, and what was measured."""
    measured = measured or Measured()
    verdicts = Verdicts({key: list(reasons) for key, reasons in measured.forbidden.items()})
    sites, table = _judged(profile, graph, policy)
    # What a low run made NaN may have come from elsewhere: where the format was tried on the model, that decides.
    inherited_nan, tried = profile.run.get("precision") not in ("fp32", "tf32", None), measured.formats
    fed = {s.module for s in profile.sites if s.role is Role.INPUT}  # a look-up takes integers: no input is recorded
    for name in formats:
        fmt = get_format(name)
        if fmt.bits >= 32 or fmt.name == "tf32":
            continue
        needed = _forecast(profile, sites, table, fmt, limits)
        for unit, reason in _range_reasons(sites, table, fmt, limits, needed):
            if not measured.keeps(reason, name) or (inherited_nan and reason.code == "nonfinite" and name in tried):
                continue
            where = verdicts.doubts if reason.code == "censored" else verdicts.forbidden
            where.setdefault((unit, name), []).append(reason)
        if name not in measured.formats:
            for unit, reason in hidden_overflows(profile, graph, fmt, policy=policy) if fmt.bits == 16 else ():
                verdicts.doubts.setdefault((unit, name), []).append(reason)
        for unit, reason in list(_inherited(graph, verdicts, name)) if name not in measured.formats else ():
            verdicts.forbidden.setdefault((unit, name), []).append(reason)
        if fmt.bits <= 8:
            for u in graph.units:
                if not u.matmul or u.name not in fed:
                    reason = Reason(code="cost", text=f"{name} pays for matrix products only", site=None, numbers={})
                    verdicts.forbidden.setdefault((u.name, name), []).append(reason)
    if "fp16" in formats and "fp16" not in measured.formats:
        candidates = [u for u in graph.units if verdicts.allows(u.name, "fp16")]
        found = judge_gradients(
            profile, candidates, policy=policy, headroom=limits.gradient_headroom, tolerance=limits.flushed_energy
        )
        for unit, reason in found:
            verdicts.forbidden.setdefault((unit, "fp16"), []).append(reason)
    return verdicts


def _judged(profile: Profile, graph: ModelGraph, policy: str) -> tuple[list[Site], StatsTable]:
    """The tensors that a unit's format concerns, masks left out: inputs and outputs one by one, the parameters of a
    module together, since a small bias is added to what a large weight made."""
    units = {u.name: u for u in graph.units}
    sites, table = _uncensored(profile)
    masks = _masks(sites, table)
    rows, keys = [], {}
    for i, s in enumerate(sites):
        unit = units.get(s.module)
        if unit is None or masks[i] or not _concerns(unit, s.role, policy):
            continue
        if s.role is Role.WEIGHT:
            if policy != "cast" and (s.module, s.tensor) in graph.buffers:  # under autocast buffers stay fp32
                continue
            s = s._replace(tensor="")
        rows.append((i, keys.setdefault(s, len(keys))))
    index, key = np.asarray(rows, np.int64).reshape(-1, 2).T
    table = table.take(index)
    passes = np.asarray(
        [
            _lets_neg_inf_pass(units[sites[i].module], sites[i].role, source)
            for i, source in zip(index, table.source, strict=True)
        ],
        bool,
    )
    table.neg_inf[passes] = 0
    return list(keys), table.group(key, len(keys))


def _uncensored(profile: Profile) -> tuple[list[Site], StatsTable]:
    """The recorded tensors; where the run's own precision made inf or NaN of an activation, what the shadow steps saw
    of it in fp32."""
    sites, table = profile.merged(by="tensor")
    shadow = profile.shadow
    if shadow is None:
        return sites, table
    seen = {s: i for i, s in enumerate(shadow.sites) if s.role in (Role.INPUT, Role.OUTPUT)}
    rows = np.arange(len(sites))
    for i in np.flatnonzero(table.nonfinite):
        rows[i] = seen.get(sites[i], i - len(sites)) + len(sites)
    plain = (dataclasses.replace(t, weights=None) for t in (table, shadow.table))
    return sites, StatsTable.concat(plain).take(rows)


def _concerns(unit: Unit, role: Role, policy: str) -> bool:
    """Inputs and weights are cast only where the module multiplies matrices, or everywhere under policy "cast"; an
    output that the format cannot hold is its producer's concern."""
    if role in (Role.INPUT, Role.WEIGHT):
        return policy == "cast" or unit.matmul
    return role is Role.OUTPUT


def _lets_neg_inf_pass(unit: Unit, role: Role, source: str) -> bool:
    """-inf alone is what masks and masked_fill write on purpose, and every 16-bit format holds it. As an operand of a
    matrix product it would have made NaN; beside one it is a mask, unless fp16 may have made it by overflowing."""
    return role is Role.OUTPUT or (role is Role.INPUT and (not unit.matmul or source != "fp16"))


def _masks(sites: list[Site], table: StatsTable) -> np.ndarray:
    """bool[S]: tensors that look like additive attention masks, {0, -inf} or {0, one huge negative value}. A format
    that turns their huge value into -inf does what was meant."""
    only_neg_inf = (table.pos_inf == 0) & (table.nan == 0)
    one_value = (table.amax == 0) | (table.amax == table.amin_nonzero)
    huge = (table.amax >= _MASK_FROM) & (table.zeros > 0) & (table.sum < 0)
    activation = np.asarray([s.role in (Role.INPUT, Role.OUTPUT) for s in sites], bool)
    return activation & only_neg_inf & one_value & ((table.neg_inf > 0) | huge)


def _forecast(
    profile: Profile, sites: list[Site], table: StatsTable, fmt: FloatFormat, limits: Limits
) -> dict[Site, float]:
    """(module, role, call) -> binades that it needs above what was recorded, for sites that are near the end of `fmt`
    and whose history tells; the others are not in it."""
    if fmt.bits <= 8:
        return {}
    amax = table.amax
    order = np.argsort(-amax, kind="stable")
    close = [sites[i]._replace(tensor="") for i in order if amax[i] > 0 and fmt.max < amax[i] * _NEAR]
    near = set(dict.fromkeys(close[:_FORECASTS]))
    found = required_headroom(profile, limits.horizon, among=near) if near else {}
    return {site: need for site, need in found.items() if need == need}


def _range_reasons(
    sites: list[Site], table: StatsTable, fmt: FloatFormat, limits: Limits, needed: Mapping[Site, float]
) -> Iterator[tuple[str, Reason]]:
    """(unit, reason) against `fmt`, or with code "censored" a doubt about it. An 8-bit tensor carries a scale of its
    own, chosen from its amax, so that only its spread can harm it."""
    nonfinite = table.nonfinite / np.maximum(table.count, 1)
    fp16 = get_format("fp16")
    overflowed = (table.source == "fp16") & (nonfinite > 0)
    # What overflowed in a run in fp16 makes NaN of fp32 tensors further on: neither speaks against a wider range.
    censored = overflowed.any() and fmt.max > fp16.max
    amax = table.amax
    if fmt.bits <= 8:
        table = table.shift(np.asarray([largest_scale(a, fmt) if a > 0 else 0 for a in amax], np.int64))
    now = table.ask(fmt)
    with np.errstate(divide="ignore"):
        spare = np.log2(fmt.overflow_from) - np.log2(table.amax)
    for i, site in enumerate(sites):
        if nonfinite[i] > 0 and not censored:
            yield site.module, _nonfinite(site, nonfinite[i])
        elif fmt.overflows(float(table.amax[i])):
            yield site.module, _overflow(site, amax[i], fmt, limits)
        elif (need := needed.get(site._replace(tensor=""))) is not None and need > spare[i]:
            yield site.module, _growing(site, amax[i], fmt, need, limits.horizon)
        elif need is None and fmt.bits > 8 and spare[i] < limits.headroom:
            yield site.module, _overflow(site, amax[i], fmt, limits)
        elif now["sqnr_db"][i] < limits.min_sqnr_db:
            yield site.module, _noise(site, amax[i], now["sqnr_db"][i], now["flushed"][i], fmt, limits)
        elif nonfinite[i] > 0:
            yield site.module, _censored(site, nonfinite[i])


def _inherited(graph: ModelGraph, verdicts: Verdicts, fmt: str) -> Iterator[tuple[str, Reason]]:
    """A container's own code works on what the modules in it return, in their format: where it is what makes an output
    that `fmt` cannot hold, they must not return `fmt`."""
    sources: dict[str, list[str]] = {}
    for edge in graph.edges:
        if is_inside(edge.producer, edge.consumer):
            sources.setdefault(edge.consumer, []).append(edge.producer)
    made = {
        (unit, r.numbers["amax"])
        for (unit, f), reasons in verdicts.forbidden.items()
        if f == fmt
        for r in reasons
        if r.numbers.get("output")
    }
    for container, amax in made:
        if any(a == amax and is_inside(unit, container) for unit, a in made):
            continue  # it only hands on what a module in it made
        for unit in sources.get(container, ()):
            if verdicts.allows(unit, fmt):
                text = f"its output goes into the code of {container or '(root)'}, whose output reaches {amax:.4g}"
                numbers = {"amax": amax}
                yield unit, Reason(code="parent", text=text, site=str(Site(container, Role.OUTPUT)), numbers=numbers)


def _numbers(site: Site, amax: float, **more: float) -> dict[str, float]:
    """output: 1 where the tensor is one that the module makes."""
    numbers = {"amax": float(amax), **{k: float(v) for k, v in more.items()}}
    return numbers | ({"output": 1.0} if site.role is Role.OUTPUT else {})


def _overflow(site: Site, amax: float, fmt: FloatFormat, limits: Limits) -> Reason:
    spare = np.log2(fmt.max / amax) if amax > 0 else np.inf
    where = f"{site.role.value} reaches {amax:.4g}"
    if spare < 0:
        text = f"{where}, {fmt} ends at {fmt.max:g}"
    else:
        text = f"{where}, {spare:.1f} binades below the end of {fmt} ({fmt.max:g}); {limits.headroom:g} are asked for"
    return Reason(code="overflow", text=text, site=str(site), numbers=_numbers(site, amax, limit=fmt.max))


def _growing(site: Site, amax: float, fmt: FloatFormat, need: float, horizon: int | None) -> Reason:
    ahead = "as many further steps as were recorded" if horizon is None else f"{horizon} further steps"
    text = (
        f"{site.role.value} reaches {amax:.4g}, {np.log2(fmt.max / amax):.1f} binades below the end of {fmt} "
        f"({fmt.max:g}); by its growth so far {ahead} need {need:.1f} (one chance in a hundred)"
    )
    return Reason(code="forecast", text=text, site=str(site), numbers=_numbers(site, amax, limit=fmt.max, needed=need))


def _noise(site: Site, amax: float, sqnr_db: float, flushed: float, fmt: FloatFormat, limits: Limits) -> Reason:
    is_flushed = flushed >= 5e-4  # what prints as 0.1%
    share = f" ({flushed:.1%} of the values flushed to zero)" if is_flushed else ""
    text = (
        f"{site.role.value} keeps {sqnr_db:.1f} dB of signal over rounding noise in {fmt}{share}; "
        f"{limits.min_sqnr_db:g} dB are asked for"
    )
    code = "flushed" if is_flushed else "sqnr"
    numbers = _numbers(site, amax, sqnr_db=sqnr_db, flushed=flushed)
    return Reason(code=code, text=text, site=str(site), numbers=numbers)


def _nonfinite(site: Site, share: float) -> Reason:
    text = f"{site.role.value} held inf or NaN in the recorded run ({share:.2%} of the values)"
    return Reason(code="nonfinite", text=text, site=str(site), numbers={"nonfinite": float(share)})


def _censored(site: Site, share: float) -> Reason:
    text = (
        f"the range of {site.role.value} beyond 65504 is not known: fp16 had overflowed in the recorded run "
        f"({share:.2%} of its values were inf or NaN)"
    )
    return Reason(code="censored", text=text, site=str(site), numbers={"nonfinite": float(share)})
