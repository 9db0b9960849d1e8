"""The verdict in plain sentences with numbers: what runs low, what does not and why, the gain, what to do next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats import FloatFormat, get_format
from ..profiles import Profile
from ..sites import Site
from .numbers import bytes_text, count_text, figure, fixed, number, percent, plural, power_of_two
from .view import FORWARD, GRADIENTS, Fact, PlanRow, Statement, group_rows

if TYPE_CHECKING:
    import pandas as pd

    from ..comparison import RunRow
    from ..plans import PrecisionPlan

_LISTED = 6  # groups of modules that the verdict names; the plan table has all
_TIGHT = 2.0  # binades of head-room below which a site is worth a word


@dataclass(frozen=True)
class Material:
    """What the verdict is made from. runs, baseline: rows of a comparison and the name of the run they refer to."""

    profile: Profile
    plan: PrecisionPlan | None
    rows: tuple[PlanRow, ...]
    runs: tuple[RunRow, ...]
    baseline: str

    @property
    def confirmed(self) -> bool:
        """Whether a measurement confirmed the plan."""
        return self.plan is not None and self.plan.status == "confirmed"

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


def default_title(profile: Profile) -> str:
    """The model's name, or the run directory's."""
    return str(profile.run.get("model") or profile.path.name or "a recorded run")


def subtitle(profile: Profile) -> str:
    """What was recorded, in one line."""
    run, steps = profile.run, profile.steps
    parts = [f"run {profile.path.name}" if profile.path.name else ""]
    if run.get("precision"):
        parts.append(f"trained in {run['precision']}")
    if run.get("parameters"):
        parts.append(f"{count_text(run['parameters'])} parameters")
    parts.append(f"{plural(len(steps), 'step')} recorded" + (f", from {steps[0]} to {steps[-1]}" if steps else ""))
    parts.append(f"{plural(len(profile.modules), 'module')}")
    parts.append(str(run.get("device_name") or run.get("device") or ""))
    return " · ".join(p for p in parts if p)


def main_format(material: Material) -> str:
    """The format that the explorer opens with: the plan's most used low one, else fp16."""
    return material.formats[0].name


def lead(material: Material) -> str:
    """The one sentence to read."""
    if material.plan is None:
        return _lead_without_plan(material)
    total, low, share = len(material.rows), material.low, material.low_share
    of_flops = f", {percent(share)}% of the FLOPs" if share is not None else ""
    if not low:
        kept = _and(sorted({r.compute for r in material.high})) or "fp32"
        return f"The plan keeps all {plural(total, 'module')} in {kept}: nothing is gained or allowed in low precision."
    formats = _and([f.name for f in material.formats])
    can = "run" if material.plan_run is not None else "can run"
    if not material.high:
        return f"All {plural(total, 'module')} {can} in {formats}{of_flops}."
    kept = _and(sorted({r.compute for r in material.high}))
    stay = "stays" if len(material.high) == 1 else "stay"
    return (
        f"{len(low)} of {plural(total, 'module')} {can} in {formats}{of_flops}; {len(material.high)} {stay} in {kept}."
    )


def _lead_without_plan(material: Material) -> str:
    answers = []
    for fmt in material.formats:
        frame = material.ask(fmt, FORWARD)
        bad = int((frame.overflow_lo > 0).sum())
        if not len(frame):
            return "Nothing was recorded yet: the run holds no statistics."
        if bad:
            answers.append(f"{fmt} would overflow at {bad} of {plural(len(frame), 'forward tensor')}")
        else:
            answers.append(f"{fmt} holds all {plural(len(frame), 'forward tensor')}")
    return "; ".join(answers) + ". No plan was made yet."


