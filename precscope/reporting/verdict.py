"""The verdict in plain sentences with numbers: what runs low, what does not and why, the gain, what to do next."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..formats import FloatFormat, get_format
from ..plans.table import confirmation_of
from .material import FORWARD, GRADIENTS, WIDE, Material, head_room, known, listed, overall, signed, site_name
from .numbers import bytes_text, figure, fixed, number, percent, plural
from .rows import PlanRow, Statement, group_rows

if TYPE_CHECKING:
    import pandas as pd

_LISTED = 6  # groups of modules that the verdict names; the plan table has all
_USE = ("Use the plan in your own loop", 'with ps.apply(ps.PrecisionPlan.load("plan.json"), model): ...')
_TIGHT = 2.0  # binades of head-room below which a site is worth a word


def statements(material: Material) -> tuple[Statement, ...]:
    """The verdict's sentences, most important first."""
    found = [
        _failed(material), _damaged(material), _nonfinite(material), _measured(material), _seeds(material),
        _kept_high(material), _ranges(material), _noise(material), _gradients(material), _scale(material),
        _optimizer(material), _status(material),
    ]  # fmt: skip
    return tuple(s for s in found if s is not None)


def _failed(material: Material) -> Statement | None:
    if not material.failed:
        return None
    steps, error = material.profile.steps, str(material.profile.run.get("error") or "")
    seen = f"what is said here is what it recorded up to step {steps[-1]}" if steps else "it recorded nothing"
    text = f"The run failed; {seen}."
    return Statement("bad", text, (error,) if error else ())


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
    if known(run.speed):
        word = "the same speed as" if 0.98 <= run.speed <= 1.02 else f"{run.speed:.2f} times the speed of"
        text += (
            f": {word} {base.precision} ({number(run.step_time_ms)} against {number(base.step_time_ms)} ms per step)"
        )
    kind = "good" if not known(run.speed) or run.speed >= 0.98 else "care"
    if known(run.eval_loss) and known(base.eval_loss):
        text += f", held-out loss {figure(run.eval_loss)} against {figure(base.eval_loss)} ({signed(run.eval_change)})"
        kind = "bad" if run.eval_change > 0.01 else kind
    elif known(run.train_loss):
        text += f", training loss {figure(run.train_loss)} against {figure(base.train_loss)}"
    text += f"; {plural(run.nonfinite_steps, 'non-finite step') if run.nonfinite_steps else 'no non-finite step'}"
    text += f", {plural(run.skipped_steps, 'skipped step') if run.skipped_steps else 'no skipped step'}"
    if known(run.peak_memory_bytes) and known(base.peak_memory_bytes):
        text += f"; peak memory {bytes_text(run.peak_memory_bytes)} against {bytes_text(base.peak_memory_bytes)}"
    if run.nonfinite_steps or run.status == "failed":
        kind = "bad"
    return Statement(kind, text + ".")


def _seeds(material: Material) -> Statement | None:
    """What several seeds say of the plan's loss, and what its guard did. One seed says no more than `_measured`."""
    run = material.plan_run
    pair = next((p for p in material.pairs if run is not None and p.run == run.run), None)
    if pair is None or (len(pair.seeds) < 2 and not pair.events):
        return None
    from ..comparison.wording import evidence

    parts = []
    if len(pair.seeds) > 1:
        parts.append(f"Over {len(pair.seeds)} seeds, {pair.run} against {pair.baseline}: {pair.verdict}")
    if pair.events:
        counts = listed([f"{n} {kind}" for kind, n in pair.events.items()])
        parts.append(f"{'its' if parts else 'Its'} guard noted {counts}")
    said = evidence(pair) if len(pair.seeds) > 1 else ""
    bad = len(pair.seeds) > 1 and pair.kind in ("worse", "diverged")
    kind = "bad" if bad else "good" if pair.passed and not pair.events else "care"
    return Statement(kind, "; ".join(parts) + ".", (said,) if said else ())


def _kept_high(material: Material) -> Statement | None:
    if material.plan is None or not material.high or not material.low:
        return None
    groups = sorted(group_rows(material.high), key=lambda g: (not _forbidden(g), -g.count))
    items = tuple(f"{g.label}: {_why(g) or 'no reason given'}" for g in groups[:_LISTED])
    rest = sum(g.count for g in groups[_LISTED:])
    items += (f"and {plural(rest, 'more module')}, in the plan",) if rest else ()
    forbidden = sum(map(_forbidden, material.high))
    computes = listed(sorted({r.compute for r in material.high}))
    of_them = "" if forbidden == len(material.high) else f", {forbidden} of them"
    because = f"{of_them} because low precision is not safe there" if forbidden else ""
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
                f"{site_name(worst)} reaches {number(worst.amax)}, {fixed(-head_room(fmt, worst.amax))} binades too far"
            )
            lines += _near_the_end(material, fmt, besides=site_name(worst))
        elif frame.amax.max() > 0:
            near = _near_the_end(material, fmt)
            tight = bool(near) or head_room(fmt, frame.amax.max()) < _TIGHT
            kind = "care" if tight and kind == "good" else kind
            lines += [_fitting(fmt, frame, largest=not near), *near]
    if not lines:
        return None
    where = " of the modules that run low," if material.low else ""
    return Statement(kind, f"Inputs, outputs and weights{where} against the largest finite value:", tuple(lines))