def facts(material: Material) -> tuple[Fact, ...]:
    """The headline figures, four at most."""
    found: list[Fact | None] = []
    if material.plan is not None:
        share = material.low_share
        of_modules = len(material.low) / max(len(material.rows), 1)
        label = "FLOPs in low precision" if share is not None else "Modules in low precision"
        value = f"{percent(of_modules if share is None else share)}%"
        found.append(Fact(label, value, f"{len(material.low)} of {plural(len(material.rows), 'module')}"))
        found.append(_speed_fact(material))
    run, base = material.plan_run, material.base_run
    if run is not None and _known(run.eval_loss):
        against = (
            "" if run is base or not _known(run.eval_change) else f"{_signed(run.eval_change)} against {base.precision}"
        )
        found.append(Fact("Held-out loss with the plan", figure(run.eval_loss), against))
    scale = material.plan.loss_scale if material.plan is not None else {}
    if scale.get("initial"):
        lo, hi = scale.get("interval") or (None, None)
        safe = f"safe from 2^{lo:g} to 2^{hi:g}" if lo is not None else ""
        found.append(Fact("Loss scale", power_of_two(scale["initial"]), safe))
    if len([f for f in found if f]) < 4:
        found.append(_headroom_fact(material))
    if material.plan is None:
        found.append(_flushed_fact(material))
    return tuple(f for f in found if f)[:4]


def _speed_fact(material: Material) -> Fact | None:
    run, base = material.plan_run, material.base_run
    if run is not None and base is not None and run is not base and _known(run.speed):
        note = f"{number(run.step_time_ms)} ms per step, {base.precision} {number(base.step_time_ms)}"
        return Fact(f"Speed against {base.precision}, measured", f"{run.speed:.2f}×", note)
    predicted = (material.plan.made_from or {}).get("predicted_ms", {}) if material.plan is not None else {}
    if predicted.get("fp32") and predicted.get("plan"):
        how = "from measured module times" if material.plan.made_from.get("costs") == "measured" else "by a cost model"
        return Fact("Speed against fp32, predicted", f"{predicted['fp32'] / predicted['plan']:.2f}×", how)
    return None


def _headroom_fact(material: Material) -> Fact | None:
    worst = _tightest(material)
    if worst is None:
        return None
    room, fmt, site, _ = worst
    label = f"Least head-room in {fmt}" if room >= 0 else f"Furthest beyond {fmt}"
    return Fact(label, f"{fixed(abs(room))} binades", str(site))


def _flushed_fact(material: Material) -> Fact | None:
    frame = material.ask(get_format("fp16"), GRADIENTS)
    share = _overall(frame, "flushed")
    return None if share is None else Fact("Gradients that fp16 flushes", f"{percent(share)}%", "without a loss scale")


def statements(material: Material) -> tuple[Statement, ...]:
    """The verdict's sentences, most important first."""
    found = [
        _damaged(material), _nonfinite(material), _measured(material), _kept_high(material), _ranges(material),
        _gradients(material), _scale(material), _status(material),
    ]  # fmt: skip
    return tuple(s for s in found if s is not None)


def _damaged(material: Material) -> Statement | None:
    if not material.profile.damaged:
        return None
    n = len(material.profile.damaged)
    text = f"{plural(n, 'part')} of the run could not be read and {'is' if n == 1 else 'are'} left out."
    return Statement("care", text, tuple(material.profile.damaged))


def _nonfinite(material: Material) -> Statement | None:
    sites, table = material.profile.merged()
    rows = np.flatnonzero(table.nonfinite)
    if not len(rows):
        return None
    rows = rows[np.argsort(-table.nonfinite[rows] / np.maximum(table.count[rows], 1), kind="stable")]
    items = tuple(f"{sites[i]}: {percent(table.nonfinite[i] / table.count[i])}% of its values" for i in rows[:_LISTED])
    return Statement(
        "bad", f"inf or NaN was recorded at {plural(len(rows), 'site')}.", items + _more(len(rows), "site")
    )


def _measured(material: Material) -> Statement | None:
    run, base = material.plan_run, material.base_run
    if run is None or base is None or run is base:
        return None
    text = "Trained with the plan"
    if _known(run.speed):
        word = "the same speed as" if 0.98 <= run.speed <= 1.02 else f"{run.speed:.2f} times the speed of"
        text += (
            f": {word} {base.precision} ({number(run.step_time_ms)} against {number(base.step_time_ms)} ms per step)"
        )
    kind = "good" if not _known(run.speed) or run.speed >= 0.98 else "care"
    if _known(run.eval_loss) and _known(base.eval_loss):
        text += f", held-out loss {figure(run.eval_loss)} against {figure(base.eval_loss)} ({_signed(run.eval_change)})"
        kind = "bad" if run.eval_change > 0.01 else kind
    elif _known(run.train_loss):
        text += f", training loss {figure(run.train_loss)} against {figure(base.train_loss)}"
    text += f"; {plural(run.nonfinite_steps, 'non-finite step') if run.nonfinite_steps else 'no non-finite step'}"
    text += f", {plural(run.skipped_steps, 'skipped step') if run.skipped_steps else 'no skipped step'}"
    if _known(run.peak_memory_bytes) and _known(base.peak_memory_bytes):
        text += f"; peak memory {bytes_text(run.peak_memory_bytes)} against {bytes_text(base.peak_memory_bytes)}"
    if run.nonfinite_steps or run.status == "failed":
        kind = "bad"
    return Statement(kind, text + ".")


def _kept_high(material: Material) -> Statement | None:
    if material.plan is None or not material.high or not material.low:
        return None
    groups = sorted(group_rows(material.high), key=lambda g: (not _forbidden(g), -g.count))
    items = tuple(f"{g.label}: {_why(g) or 'no reason given'}" for g in groups[:_LISTED])
    rest = sum(g.count for g in groups[_LISTED:])
    items += (f"and {plural(rest, 'more module')}, in the plan below",) if rest else ()
    forbidden = sum(map(_forbidden, material.high))
    computes = _and(sorted({r.compute for r in material.high}))
    because = f", {forbidden} of them because low precision is not safe there" if forbidden else ""
    compute = "computes" if len(material.high) == 1 else "compute"
    text = f"{plural(len(material.high), 'module')} {compute} in {computes}{because}:"
    return Statement("care" if forbidden else "note", text, items)


def _forbidden(row: PlanRow) -> bool:
    return any(r.startswith("not ") for r in row.reasons)


def _why(row: PlanRow) -> str:
    """The reason that says most: what forbids, else the first."""
    return next((r for r in row.reasons if r.startswith("not ")), row.reasons[0] if row.reasons else "")


def _ranges(material: Material) -> Statement | None:
    """Overflow and head-room of forward tensors in the formats in question."""
    lines, kind = [], "good"
    for fmt in material.formats:
        frame = material.ask(fmt, FORWARD)
        if not len(frame):
            continue
        if fmt.bits <= 8:  # an 8-bit tensor carries a scale of its own, chosen from its amax
            lines.append(f"{fmt}: {plural(len(frame), 'tensor')}, each with a scale of its own, so that none overflows")
            continue
        bad = frame[frame.overflow_hi > 0].sort_values("amax", ascending=False)
        if len(bad):
            kind = "bad" if material.plan is not None else "care"
            worst = bad.iloc[0]
            lines.append(
                f"{fmt}: {plural(len(bad), 'tensor')} of {len(frame)} beyond its largest value {number(fmt.max)}; "
                f"{_site(worst)} reaches {number(worst.amax)}, {fixed(-_room(fmt, worst.amax))} binades too far"
            )
        elif frame.amax.max() > 0:
            worst = frame.loc[frame.amax.idxmax()]
            room = _room(fmt, worst.amax)
            kind = "care" if room < _TIGHT and kind == "good" else kind
            lines.append(
                f"{fmt}: every tensor fits; the largest is {_site(worst)} with {number(worst.amax)}, "
                f"{fixed(room)} binades below {number(fmt.max)}"
            )
    if not lines:
        return None
    where = " of the modules that run low," if material.low else ""
    return Statement(kind, f"Inputs, outputs and weights{where} against the largest finite value:", tuple(lines))


def _gradients(material: Material) -> Statement | None:
    fmt = get_format("fp16")
    if material.plan is not None and fmt not in material.formats:
        return None
    plain = material.ask(fmt, GRADIENTS)
    share = _overall(plain, "flushed")
    if share is None:
        return None
    worst = plain.loc[plain.flushed.idxmax()]
    if share == 0:
        return Statement("good", "fp16 flushes no gradient to zero, even without a loss scale.")
    text = f"fp16 flushes {percent(share)}% of the gradient values without a loss scale"
    text += f" ({_site(worst)}: {percent(worst.flushed)}%)"
    initial = material.plan.loss_scale.get("initial") if material.plan is not None else None
    if not initial or initial <= 0:
        return Statement("care" if share > 1e-3 else "note", text + ".")
    k = round(math.log2(initial))
    scaled = material.ask(fmt, GRADIENTS, k)
    after = _overall(scaled, "flushed") or 0.0
    beyond = int((scaled.overflow_hi > 0).sum())
    text += f", {percent(after)}% with the plan's loss scale 2^{k}"
    text += f"; {plural(beyond, 'gradient tensor')} would overflow there" if beyond else " and none overflows"
    return Statement("care" if beyond or after > 0.05 else "good", text + ".")