def _fitting(fmt: FloatFormat, frame: pd.DataFrame, *, largest: bool) -> str:
    """A line on a format that holds every tensor. largest: whether to name the largest one."""
    worst = frame.loc[frame.amax.idxmax()]
    every = "every finite value" if (frame.nonfinite > 0).any() else "every tensor"
    said = f"{fmt}: {every} fits"
    if fmt.emax >= WIDE:
        said = f"{fmt} has the range of fp32, {every} fits; the largest magnitude is {number(worst.amax)}"
    elif largest:
        said += f"; the largest is {site_name(worst)} with {number(worst.amax)}, "
        said += f"{fixed(head_room(fmt, worst.amax))} binades below {number(fmt.max)}"
    lossy = frame[np.isfinite(frame.sqnr_db)]
    if len(lossy):
        noisiest = lossy.loc[lossy.sqnr_db.idxmin()]
        said += f"; the lowest SQNR is {fixed(noisiest.sqnr_db)} dB ({site_name(noisiest)})"
    return said


def _near_the_end(material: Material, fmt: FloatFormat, *, besides: str = "") -> list[str]:
    """The sites beyond the end of a format or within `_TIGHT` binades of it, nearest to overflow first."""
    if fmt.emax >= WIDE:
        return []
    near = [h for h in material.nearest(fmt) if h.binades < _TIGHT and str(h.site) != besides]
    return [*map(str, near[:_LISTED]), *_more(len(near), "such site")]


def _gradients(material: Material) -> Statement | None:
    fmt = get_format("fp16")
    if material.plan is not None and fmt not in material.formats:
        return None
    plain = material.ask(fmt, GRADIENTS)
    share = overall(plain, "flushed")
    if share is None:
        return None
    worst = plain.loc[plain.flushed.idxmax()]
    if share == 0:
        return Statement("good", "fp16 flushes no gradient to zero, even without a loss scale.")
    text = f"fp16 flushes {percent(share)}% of the gradient values without a loss scale"
    text += f" ({site_name(worst)}: {percent(worst.flushed)}%)"
    initial = material.plan.loss_scale.get("initial") if material.plan is not None else None
    if not initial or initial <= 0:
        return Statement("care" if share > 1e-3 else "note", text + ".")
    k = round(math.log2(initial))
    scaled = material.ask(fmt, GRADIENTS, k)
    after = overall(scaled, "flushed") or 0.0
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


def _noise(material: Material) -> Statement | None:
    """What the plan's rounding does to the loss, against what is allowed."""
    noise = material.plan.made_from.get("loss_noise") if material.plan is not None else None
    if not noise or not known(noise.get("plan")) or not known(noise.get("budget")):
        return None
    plan, budget, spread = noise["plan"], noise["budget"], noise.get("spread_over_batches")
    within = plan <= budget
    text = f"Rounding moves the loss of a step by {number(plan)} (standard deviation, priced in shadow steps), "
    text += f"{'within' if within else 'more than'} the {number(budget)} that is allowed"
    text += f"; from batch to batch it differs by {number(spread)}" if known(spread) else ""
    largest = list((noise.get("largest") or {}).items())[:3]
    spent = [f"{name or '(root)'} ({number(std)})" for name, std in largest if std > 0]
    text += f"; the largest parts are those of {listed(spent)}" if spent and plan > 0 else ""
    return Statement("good" if within else "care", text + ".")


def _optimizer(material: Material) -> Statement | None:
    """What the optimizer's settings do in low precision; what is a module's reason already is told there."""
    plan = material.plan
    if plan is None or not plan.optimizer.get("warnings"):
        return None
    told = {f"{name or '(root)'}: {reason}" for name, layer in plan.modules.items() for reason in layer.reasons}
    warnings = [str(w) for w in plan.optimizer["warnings"] if str(w) not in told]
    if not warnings:
        return None
    items = tuple(warnings[:_LISTED]) + _more(len(warnings), "warning")
    return Statement("care", "The optimizer needs care where parameters or its state are in low precision:", items)


def _status(material: Material) -> Statement | None:
    if material.plan is None:
        return None
    confirmed = material.plan.confirmed
    if confirmed:
        said = confirmation_of(confirmed)
        return Statement("good" if confirmed.get("passed", True) else "bad", f"The plan is {said}.")
    return Statement(
        "note", "The plan is predicted from ranges and costs, not yet confirmed by running it: ranges do not see "
        "cancellation, long sums or what a module hides between its input and its output."
    )  # fmt: skip


def next_step(material: Material) -> tuple[str, str]:
    """(what to do, the command that does it)."""
    path = material.profile.path
    task = str(material.profile.run.get("task_ref") or material.profile.run.get("task") or "")
    task = task if ":" in task or task == "gpt" else "TASK"
    if material.plan is None and material.failed and material.profile.run.get("mode") != "inference":
        return "Look where it went wrong", f"precscope trace {task}"
    if material.plan is None:
        return "Make a plan from this run", f"precscope recommend {path} --out plan.json"
    if material.profile.run.get("mode") == "inference":
        return _USE
    if material.plan_run is None:
        return "Train with the plan", f"precscope train {task} --plan plan.json --out runs/plan"
    base = material.base_run
    if base is None or base is material.plan_run:
        return "Train the fp32 twin to compare with", f"precscope train {task} --precision fp32 --out runs/fp32"
    if material.plan_run.nonfinite_steps or (
        known(material.plan_run.eval_change) and material.plan_run.eval_change > 0.01
    ):
        return "Look where the run went wrong: record it with the plan", f"precscope profile {task} --out runs/again"
    return _USE


def _more(n: int, word: str) -> tuple[str, ...]:
    return (f"and {plural(n - _LISTED, f'more {word}')}",) if n > _LISTED else ()