def _scale(material: Material) -> Statement | None:
    scale = material.plan.loss_scale if material.plan is not None else {}
    ends = scale.get("interval")
    if not ends:
        return None
    lo, hi = ends
    low_site, high_site = scale.get("lo_site") or "no site", scale.get("hi_site") or "no site"
    if lo > hi:
        text = f"No single loss scale serves all fp16 gradients: {low_site} needs 2^{lo:g} or more, {high_site} "
        text += f"2^{hi:g} or less."
        return Statement("bad", text)
    text = f"Loss scales from 2^{lo:g} to 2^{hi:g} are safe; {low_site} binds the lower end, {high_site} the upper."
    return Statement("good", text)


def _status(material: Material) -> Statement | None:
    if material.plan is None:
        return None
    if material.confirmed:
        return Statement("good", "The plan is confirmed: it was run on batches that were not recorded, against fp32.")
    return Statement(
        "note", "The plan is predicted from ranges and costs, not yet confirmed by running it: ranges do not see "
        "cancellation, long sums or what a module hides between its input and its output."
    )  # fmt: skip


def next_step(material: Material) -> tuple[str, str]:
    """(what to do, the command that does it)."""
    path = material.profile.path
    task = str(material.profile.run.get("task_ref") or material.profile.run.get("task") or "")
    task = task if ":" in task or task == "gpt" else "TASK"
    if material.plan is None:
        return "Make a plan from this run", f"precscope recommend {path} --out plan.json"
    if material.plan_run is None:
        return "Train with the plan", f"precscope train {task} --plan plan.json --out runs/plan"
    base = material.base_run
    if base is None or base is material.plan_run:
        return "Train the fp32 twin to compare with", f"precscope train {task} --precision fp32 --out runs/fp32"
    if material.plan_run.nonfinite_steps or (
        _known(material.plan_run.eval_change) and material.plan_run.eval_change > 0.01
    ):
        return "Look where the run went wrong: record it with the plan", f"precscope profile {task} --out runs/again"
    return "Use the plan in your own loop", 'with ps.apply(ps.PrecisionPlan.load("plan.json"), model): ...'


def _tightest(material: Material) -> tuple[float, FloatFormat, str, float] | None:
    """(binades, format, site, amax) of the forward tensor with the least head-room in its format."""
    found = []
    for fmt in (f for f in material.formats if f.bits > 8):
        frame = material.ask(fmt, FORWARD)
        frame = frame[frame.amax > 0]
        if len(frame):
            worst = frame.loc[frame.amax.idxmax()]
            found.append((_room(fmt, worst.amax), fmt, _site(worst), float(worst.amax)))
    return min(found, key=lambda f: f[0], default=None)


def _room(fmt: FloatFormat, amax: float) -> float:
    return math.log2(fmt.max / amax)


def _site(row: Any) -> str:
    return str(Site(row.module, row.role and _role(row.role), int(row.call)))


def _role(name: str) -> Any:
    from ..sites import Role

    return Role(name)


def _overall(frame: pd.DataFrame, column: str) -> float | None:
    """A share over all elements of all rows."""
    total = frame["count"].sum()
    return float((frame[column] * frame["count"]).sum() / total) if total else None


def _known(x: float | None) -> bool:
    return x is not None and math.isfinite(x)


def _signed(change: float) -> str:
    return f"{'+' if change >= 0 else ''}{100 * change:.2f}%"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else ""


def _more(n: int, word: str) -> tuple[str, ...]:
    return (f"and {plural(n - _LISTED, f'more {word}')}",) if n > _LISTED else ()
